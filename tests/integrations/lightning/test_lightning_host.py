"""distopt under Lightning's Trainer and Fabric, on real gloo ranks. What they do is in lightning_jobs.py."""

import importlib.util
import json

import pytest

from host_jobs import DGC, STEPS, TOPK, call, check_example

pytestmark = [
    pytest.mark.job,
    pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed"),
]


def test_everything_sent_is_plain_training(ranks):
    for distances in ranks(2)(call, "lightning_jobs:distances_to_plain"):
        rounded = distances.pop("momentum and weight decay")  # its momentum is a sum of its own
        assert 0 < rounded < 1e-6
        assert set(distances.values()) == {0.0}, distances


def test_replicas_stay_equal_and_fewer_bytes_go(ranks, tmp_path):
    first, second = ranks(2)(call, "lightning_jobs:compressed", str(tmp_path))
    for (ours, stats, *_), (theirs, *_) in zip(first, second, strict=True):
        assert ours == theirs
        assert stats["bytes_sent"] < 0.1 * stats["bytes_dense"]
    (_, _, steps, during, after), (_, _, accumulated, untouched, _) = first
    assert (steps, accumulated) == (STEPS, STEPS // 2)
    assert set(during) == {(0.0, 0.0)}
    assert after == (0.9, 1e-4)
    assert set(untouched) == {(None, 0.1)}  # top-k takes nothing from AdamW
    for rank in range(2):
        written = [json.loads(line)["step"] for line in (tmp_path / f"stats-{rank}.jsonl").read_text().splitlines()]
        assert written == [1, 4, 8]


def test_a_checkpoint_carries_every_rank(ranks, tmp_path):
    for job in (DGC, TOPK):
        folder = tmp_path / job["algorithm"]
        half = str(folder / f"step={STEPS // 2}.ckpt")
        through = ranks(2)(call, "lightning_jobs:resumed_fit", None, job, keep=str(folder))
        assert ranks(2)(call, "lightning_jobs:resumed_fit", half, job) == through
    half = str(tmp_path / "dgc" / f"step={STEPS // 2}.ckpt")
    (_, steps, during, after), *_ = ranks(1)(call, "lightning_jobs:resumed_fit", half, DGC)
    assert steps > STEPS // 2
    assert (during, after) == ((0.0, 0.0), (0.9, 1e-4))


def test_a_plain_checkpoint_goes_on_compressed(ranks, tmp_path):
    assert max(ranks(2)(call, "lightning_jobs:plain_then_compressed", str(tmp_path))) < 1e-6


def test_refusals_say_what_to_do(ranks, tmp_path):
    ranks(2)(call, "lightning_jobs:refusals", str(tmp_path))
    ranks(1)(call, "lightning_jobs:refused_alone")


def test_the_example_trains(ranks, tmp_path):
    check_example(ranks, "lightning_dgc.py", tmp_path / "kept")

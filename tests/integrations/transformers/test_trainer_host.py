"""distopt under Hugging Face's Trainer, on real gloo ranks. What they do is in trainer_jobs.py."""

import importlib.util
import json

import pytest

from host_jobs import DGC, STEPS, TOPK, call, check_example

pytestmark = [
    pytest.mark.job,
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed"),
]


def test_everything_sent_is_plain_training(ranks, tmp_path):
    for distances in ranks(2)(call, "trainer_jobs:distances_to_plain", str(tmp_path)):
        rounded = distances.pop("momentum and weight decay")  # its momentum is a sum of its own
        assert 0 < rounded < 1e-6
        assert set(distances.values()) == {0.0}, distances


def test_replicas_stay_equal_and_fewer_bytes_go(ranks, tmp_path):
    first, second = ranks(2)(call, "trainer_jobs:compressed", str(tmp_path))
    for (ours, stats, *_), (theirs, *_) in zip(first, second, strict=True):
        assert ours == theirs
        assert stats["bytes_sent"] < 0.1 * stats["bytes_dense"]
    (_, _, steps, during, after), (_, _, accumulated, untouched, _) = first
    assert (steps, accumulated) == (STEPS, STEPS // 2)
    assert set(during) == {(0.0, 0.0)}
    assert after == (0.9, 1e-4)
    assert set(untouched) == {(None, 0.1)}  # top-k takes nothing from AdamW
    for rank in range(2):
        lines = (tmp_path / f"log/stats-{rank}.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 4, 8]


def test_a_checkpoint_carries_every_rank(ranks, tmp_path):
    for job in (DGC, TOPK):
        folder = str(tmp_path / job["algorithm"])
        half = f"{folder}/checkpoint-{STEPS // 2}"
        through = ranks(2)(call, "trainer_jobs:resumed_fit", folder, job)
        assert ranks(2)(call, "trainer_jobs:resumed_fit", folder, job, resume=half) == through
    folder = tmp_path / "dgc"
    ranks(2)(call, "trainer_jobs:resumed_elsewhere", str(folder), str(tmp_path / "moved"))
    (_, steps, during, after), *_ = ranks(3)(
        call, "trainer_jobs:resumed_fit", str(folder), DGC, resume=f"{folder}/checkpoint-{STEPS // 2}"
    )
    assert steps == STEPS
    assert (during, after) == ((0.0, 0.0), (0.9, 1e-4))


def test_a_plain_checkpoint_goes_on_compressed(ranks, tmp_path):
    assert max(ranks(2)(call, "trainer_jobs:plain_then_compressed", str(tmp_path))) < 1e-6


def test_refusals_say_what_to_do(ranks, tmp_path):
    ranks(2)(call, "trainer_jobs:refusals", str(tmp_path))
    ranks(1)(call, "trainer_jobs:refused_alone", str(tmp_path))


def test_the_example_trains(ranks, tmp_path):
    check_example(ranks, "trainer_dgc.py", tmp_path / "kept")

"""distopt under Lightning Fabric, on real gloo ranks. What they do is in fabric_jobs.py."""

import importlib.util
import json

import pytest

from host_jobs import DGC, STEPS, TOPK, call, check_example

pytestmark = [
    pytest.mark.job,
    pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed"),
]


def test_everything_sent_is_plain_training(ranks):
    for distances in ranks(2)(call, "fabric_jobs:distances_to_plain"):
        rounded = distances.pop("momentum and weight decay")  # its momentum is a sum of its own
        assert 0 < rounded < 1e-6
        assert set(distances.values()) == {0.0}, distances


def test_replicas_stay_equal_and_fewer_bytes_go(ranks, tmp_path):
    first, second = ranks(2)(call, "fabric_jobs:compressed", str(tmp_path))
    for (ours, stats), (theirs, _) in zip(first, second, strict=True):
        assert ours == theirs
        assert stats["bytes_sent"] < 0.1 * stats["bytes_dense"]
    assert [stats["steps"] for _, stats in first] == [STEPS, STEPS // 2]
    for rank in range(2):
        lines = (tmp_path / f"stats-{rank}.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 4, 8]


def test_a_checkpoint_carries_every_rank(ranks, tmp_path):
    for job in (DGC, TOPK):
        path = str(tmp_path / f"{job['algorithm']}.pt")
        through = ranks(2)(call, "fabric_jobs:saved_or_resumed", path, job)
        assert ranks(2)(call, "fabric_jobs:saved_or_resumed", path, job, resume=True) == through
    for size in (1, 3):
        (_, steps, held_back), *_ = ranks(size)(
            call, "fabric_jobs:saved_or_resumed", str(tmp_path / "topk.pt"), TOPK, resume=True
        )
        assert steps == STEPS
        assert held_back == pytest.approx(through[0][2], rel=1e-5)


def test_refusals_say_what_to_do(ranks):
    ranks(2)(call, "fabric_jobs:refusals")
    ranks(1)(call, "fabric_jobs:refused_alone")


def test_the_example_trains(ranks, tmp_path):
    check_example(ranks, "fabric_dgc.py", tmp_path / "kept")

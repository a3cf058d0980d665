"""distopt under Hugging Face Accelerate, on real gloo ranks. What they do is in accelerate_jobs.py."""

import importlib.util
import json

import pytest

from host_jobs import DGC, STEPS, TOPK, call, check_example

pytestmark = [
    pytest.mark.job,
    pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed"),
]


def test_everything_sent_is_plain_training(ranks):
    for distances in ranks(2)(call, "accelerate_jobs:distances_to_plain"):
        rounded = distances.pop("momentum and weight decay")  # its momentum is a sum of its own
        assert 0 < rounded < 1e-6
        assert set(distances.values()) == {0.0}, distances


def test_replicas_stay_equal_and_fewer_bytes_go(ranks):
    first, second = ranks(2)(call, "accelerate_jobs:compressed")
    for (ours, stats), (theirs, _) in zip(first[0], second[0], strict=True):
        assert ours == theirs
        assert stats["bytes_sent"] < 0.1 * stats["bytes_dense"]
    assert [stats["steps"] for _, stats in first[0]] == [STEPS, STEPS // 2]
    before, during = first[1]
    assert (before["momentum"], before["weight_decay"]) == (0.9, 1e-4)
    assert (during["momentum"], during["weight_decay"]) == (0.0, 0.0)
    assert first[2][0] == first[2][1]  # top-k takes nothing from AdamW


def test_a_checkpoint_carries_every_rank(ranks, tmp_path):
    for job in (DGC, TOPK):
        folder = str(tmp_path / job["algorithm"])
        through = ranks(2)(call, "accelerate_jobs:saved_and_resumed", folder, job, save_at=STEPS // 2)
        resumed = ranks(2)(call, "accelerate_jobs:saved_and_resumed", folder, job, load=True)
        assert resumed == through
        assert len(list((tmp_path / job["algorithm"] / "distopt").glob("*.pt"))) == 2
    (_, steps, settings), *_ = ranks(1)(
        call, "accelerate_jobs:saved_and_resumed", str(tmp_path / "dgc"), DGC, load=True
    )
    assert steps == STEPS
    assert settings == {"momentum": 0.9, "weight_decay": 1e-4}
    ranks(2)(call, "accelerate_jobs:refused_without_it", str(tmp_path / "dgc"))


def test_refusals_say_what_to_do(ranks, tmp_path):
    ranks(2)(call, "accelerate_jobs:refusals", str(tmp_path))
    ranks(1)(call, "accelerate_jobs:refused_alone")


def test_the_log_of_a_job_is_written(ranks, tmp_path):
    job = tmp_path / "distopt.toml"
    lines = [*(f"{key} = {value!r}" for key, value in DGC.items()), "[log]", f'folder = "{tmp_path}/log"', "every = 4"]
    job.write_text("\n".join(lines).replace("'", '"'))
    ranks(2)(call, "accelerate_jobs:logged", str(job))
    for rank in range(2):
        steps = [json.loads(line)["step"] for line in (tmp_path / f"log/stats-{rank}.jsonl").read_text().splitlines()]
        assert steps == [1, 4, 8]
    assert (tmp_path / "log/report.txt").exists()


def test_the_example_trains(ranks, tmp_path):
    check_example(ranks, "accelerate_dgc.py", tmp_path / "kept")

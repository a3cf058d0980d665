import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import distopt
from distopt.cli import job, report
from distopt.cli.app import app
from distopt.cli.compare import Settings, summary
from distopt.cli.datasets import load
from distopt.cli.job import JobError, launch, read_jobs, write_jobs
from distopt.errors import ConfigError


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def test_the_three_runs_differ_in_nothing_but_the_algorithm(digits):
    dense, topk, dgc = Settings(data="digits", epochs=1).jobs(digits).values()
    assert replace(dense, algorithm={}) == replace(topk, algorithm={}) == replace(dgc, algorithm={})
    assert dense.algorithm == {"algorithm": "dense"}
    assert {**topk.algorithm, "algorithm": "dgc"} == dgc.algorithm


def test_length_and_warmup_follow_the_data_unless_they_are_given(digits):
    assert Settings(epochs=2, ranks=2, batch=64).steps_for(digits) == 2 * (1437 // 128)
    assert Settings(epochs=2, steps=7).steps_for(digits) == 7
    assert Settings().algorithms(1000)["DGC"]["warmup"] == {"schedule": "paper", "stage": 10}
    assert Settings(warmup_stage=0).algorithms(1000)["DGC"]["warmup"] is None


FILE = {"algorithm": "topk", "density": 0.02, "values": "bf16", "exchange": "balanced", "skip": ["*.bias"]}


def test_of_a_jobs_file_one_run_is_its_own_and_the_others_compress_as_it_does():
    config = distopt.from_config(FILE).to_dict()
    dense, topk, dgc = Settings(config=config).algorithms(steps=100).values()
    assert topk == config
    assert distopt.from_config(dense) == distopt.Dense(peer_timeout=120.0)
    expected = distopt.DGC(density=0.02, values="bf16", exchange="balanced", skip=("*.bias",))
    assert distopt.from_config(dgc) == expected
    with pytest.raises(ConfigError, match=r"takes topk or dgc of DDP models from a file, beside dense, got .*'gossip'"):
        Settings(config={"algorithm": "gossip"})


def test_a_file_and_options_that_say_the_same_thing_are_a_conflict(tmp_path):
    path = tmp_path / "distopt.toml"
    path.write_text('algorithm = "dgc"\ndensity = 0.01\n')
    arguments = ["compare", "--data", "digits", "--config", str(path), "--density", "0.001", "--warmup-stage", "3"]
    ran = CliRunner().invoke(app, arguments)
    assert isinstance(ran.exception, ConfigError)
    assert f"{path} says how the runs compress, got --density, --warmup-stage beside it" in str(ran.exception)


def test_jobs_survive_their_file(digits, tmp_path):
    jobs = Settings(data="digits").jobs(digits)
    write_jobs(jobs, tmp_path / "jobs.json")
    assert read_jobs(tmp_path / "jobs.json") == jobs


def make_summary(label="DGC", *, selecting_s=0.2, link_bytes=10):
    stats = {
        "steps": 10,
        "bytes_sent": 500,
        "bytes_dense": 10_000,
        "seconds_selecting": selecting_s,
        "seconds_decoding": 0.0,
        "seconds_communicating": 0.5,
        "last": {"bytes_sent": 10, "bytes_dense": 1000, "link_bytes_sent": link_bytes},
    }
    (trained, *_) = Settings(steps=10).jobs(load("digits")).values()
    result = {"stats": stats, "accuracy": 0.5, "parameters": 250, "ranks_identical": True, "training_s": 3.0}
    return summary(label, trained, result)


def test_a_summary_holds_means_per_step_and_ratios_of_counted_bytes():
    made = make_summary()
    assert made["bytes_sent_per_step"] == 50
    assert made["ratio"] == 20  # over the whole run
    assert made["ratio_last_step"] == 100  # after warm-up
    assert made["seconds_per_step"] == pytest.approx(0.3)
    assert made["seconds_selecting_per_step"] == pytest.approx(0.02)
    assert made["seconds_communicating_per_step"] == pytest.approx(0.05)


def test_break_even_is_bits_kept_off_the_link_per_second_of_selecting():
    dense = make_summary("dense", selecting_s=0.0, link_bytes=1010)
    assert report.break_even_bits_per_s(dense, make_summary()) == pytest.approx(8 * 1000 / 0.02)
    assert report.break_even_bits_per_s(dense, make_summary(selecting_s=0.0)) is None
    assert report.break_even_bits_per_s(make_summary(link_bytes=5), make_summary()) is None


TINY = ["--data", "digits", "--model", "mlp", "--steps", "12"]


@pytest.mark.job
def test_compare_of_a_jobs_file(warm_python, tmp_path):
    (tmp_path / "distopt.toml").write_text(json.dumps(FILE).replace('": ', '" = ')[1:-1].replace(', "', '\n"'))
    arguments = ["compare", *TINY, "--config", tmp_path / "distopt.toml", "--out", tmp_path]
    ran = warm_python.run("from distopt.cli import main; main()", *arguments)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "density 0.02, as topk in the file" in ran.stdout
    _, topk, dgc = json.loads((tmp_path / "compare.json").read_text())["results"]
    assert topk["algorithm"] == distopt.from_config(FILE).to_dict()
    assert topk["ratio_last_step"] == pytest.approx(dgc["ratio_last_step"], rel=0.2)


@pytest.mark.job
def test_compare_trains_three_ways_and_leaves_table_plot_and_figures(warm_python, tmp_path):
    ran = warm_python.run("from distopt.cli import main; main()", "compare", *TINY, "--out", tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    # Not a terminal: plain lines, no bar and no escape codes.
    assert "\x1b" not in ran.stdout
    assert "DGC: step 12/12, accuracy" in ran.stdout
    for part in ("dense DDP", "top-k + error feedback", "accuracy", "bytes/step", "ratio", "selecting"):
        assert part in ran.stdout
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / "compare.json").read_text())
    assert {"machine", "versions", "settings", "results", "data"} <= set(content)
    dense, topk, dgc = content["results"]
    assert dense["ratio"] == 1
    assert dense["bytes_sent_per_step"] == 4 * dense["parameters"]
    assert dgc["ratio"] == dgc["stats"]["bytes_dense"] / dgc["stats"]["bytes_sent"]
    for result in (dense, topk, dgc):
        assert result["ranks_identical"]
        assert result["stats"]["steps"] == 12
        assert result["bytes_dense_per_step"] == 4 * result["parameters"]
        assert result["curve"][-1]["step"] == 12
        assert result["curve"][-1]["bytes_sent"] == result["stats"]["bytes_sent"]
    assert dgc["ratio_last_step"] > topk["ratio"] / 1.01 > 1


class Failing:
    """A launch of two ranks that cannot end well: what it raised, and the ranks' process ids."""

    def __init__(self, folder, deadline_s, at_a_step):
        self.pids = []
        self._at_a_step = at_a_step
        jobs = {"long": Settings(data="digits", steps=10**6).jobs(load("digits"))["dense DDP"]}
        with pytest.raises(JobError) as caught:
            launch(jobs, folder, deadline_s=deadline_s, on_event=self._happens)
        self.message = str(caught.value)

    def _happens(self, event):
        if event["event"] == "joined":
            self.pids.append(event["pid"])
        elif event["event"] == "step":
            self._at_a_step(self)


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """Both at the same time, as starting ranks is most of it. Their clock stands still, until one's deadline passes."""
    clock = [0.0]

    def let_the_deadline_pass(_):
        clock[0] = 31.0

    def kill_the_second(job):
        os.kill(job.pids[1], signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patched, ThreadPoolExecutor(2) as pool:
        patched.setattr(job, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=time.sleep))
        ends = {"deadline": (30, let_the_deadline_pass), "killed": (90, kill_the_second)}
        started = {name: pool.submit(Failing, tmp_path_factory.mktemp(name), *end) for name, end in ends.items()}
        return {name: launched.result(100) for name, launched in started.items()}


@pytest.mark.job
def test_a_deadline_ends_the_ranks_it_started_and_says_so(failing):
    message, pids = failing["deadline"].message, failing["deadline"].pids
    assert "must finish within 30 s" in message
    assert "0 of 1 runs" in message
    assert len(pids) == 2
    assert wait_until_gone(pids)


@pytest.mark.job
def test_a_dead_rank_is_an_error_with_the_end_of_the_log(failing):
    assert "SIGKILL" in failing["killed"].message
    assert wait_until_gone(failing["killed"].pids)


def wait_until_gone(pids, timeout_s=10):
    end = time.monotonic() + timeout_s
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < end:
        time.sleep(0.1)
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)

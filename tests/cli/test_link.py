"""`distopt link`: measured between real ranks, or on a link that is given."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from distopt.cli import link as links
from distopt.cli.app import app
from distopt.errors import ConfigError

PLAIN = {"COLUMNS": "200", "TERM": "dumb", "RANK": None, "WORLD_SIZE": None}


@pytest.fixture(autouse=True)
def _one_thread():
    """As every rank has it: on a busy machine two threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def given(*arguments):
    ran = CliRunner(env=PLAIN).invoke(app, ["link", *map(str, arguments)])
    assert ran.exit_code == 0, ran.output
    return ran.output


def test_a_link_that_is_given(tmp_path):
    said = given("--latency", 1e-4, "--bandwidth", 1e3, "--ranks", 2, "--out", tmp_path)  # a day per dense step
    assert "Link (given): latency 100 us, 0 Mbit/s" in said
    assert 'exchange="allgather"' in said
    found = json.loads((tmp_path / "link.json").read_text())
    assert found["dense"]["seconds"] > 100 * found["fastest"]["seconds"]
    assert found["dense"]["link_bytes"] == 4 * 25_557_032 + 12
    assert found["link"]["measured_between"] is None
    assert found["local"] == []
    assert "To train over this link" not in said
    assert (tmp_path / "link.png").stat().st_size > 10_000
    found["fastest"] = found["dense"]
    found["break_even_density"]["allgather"] = None
    said = links.advice(found)
    assert "leave compression off" in said
    assert "allgather, 2 ranks: never faster than dense" in said


def test_how_many_local_steps_suit_a_link(tmp_path):
    slow = ("--latency", 0.02, "--bandwidth", 2.5e6, "--ranks", 4, "--parameters", 400_000, "--out", tmp_path)
    said = given(*slow, "--step-seconds", 0.5, "--share", 0.9)
    found = json.loads((tmp_path / "link.json").read_text())
    dense, dgc, diloco, sparse = found["local"]
    assert [each["name"] for each in found["local"]] == ["dense", "dgc", "diloco", "sparseloco"]
    assert not dense["reaches"]
    assert dense["step_s"] == pytest.approx(0.5 + found["dense"]["seconds"])
    assert sparse["compute_share"] >= 0.9
    assert sparse["link_bytes"] < diloco["link_bytes"] / 100
    assert sparse["algorithm"]["inner_steps"] == sparse["inner_steps"]
    chosen = dgc if dgc["reaches"] else sparse
    assert found["take"] == chosen
    assert "4 ranks, 0.5 s per step, to compute for 90% of the time" in said
    found["take"] = {**sparse, "overlap": 1}
    assert f"distopt.SparseLoCo(inner_steps={sparse['inner_steps']}, overlap=1)" in links.local_advice(found)
    found["take"] = {**dense}
    assert "Nothing reaches 90% on this link" in links.local_advice(found)


@pytest.mark.job
def test_measured_between_two_ranks(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "distopt.cli", "link", "--parameters", "1000000", "--step-seconds", "0.05"]
    command += ["--out", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("Link (measured between 2 ranks)") == 1  # one rank speaks
    found = json.loads((tmp_path / "link.json").read_text())
    assert found["link"]["latency_s"] > 0
    assert found["link"]["bandwidth"] > 0
    assert found["ranks"] == 2
    assert [each["name"] for each in found["local"]] == ["dense", "dgc", "diloco", "sparseloco"]
    assert ran.stdout.count("To train over this link") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--latency", "0.001"], "--latency and --bandwidth must be given together"),
        (["--latency", "0", "--bandwidth", "1e8"], "latency_s must be positive seconds, got 0"),
        (["--density", "2"], "density must be a number in (0, 1], got 2"),
        (["--step-seconds", "1", "--share", "1"], "share must be a number in"),  # before anything is measured
        (["--step-seconds", "0"], "step_seconds must be positive seconds, got 0"),
        (["--share", "0.9"], "--share needs the length of a step, got 0.9 alone"),
    ],
)
def test_a_bad_question_is_refused(arguments, message):
    ran = CliRunner(env=PLAIN).invoke(app, ["link", *arguments])
    assert ran.exit_code != 0
    assert isinstance(ran.exception, ConfigError)
    assert message in str(ran.exception)


def test_a_refusal_is_one_line(warm_python):
    ran = warm_python.run("from distopt.cli import main; main()", "link")
    assert ran.returncode == 1
    assert "measures between the ranks of a job, got one process; start it as the job is started" in ran.stderr
    assert "Traceback" not in ran.stderr

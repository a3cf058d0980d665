"""`distopt plan-code`: a trace in, a table and a configuration out."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from distopt.cli.app import app
from distopt.coding import Cluster, SequentialCode, Trace

PLAIN = {"COLUMNS": "200", "TERM": "dumb"}


def asked(path, *arguments):
    ran = CliRunner(env=PLAIN).invoke(app, ["plan-code", str(path), *map(str, arguments)])
    assert ran.exit_code == 0, ran.output
    return ran.output


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "round-times.csv"
    cluster = Cluster(workers=8, seconds_per_load=40.0, burst_probability=0.03, burst_rounds=1.0)
    cluster.trace(20, 0, load=1 / 8).save(path)
    return path


def test_a_table_a_configuration_and_the_figures(trace, tmp_path):
    said = asked(trace, "--top", 3, "--out", tmp_path)
    assert "round-times.csv: 8 workers, 20 rounds; 20 gradients, stop rule decodable" in said
    found = json.loads((tmp_path / "plan-code.json").read_text())
    assert found["trace"] == {
        "file": "round-times.csv",
        "workers": 8,
        "rounds": 20,
        "load": 0.125,
        "seconds_per_load": 40.0,
    }
    best = found["candidates"][0]
    assert f"): {json.dumps(best['config'])}" in said
    assert f"{best['ratio']:.3f}x" in said
    assert said.count("1.000x") == 1
    assert (tmp_path / "plan-code.png").stat().st_size > 10_000
    delayed = next(each for each in found["candidates"] if each["delay"])
    assert SequentialCode.for_workers(delayed["config"]["scheme"], 8).delay == delayed["delay"]


def test_only_schemes_for_one_model(trace):
    said = asked(trace, "--only-live", "--jobs", 15, "--stop", "paper")
    assert "15 gradients, stop rule paper" in said
    assert "SGC" not in said
    assert "steps old" not in said


def test_the_slope_that_is_given_decides(trace):
    dear, cheap = (asked(trace, "--only-live", "--seconds-per-load", slope) for slope in (4000, 0))
    assert "Fastest (uncoded)" in dear
    assert "Coding does not pay on this trace" in dear
    assert "Fastest (gradient code" in cheap


def test_nothing_ends(tmp_path):
    path = tmp_path / "dead.json"
    seconds = np.ones((3, 2))
    seconds[1] = np.nan
    Trace(seconds=seconds, load=0.5, seconds_per_load=1.0).save(path)
    said = asked(path)
    assert "never ends" in said
    assert "No scheme ends on this trace" in said


def test_a_trace_of_a_live_run_with_compute_times(tmp_path):
    path = tmp_path / "recorded.csv"
    seconds = Cluster(workers=4).trace(20, 0, load=0.25).seconds
    Trace(seconds=seconds, load=0.25, compute=seconds / 2).save(path)
    assert "4 workers, 20 rounds" in asked(path)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("1,2\n3\n", [], "line 2: a round must have 2 times like the first line, got 1"),
        ("1,2\n", [], "load must be known, and the trace does not say it"),
        ("1,2\n", ["--load", "0.5"], "seconds_per_load must be known to foresee other loads"),
        ("1,2\n", ["--load", "2", "--seconds-per-load", "1"], "load must be a number in [0, 1], got 2.0"),
        (None, [], "cannot be read"),
    ],
)
def test_a_bad_trace_is_one_line(warm_python, tmp_path, text, arguments, message):
    path = tmp_path / "trace.csv"
    if text is not None:
        path.write_text(text)
    ran = warm_python.run("from distopt.cli import main; main()", "plan-code", str(path), *arguments)
    assert ran.returncode == 1
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr

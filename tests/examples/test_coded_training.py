"""The example under every real launcher, with stragglers of each kind: the parameters are those of a quiet run.

The network has dropout, and rounds end whoever is slow: so this also says that nothing depends on who computed what.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import mpirun
import netns
from distopt.cli.app import app
from distopt.coding import Trace
from example_ranks import EXAMPLES, run_ranks

pytestmark = pytest.mark.job

SCRIPT = EXAMPLES / "coded_training.py"
LAUNCH = EXAMPLES.parent / "launch"
STEPS = 60  # the dead one is gone long before the report
DEADLINE_S = 240


@pytest.fixture(scope="module")
def quiet(warm_python, tmp_path_factory):
    """From a number of ranks to the parameters after a run in which nobody was made slow."""

    @functools.cache
    def train(ranks):
        path = tmp_path_factory.mktemp("quiet") / "model.pt"
        said = run_ranks(warm_python, str(SCRIPT), "--steps", str(STEPS), "--save", str(path), ranks=ranks)
        assert f"{STEPS} gradients in {STEPS} rounds" in said
        return torch.load(path)

    return train


def run(command, folder, *arguments, **settings):
    """What was printed, and the final parameters."""
    with_python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": with_python, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(LAUNCH.parent)}
    saved = folder / "model.pt"
    ran = subprocess.run(
        [*map(str, command), str(SCRIPT), "--steps", str(STEPS), "--save", str(saved), *map(str, arguments)],
        env={**environment, **settings}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        timeout=DEADLINE_S, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    return ran.stdout, torch.load(saved)


def check_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-12, name


def of_worker(output, number):
    """The line of the report on a worker."""
    return next(line for line in output.splitlines() if line.split()[:1] == [str(number)])


def test_ranks_without_a_launcher(quiet):
    """The short form of what follows, for the default suite."""
    assert {tensor.dtype for tensor in quiet(3).values()} == {torch.float64}


def test_torchrun_with_a_rotating_sleeper_leaves_a_report_a_plot_and_a_trace(tmp_path, quiet):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "5"]
    kept = ["--plot", tmp_path / "arrivals.png", "--record", tmp_path / "trace.csv"]
    output, found = run(torchrun, tmp_path, "--stragglers", "rotating:0.2", *kept)
    check_equal(found, quiet(5))
    assert f"{STEPS} gradients in {STEPS} rounds" in output
    assert "Most often slow: worker" in output
    assert "gone" not in output
    assert (tmp_path / "arrivals.png").read_bytes().startswith(b"\x89PNG")
    trace = Trace.read(tmp_path / "trace.csv")
    assert trace.seconds.shape == (STEPS, 4)
    assert trace.load == 0.5  # s + 1 of 4 parts
    planned = CliRunner().invoke(app, ["plan-code", str(tmp_path / "trace.csv")])
    assert planned.exit_code == 0, planned.output
    assert "uncoded" in planned.output


def test_torchrun_survivors_with_a_killed_worker(tmp_path, quiet):
    starter = ["bash", LAUNCH / "torchrun_survivors.sh"]
    output, found = run(starter, tmp_path, "--stragglers", "dead:3", RANKS="3")
    check_equal(found, quiet(3))
    assert "rank 2 was ended by signal 9 (KILL); the others go on without it" in output
    assert "gone: its connection is gone" in of_worker(output, 1)


@mpirun.needs_mpi
def test_mpirun_with_a_rotating_sleeper(tmp_path, quiet):
    arguments = ["--steps", STEPS, "--save", tmp_path / "model.pt", "--stragglers", "rotating:0.2"]
    job = mpirun.start(3, SCRIPT, arguments=arguments)
    output = mpirun.finish(job, DEADLINE_S)
    assert job.returncode == 0, output
    check_equal(torch.load(tmp_path / "model.pt"), quiet(3))
    assert "Most often slow: worker" in output


@mpirun.needs_mpi
def test_mpirun_starter_with_a_killed_worker(tmp_path, quiet):
    starter = ["bash", LAUNCH / "mpirun.sh"]
    output, found = run(starter, tmp_path, "--stragglers", "dead:3", RANKS="3", DEADLINE=str(DEADLINE_S))
    check_equal(found, quiet(3))
    assert "gone: its connection is gone" in of_worker(output, 1)


@pytest.mark.slow
@netns.needs_namespaces
def test_three_hosts_of_which_one_loses_its_rank(tmp_path, quiet):
    """Each host has an address and a torchrun agent of its own, and the agents end together."""
    arguments = ["--steps", STEPS, "--save", tmp_path / "model.pt", "--stragglers", "dead:3"]
    ran = netns.cluster(
        "once", "3", "1gbit", "--survivors", "--deadline", "200", "--", SCRIPT, *arguments,
        name=f"{netns.NAME}c", deadline_s=240, env={**os.environ, **netns.REAL, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "rank 2 was ended by signal 9 (KILL); the others go on without it" in ran.stderr
    assert "gone: its connection is gone" in ran.stdout
    check_equal(torch.load(tmp_path / "model.pt"), quiet(3))

"""Server and sites as real processes: the simulation's result to the bit, whatever starts them, and faults."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import network_job
import pytest
import torch
from network_job import simulated
from test_algorithm_laws import MADE

import mpirun
from example_ranks import free_port
from mpirun import needs_mpi

DEADLINE_S = 60
RANK = "from network_job import main; main()"


def environment(**changed):
    folders = [str(Path(__file__).parents[2]), str(Path(__file__).parent), str(Path(__file__).parents[1])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(folders), **changed}


class Job:
    """Ranks without an agent, which would end them all with the first one that dies."""

    def __init__(self, warm_python, out, size, **job):
        self.out, self.job = out, job
        self.warm_python = warm_python
        self.common = {
            "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.end = time.monotonic() + DEADLINE_S
        self.ranks = [self.start(rank) for rank in range(size)]

    def start(self, rank):
        return self.warm_python.start(
            RANK, json.dumps(self.job), self.out, RANK=str(rank), LOCAL_RANK=str(rank), **self.common
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for rank in self.ranks:
            rank.kill()
            rank.wait()

    def finish(self, *ranks):
        """Exit statuses of these ranks, or of all."""
        listed = ranks or range(len(self.ranks))
        try:
            return [self.ranks[rank].wait(max(0.01, self.end - time.monotonic())) for rank in listed]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not all have ended within {DEADLINE_S} s\n{self.said()}") from None

    def said(self):
        for rank in self.ranks:
            rank.kill()
        return "\n".join(f"rank {i}: {rank._written()}" for i, rank in enumerate(self.ranks))

    def found(self):
        return torch.load(self.out / "server.pt", weights_only=True)


def check_simulated(found, job):
    rows, model = simulated(job)
    assert found["rows"] == rows
    assert torch.equal(found["model"], model)


@pytest.mark.parametrize("name", ["fedau", "scaffold", "fedspeed"])
def test_gloo_ranks_are_the_simulation_to_the_bit(warm_python, tmp_path, name):
    job = {"algorithm": MADE[name].to_dict(), "rounds": 5, "chance": 0.6, "compressed": name == "scaffold"}
    with Job(warm_python, tmp_path, 4, **job) as ranks:
        assert ranks.finish() == [0] * 4, ranks.said()
        check_simulated(ranks.found(), job)


@pytest.mark.job
@pytest.mark.timeout(120)
def test_torchrun(tmp_path):
    job = {"algorithm": MADE["fedau"].to_dict(), "rounds": 5, "chance": 0.6}
    path = tmp_path / "job.py"
    path.write_text(RANK)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", str(path),
         json.dumps(job), str(tmp_path)],
        env=environment(), timeout=100, check=True,
    )  # fmt: skip
    check_simulated(torch.load(tmp_path / "server.pt", weights_only=True), job)


@pytest.mark.job
@needs_mpi
def test_mpirun(tmp_path):
    job = {"algorithm": MADE["scaffold"].to_dict(), "rounds": 5, "chance": 0.6}
    ran = mpirun.start(3, Path(network_job.__file__), arguments=(json.dumps(job), tmp_path))
    said = mpirun.finish(ran)
    assert ran.returncode == 0, said
    check_simulated(torch.load(tmp_path / "server.pt", weights_only=True), job)

"""Real processes that are killed or frozen: the others go on exactly, or end with an error that names who is missing.

All waits of the library for somebody silent are set to 1,000 s (`coded_rank.FAR_S`), far beyond the deadline here: a
rank that ends has noticed what happened, and has not run into a timeout.
"""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from coded_rank import uncoded

from example_ranks import free_port

DEADLINE_S = 90
RANK = "from coded_rank import main; main()"
WIDE = 10_000  # parameters of 640 kB, which fill a connection's buffers in a few steps
HUGE = 300_000  # of 19 MB, which do not fit into them at once
pytestmark = pytest.mark.job


class Job:
    """Ranks without an agent, which would end them all with the first one that dies."""

    def __init__(self, warm_python, out, size, steps, *, hurt, width=8, slow=(), watch=0, wait_at=-1, **config):
        self.out, self.width, self.steps = out, width, steps
        settings = {
            "out": str(out), "steps": steps, "width": width, "hurt": hurt, "slow": dict(slow), "watch": watch,
            "wait_at": wait_at, "config": config, "deadline_s": DEADLINE_S,
        }  # fmt: skip
        common = {
            "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.ranks = [
            warm_python.start(RANK, json.dumps(settings), RANK=str(rank), LOCAL_RANK=str(rank), **common)
            for rank in range(size)
        ]
        self.end = time.monotonic() + DEADLINE_S

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for rank in self.ranks:
            rank.kill()
            rank.wait()

    def until(self, condition, what):
        while not condition():
            if time.monotonic() > self.end:
                raise AssertionError(f"not within {DEADLINE_S} s: {what}\n{self.said()}")
            time.sleep(0.01)

    def until_frozen(self, rank):
        status = Path(f"/proc/{self.ranks[rank].pid}/status")
        self.until(lambda: "State:\tT" in status.read_text(), f"rank {rank} is frozen")

    def until_waiting(self):
        self.until(lambda: (self.out / "waiting").exists(), "the rank that is watched waits")

    def go(self):
        (self.out / "go").touch()

    def wake(self, rank):
        os.kill(self.ranks[rank].pid, signal.SIGCONT)

    def finish(self):
        """Exit status of each rank."""
        try:
            return [rank.wait(max(0.01, self.end - time.monotonic())) for rank in self.ranks]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not all have ended within {DEADLINE_S} s\n{self.said()}") from None

    def said(self):
        return "\n".join(
            f"--- rank {number} {'runs' if Path(f'/proc/{rank.pid}').exists() else 'has ended'}\n{self.errors(number)}"
            for number, rank in enumerate(self.ranks)
        )

    def errors(self, rank):
        return self.ranks[rank]._written()[1]

    def found(self, rank):
        return torch.load(self.out / f"{rank}.pt")

    def check_exact(self, ranks):
        expected = uncoded(self.width, self.steps)
        for rank in ranks:
            assert (self.found(rank)["parameters"] - expected).abs().max() <= 1e-12, f"rank {rank}"


def killed(size, *victims):
    """The exit status of each rank of a job that went well but for these."""
    return [-signal.SIGKILL if rank in victims else 0 for rank in range(size)]


@pytest.fixture
def job(warm_python, tmp_path):
    return lambda *arguments, **settings: Job(warm_python, tmp_path, *arguments, **settings)


def test_a_killed_worker_is_not_waited_for_and_a_frozen_one_is_used_again(job):
    """Workers 0, 2 and 4 stand in for each other: from step 35 on 0 is dead, 4 is slow and 2 is back."""
    steps, hurt = 50, {"1": ("computing", 4), "3": ("frozen", 5)}
    with job(7, steps, hurt=hurt, width=WIDE, slow={"5": 35}, wait_at=35, stragglers=2) as ranks:
        ranks.until_frozen(3)
        ranks.until_waiting()
        ranks.wake(3)
        ranks.go()
        assert ranks.finish() == killed(7, 1), ranks.said()
        ranks.check_exact([0, 2, 3, 4, 5, 6])
    master = ranks.found(0)
    stats, before = master["stats"], master["seen"]
    assert stats["gone"] == {0: "its connection is gone"}
    assert "gone: its connection is gone" in next(line for line in master["report"].splitlines() if "    0 " in line)
    assert stats["workers"][0]["in_time"] <= 4
    assert before["workers"][2]["in_time"] <= 5
    assert stats["workers"][2]["in_time"] > before["workers"][2]["in_time"] + 5
    one_round = 8 * (8 * WIDE + 1) + 1024
    assert 0 < master["pending"][3] <= 2 * one_round  # what waits for the frozen one: WINDOW


def test_a_worker_killed_while_its_answer_is_on_its_way_is_not_waited_for(job):
    with job(3, 6, hurt={"2": ("sending", 2)}, width=HUGE) as ranks:
        assert ranks.finish() == killed(3, 2), ranks.said()
        ranks.check_exact([0, 1])
    assert ranks.found(0)["stats"]["gone"] == {1: "its connection is gone"}
    assert ranks.found(0)["stats"]["refused_messages"] == 0


def test_one_more_than_s_killed_ends_all_with_their_names(job):
    with job(5, 10_000, hurt={"1": ("computing", 3), "3": ("computing", 5)}) as ranks:
        assert ranks.finish() == [1, -signal.SIGKILL, 1, -signal.SIGKILL, 1], ranks.said()
        assert "DecodeError: round 5 cannot be decoded without workers 0, 2, ranks 1, 3 (its connection is gone)" in (
            ranks.errors(0)
        )
        for survivor in (2, 4):
            assert "the master has ended the training: DecodeError: round 5 cannot" in ranks.errors(survivor)


def test_workers_end_when_the_master_is_killed_while_its_parameters_are_on_their_way(job):
    with job(4, 10_000, hurt={"0": ("sending", 3)}, width=HUGE, stragglers=2) as ranks:
        assert ranks.finish() == [-signal.SIGKILL, 1, 1, 1], ranks.said()
        for worker in (1, 2, 3):
            assert "PeerLostError: the master, rank 0, is gone" in ranks.errors(worker)


def test_sharded_a_killed_rank_is_not_waited_for_and_a_frozen_one_catches_up(job):
    steps, hurt = 50, {"0": ("computing", 4), "2": ("frozen", 5)}
    with job(6, steps, hurt=hurt, width=WIDE, watch=5, wait_at=35, stragglers=2, master="sharded") as ranks:
        ranks.until_frozen(2)
        ranks.until_waiting()
        ranks.wake(2)
        ranks.go()
        assert ranks.finish() == killed(6, 0), ranks.said()
        ranks.check_exact([1, 2, 3, 4, 5])
    stats = ranks.found(5)["stats"]
    assert stats["gone"] == {0: "its connection is gone"}
    assert stats["workers"][0]["in_time"] <= 4


def test_sharded_one_more_than_s_killed_ends_all_with_their_names(job):
    hurt = {"0": ("computing", 3), "2": ("computing", 5)}
    with job(4, 10_000, hurt=hurt, master="sharded") as ranks:
        assert ranks.finish() == [-signal.SIGKILL, 1, -signal.SIGKILL, 1], ranks.said()
        for survivor in (1, 3):
            said = ranks.errors(survivor)
            # Rank 2 dies in step 5; what it decoded in step 4 may have reached some of the others only.
            without = r"DecodeError: step [45] cannot be decoded without rank 0 \(its connection is gone\), rank 2 \("
            assert re.search(without, said), said

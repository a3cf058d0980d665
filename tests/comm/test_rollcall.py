"""The heartbeats of a real group: who starts them, and what is said where datagrams do not get through."""

import os
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distopt.comm import open_heartbeat, rollcall
from rank_pool import FORKS

CPU = torch.device("cpu")


def on_opening() -> tuple[str, list[str], dict]:
    beat, reason = open_heartbeat(dist.group.WORLD, CPU, timeout_s=100.0, on_loss=lambda error: None)
    try:
        return reason, [str(member) for member in beat._members], beat.stats()
    finally:
        beat.close()


def test_a_group_hears_itself(ranks):
    here = socket.gethostname()
    for reason, members, stats in ranks(3)(on_opening):
        assert reason == ""
        assert members == [f"rank {rank} ({here})" for rank in range(3)]
        assert stats["datagrams_received"] >= 2
        assert stats["datagrams_refused"] == 0


def on_a_firewall(deaf: int) -> tuple[bool, str]:
    """One rank drops all datagrams that it would get from rank 0, as a firewall does."""
    original = rollcall.Heartbeat
    rollcall._REACH_S = 1.0

    class Deaf(original):
        def _receive(self):
            self._endpoint.setblocking(False)
            try:
                while True:
                    self._endpoint.recv(1000)
            except BlockingIOError:
                pass

    if dist.get_rank() == deaf:
        rollcall.Heartbeat = Deaf
    try:
        beat, reason = open_heartbeat(dist.group.WORLD, CPU, timeout_s=100.0, on_loss=lambda error: None)
    finally:
        rollcall.Heartbeat, rollcall._REACH_S = original, 10.0
    return beat is None, reason


def test_where_datagrams_do_not_get_through_nobody_is_watched_and_all_know_why(ranks):
    answers = ranks(3)(on_a_firewall, 2)
    assert [off for off, _ in answers] == [True] * 3
    (reason,) = {reason for _, reason in answers}
    assert reason.startswith("rank 2 (")
    assert "gets no datagrams from rank 0 (" in reason
    assert "GLOO_SOCKET_IFNAME" in reason


def on_an_unknown_interface(rank: int) -> tuple[bool, str]:
    if dist.get_rank() == rank:
        os.environ["GLOO_SOCKET_IFNAME"] = "no-such-eth"
    try:
        beat, reason = open_heartbeat(dist.group.WORLD, CPU, timeout_s=100.0, on_loss=lambda error: None)
    finally:
        os.environ.pop("GLOO_SOCKET_IFNAME", None)
    return beat is None, reason


def test_a_socket_that_cannot_be_opened_switches_all_off(ranks):
    answers = ranks(3)(on_an_unknown_interface, 1)
    assert all(off and "cannot open a socket" in reason for off, reason in answers)


def rank_of_two(rank: int, store: str, timeout_s: float, ending: str, pipe) -> None:
    """Rank 1 ends as it is told to; rank 0 sends what it hears of that."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    told = threading.Event()
    beat, _ = open_heartbeat(dist.group.WORLD, CPU, timeout_s=timeout_s, on_loss=lambda error: told.set())
    if rank == 1:
        exec(ending)
    elif ending:
        assert told.wait(60)
        pipe.send(str(beat.error))
    else:
        end = time.monotonic() + 60
        while not beat._table.left() and beat.error is None and time.monotonic() < end:
            time.sleep(0.02)
        pipe.send((beat._table.left(), str(beat.error)))


# Processes that multiprocessing starts know no atexit, a script does: with these both ways are tested.
SCRIPT = """
import sys
sys.path.insert(0, {here!r})
from test_rollcall import *
rank_of_two(1, {store!r}, {timeout_s}, "", None)
{ending}
"""


def what_rank_0_hears(warm_python, store, timeout_s, ending, *, in_script):
    ours, theirs = FORKS.Pipe()
    ranks = [FORKS.Process(target=rank_of_two, args=(0, store, timeout_s, ending, theirs))]
    if not in_script:
        ranks.append(FORKS.Process(target=rank_of_two, args=(1, store, timeout_s, ending, theirs)))
    for process in ranks:
        process.start()
    script = None
    try:
        if in_script:
            code = SCRIPT.format(here=str(Path(__file__).parent), store=store, timeout_s=timeout_s, ending=ending)
            script = warm_python.start(code)
        assert ours.poll(60), "rank 0 heard nothing"
        return ours.recv()
    finally:
        for process in ranks + [script] * in_script:
            process.kill()
        for process in ranks:
            process.join()
        if script is not None:
            script.wait()


@pytest.mark.parametrize(
    ("ending", "timeout_s", "said"),
    [
        ("import signal; os.kill(os.getpid(), signal.SIGSTOP)", 1.0, "no heartbeat for"),
        ("import signal; os.kill(os.getpid(), signal.SIGKILL)", 1.0, "no heartbeat for"),
        ("raise ValueError('the script is wrong')", 3600.0, "it has ended with an error"),
    ],
    ids=["stopped", "killed", "failed"],
)
def test_how_a_process_ends_is_told(warm_python, tmp_path, ending, timeout_s, said):
    heard = what_rank_0_hears(warm_python, str(tmp_path / "store"), timeout_s, ending, in_script="raise" in ending)
    assert f"lost rank 1 ({socket.gethostname()}): {said}" in heard


@pytest.mark.parametrize("in_script", [False, True], ids=["multiprocessing", "script"])
def test_a_process_that_ends_well_is_not_missed(warm_python, tmp_path, in_script):
    heard = what_rank_0_hears(warm_python, str(tmp_path / "store"), 5.0, "", in_script=in_script)
    assert heard == ([1], "None")

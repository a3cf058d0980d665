"""The heartbeats of a real group: who starts them, and what is said where datagrams do not get through."""

import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist

from distopt.comm import open_heartbeat, rollcall

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
        rollcall.Heartbeat, rollcall._REACH_S = original, 5.0
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


def test_the_interface_of_gloo_comes_first_then_the_way_to_the_master(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert rollcall._own_address() == "127.0.0.1"
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.5")
    assert rollcall._own_address() == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,eth7")
    monkeypatch.setenv("MASTER_ADDR", "no.such.host.invalid")
    assert rollcall._own_address() == "127.0.0.1"


# How a rank ends: what the one that is left hears of it. Rank 1 does `{ending}` and rank 0 says what it gets.
ENDING = """
import os, signal, sys, threading, torch, torch.distributed as dist
from distopt.comm import open_heartbeat
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
told = threading.Event()
def lost(error):
    print(error, flush=True)
    told.set()
beat, _ = open_heartbeat(dist.group.WORLD, torch.device("cpu"), timeout_s=float(sys.argv[4]), on_loss=lost)
print("watching", flush=True)
if dist.get_rank() == 1:
    exec(sys.argv[3])
else:
    told.wait()
    os._exit(0)
"""


@pytest.mark.parametrize(
    ("ending", "timeout_s", "said"),
    [
        ("signal.pause()", 1.0, "no heartbeat for"),  # and is stopped from outside
        ("os.kill(os.getpid(), signal.SIGKILL)", 1.0, "no heartbeat for"),
        ("raise ValueError('the script is wrong')", 3600.0, "it ended with an error"),
    ],
    ids=["stopped", "killed", "failed"],
)
def test_how_a_process_ends_is_told(tmp_path, ending, timeout_s, said):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ENDING, str(tmp_path / "store"), str(rank), ending, str(timeout_s)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    timer = threading.Timer(60, processes[0].kill)
    timer.start()
    try:
        assert processes[0].stdout.readline() == "watching\n"
        if ending == "signal.pause()":
            assert processes[1].stdout.readline() == "watching\n"
            processes[1].send_signal(signal.SIGSTOP)
        message = processes[0].stdout.readline()
        assert f"lost rank 1 ({socket.gethostname()}): {said}" in message
    finally:
        timer.cancel()
        for process in processes:
            process.kill()
            process.wait()


def test_a_process_that_ends_well_is_not_missed(tmp_path):
    """Also one that multiprocessing started, which knows no atexit: hence both ways."""
    script = (
        "import sys, time, torch, torch.multiprocessing as mp, torch.distributed as dist\n"
        "from distopt.comm import open_heartbeat\n"
        "def work(rank, store):\n"
        "    dist.init_process_group('gloo', init_method='file://' + store, rank=rank, world_size=2)\n"
        "    beat, _ = open_heartbeat(dist.group.WORLD, torch.device('cpu'), timeout_s=0.5, on_loss=print)\n"
        "    if rank == 0:\n"
        "        while not beat._table.left() and beat.error is None: time.sleep(0.05)\n"
        "        print('left', beat._table.left(), 'lost', beat._table.lost(), flush=True)\n"
        "if __name__ == '__main__':\n"
        "    mp.spawn(work, (sys.argv[1],), nprocs=2)\n"
    )
    (tmp_path / "spawning.py").write_text(script)
    ran = subprocess.run(
        [sys.executable, str(tmp_path / "spawning.py"), str(tmp_path / "store")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "left [1] lost []" in ran.stdout, ran.stdout + ran.stderr

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from distopt.comm import GlooTransport, InProcess
from distopt.errors import ConfigError
from rank_pool import RankPool

LARGE = 1 << 26


def numbered(number, size=8):
    return torch.full((size,), number, dtype=torch.uint8)


def pattern(rank):
    return (torch.arange(LARGE) % 100 + 50 + rank).to(torch.uint8)  # messages begin with a letter


def receive_all(transport, count, timeout_s=30.0):
    """The first bytes by source, in the order of their arrival."""
    found = {}
    for _ in range(count):
        got = transport.receive(timeout_s)
        assert got is not None, f"only {found} within {timeout_s} s"
        found.setdefault(got[0], []).append(int(got[1][0]))
    return found


def everybody_sends_to_everybody():
    import torch.distributed as dist

    transport = GlooTransport(max_frame_bytes=1024)
    for number in range(20, 40):
        for rank in range(transport.size):
            transport.send(rank, numbered(number, size=number))
    found = receive_all(transport, 20 * transport.size)
    nothing = transport.receive(0.05)
    threads = {thread.name for thread in threading.enumerate()}
    transport.close(10.0)
    left = {thread.name for thread in threading.enumerate() if thread.name.startswith("distopt-")}
    total = torch.ones(1)
    dist.all_reduce(total)  # the job's own group works as before
    return found, nothing, len(threads), left, total.item()


def test_frames_arrive_in_order_also_at_oneself_and_nothing_is_left_running(ranks):
    for found, nothing, _, left, total in ranks(3)(everybody_sends_to_everybody):
        assert found == {rank: list(range(20, 40)) for rank in range(3)}
        assert nothing is None
        assert left == set()
        assert total == 3


def large_to_first():
    transport = GlooTransport(max_frame_bytes=LARGE, peers=None if torch.distributed.get_rank() == 0 else [0])
    correct = 0
    if transport.rank:
        transport.send(0, pattern(transport.rank))
    else:
        for _ in range(transport.size - 1):
            source, frame = transport.receive(30.0)
            correct += torch.equal(frame, pattern(source))
    transport.close(20.0)
    return correct


@pytest.mark.job
def test_large_frames_are_whole(ranks):
    assert ranks(3)(large_to_first)[0] == 2


def refused():
    transport = GlooTransport(max_frame_bytes=16, peers=[1 - torch.distributed.get_rank()])
    messages = []
    for destination, size in ((1 - transport.rank, 17), (5, 3)):
        with pytest.raises(ConfigError) as error:
            transport.send(destination, numbered(50, size))
        messages.append(str(error.value))
    transport.close(5.0)
    return messages


def test_a_frame_that_is_too_long_and_a_rank_that_is_none_are_refused(ranks):
    for too_long, nobody in ranks(2)(refused):
        assert "may have 16 bytes, got 17" in too_long
        assert "got 5" in nobody


def signal_when_frozen(pid, after_s, what=signal.SIGCONT):
    status = Path(f"/proc/{pid}/status")
    while status.exists() and "State:\tT" not in status.read_text():
        time.sleep(0.01)
    time.sleep(after_s)
    os.kill(pid, what)


def with_deaths(out, deadline_s):
    """Rank 1 dies while a large frame of its own is on its way, rank 2 freezes and returns."""
    transport = GlooTransport(max_frame_bytes=LARGE, peers=None if torch.distributed.get_rank() == 0 else [0])
    if transport.rank == 1:
        transport.send(0, numbered(50))
        transport.send(0, numbered(51, LARGE))
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    if transport.rank in (2, 3):
        transport.send(0, numbered(60))
        if transport.rank == 2:
            while transport.pending_bytes(0):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGSTOP)
        got = receive_all(transport, 5)
        transport.send(0, numbered(61))
        transport.close(10.0)
        (out / str(transport.rank)).write_text(json.dumps(got))
        return
    found = receive_all(transport, 3)
    for number in range(70, 75):
        transport.send(3, numbered(number))  # goes on while 2 is frozen, and after 1 has died
    for number in range(70, 75):
        transport.send(2, numbered(number))
    end = time.monotonic() + deadline_s
    while 1 not in transport.lost and time.monotonic() < end:
        transport.probe(1)
        time.sleep(0.05)
    lost = transport.lost
    transport.send(1, numbered(80))  # dropped
    last = [list(receive_all(transport, 1).items()) for _ in range(2)]
    transport.close(2.0)
    (out / "0").write_text(json.dumps([found, last, sorted(lost)]))


def test_a_death_in_the_middle_of_a_frame_and_a_freeze_do_not_stop_the_others(tmp_path):
    pool = RankPool(4)
    try:
        pool._start()
        threading.Thread(target=signal_when_frozen, args=(pool._processes[2].pid, 0.7)).start()
        with pytest.raises(AssertionError, match="rank 1 ---\nthe process died") as failure:
            pool(with_deaths, tmp_path, 20.0, deadline_s=50.0, grace_s=50.0)
        assert failure.value.args[0].count("---") == 2, failure.value
    finally:
        pool.close()
    found, last, lost = json.loads((tmp_path / "0").read_text())
    assert found == {"1": [50], "2": [60], "3": [60]}
    assert last == [[[3, [61]]], [[2, [61]]]]  # the one that was frozen comes last
    assert lost == [1]
    assert [json.loads((tmp_path / str(rank)).read_text()) for rank in (2, 3)] == [{"0": [70, 71, 72, 73, 74]}] * 2


def beside_one_that_dies_at_once(out):
    transport = GlooTransport(max_frame_bytes=16)
    if transport.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    end = time.monotonic() + 20.0
    while 1 not in transport.lost and time.monotonic() < end:
        time.sleep(0.01)
    transport.send(1, numbered(50))
    transport.close(5.0)
    (out / str(transport.rank)).write_text(str(sorted(transport.lost)))


def test_a_peer_that_is_lost_before_anything_was_sent_to_it(tmp_path):
    pool = RankPool(3)
    try:
        with pytest.raises(AssertionError, match="rank 1 ---\nthe process died") as failure:
            pool(beside_one_that_dies_at_once, tmp_path, deadline_s=50.0, grace_s=50.0)
        assert failure.value.args[0].count("---") == 2, failure.value
    finally:
        pool.close()
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 2)] == ["[1]", "[1]"]


def with_frames_both_ways(out, deadline_s, ending):
    """Rank 0 sends itself a signal in the middle of frames to all others and from them."""
    size = LARGE // 4
    transport = GlooTransport(max_frame_bytes=size, peers=None if torch.distributed.get_rank() == 0 else [0])
    others = range(1, transport.size) if transport.rank == 0 else [0]
    frame = numbered(60, size)
    heard, end = set(), time.monotonic() + deadline_s
    while 0 not in transport.lost and time.monotonic() < end:
        for other in others:
            while transport.pending_bytes(other) < 2 * size:
                transport.send(other, frame)
        if got := transport.receive(0.01):
            heard.add(got[0])
        if len(heard) == transport.size - 1:
            os.kill(os.getpid(), ending)
    (out / str(transport.rank)).write_text(json.dumps(sorted(transport.lost)))
    transport.close(1.0)


def test_a_death_with_frames_on_their_way_in_both_directions_is_noticed(tmp_path):
    pool = RankPool(4)
    try:
        pool._start()
        victim = (pool._processes[0].pid, 0.3, signal.SIGKILL)
        threading.Thread(target=signal_when_frozen, args=victim).start()
        with pytest.raises(AssertionError, match="rank 0 ---\nthe process died"):
            pool(with_frames_both_ways, tmp_path, 20.0, signal.SIGSTOP, deadline_s=50.0, grace_s=50.0)
    finally:
        pool.close()
    assert [(tmp_path / str(rank)).read_text() for rank in (1, 2, 3)] == ["[0]"] * 3


@pytest.mark.slow
def test_no_death_with_frames_on_their_way_in_both_directions_is_overlooked(tmp_path):
    """A race: with one connection, one death in 14 ends neither the send nor the receive."""
    pool = RankPool(4)
    try:
        for number in range(15):
            folder = tmp_path / str(number)
            folder.mkdir()
            with pytest.raises(AssertionError, match="rank 0 ---\nthe process died"):
                pool(with_frames_both_ways, folder, 2.5, signal.SIGKILL, deadline_s=30.0, grace_s=30.0)
            found = {path.name: path.read_text() for path in folder.iterdir()}
            assert found == dict.fromkeys("123", "[0]"), f"death {number}"
    finally:
        pool.close()


def test_in_process_ends():
    ends = InProcess.connect(3)
    ends[0].send(1, numbered(5))
    ends[2].send(1, numbered(6))
    ends[1].send(1, numbered(7))
    assert receive_all(ends[1], 3) == {0: [5], 2: [6], 1: [7]}
    assert ends[1].receive(0.01) is None
    ends[2].die()
    ends[2].send(1, numbered(8))
    assert ends[1].receive(0.01) is None
    assert ends[0].lost == {2}
    ends[0].close()
    assert ends[0].receive(None) is None

"""What holds for every transport that can be made in one process; gloo and MPI have tests of their own."""

import threading

import pytest
import torch

from distopt.comm import ReturningTransport
from distopt.errors import ConfigError
from stars import KINDS, LARGE, star, wait_until

pytestmark = pytest.mark.parametrize("kind", KINDS)


def pattern(num_bytes, seed=0):
    return torch.arange(seed, seed + 251).to(torch.uint8).repeat(num_bytes // 251 + 1)[:num_bytes]


def receive(end):
    got = end.receive(20.0)
    assert got is not None, "nothing has arrived"
    return got


def test_frames_of_every_length_arrive_whole_and_in_order_both_ways(kind):
    lengths = [0, 1, 63, 64, 65, LARGE, 2, 0, 4097]
    with star(kind, 3) as ends:
        for peer in (1, 2):
            for number, length in enumerate(lengths):
                ends[peer].send(0, pattern(length, seed=number + peer))
        arrived = {1: [], 2: []}
        for _ in range(2 * len(lengths)):
            source, frame = receive(ends[0])
            arrived[source].append(frame)
        for peer, frames in arrived.items():
            assert [frame.numel() for frame in frames] == lengths
            for number, frame in enumerate(frames):
                assert frame.dtype == torch.uint8
                assert torch.equal(frame, pattern(frame.numel(), seed=number + peer))
                ends[0].send(peer, frame)
        for peer in (1, 2):
            for number, length in enumerate(lengths):
                source, frame = receive(ends[peer])
                assert source == 0
                assert torch.equal(frame, pattern(length, seed=number + peer))
        wait_until(lambda: not any(end.pending_bytes(rank) for end in ends for rank in range(3)))
        assert all(end.receive(0.0) is None for end in ends)
        assert all(end.lost == frozenset() for end in ends)


def test_a_frame_can_be_read_as_tensors_of_any_dtype(kind):
    with star(kind, 2) as ends:
        ends[0].send(1, torch.arange(100, dtype=torch.float64).view(torch.uint8))
        assert receive(ends[1])[1].view(torch.float64).tolist() == list(range(100))


def test_any_thread_may_send_and_receive(kind):
    threads, each = 4, 50
    with star(kind, 2) as ends:

        def send_from(thread):
            for number in range(each):
                ends[1].send(0, torch.tensor([thread, number], dtype=torch.uint8))

        found = []

        def receive_half():
            found.extend(receive(ends[0])[1].tolist() for _ in range(threads * each // 2))

        workers = [threading.Thread(target=send_from, args=(thread,)) for thread in range(threads)]
        workers += [threading.Thread(target=receive_half) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(30)
        assert sorted(found) == [[thread, number] for thread in range(threads) for number in range(each)]


def test_a_rank_reaches_itself(kind):
    with star(kind, 2) as ends:
        for end in ends:
            end.send(end.rank, pattern(10))
            source, frame = receive(end)
            assert source == end.rank
            assert torch.equal(frame, pattern(10))


def test_there_are_no_other_ranks(kind):
    with star(kind, 2) as ends:
        for end in ends:
            for nobody in (-1, 2, 100):
                with pytest.raises(ConfigError, match=f"got (destination )?{nobody}"):
                    end.send(nobody, pattern(1))


def test_what_is_no_frame_is_refused_in_the_call(kind):
    if kind == "in process":
        pytest.skip("objects stay what they are")
    with star(kind, 2) as ends:
        for wrong in (torch.zeros(4), torch.zeros(2, 2, dtype=torch.uint8), pattern(8)[::2], pattern(LARGE + 65)):
            if kind != "sealed in process" or wrong.numel() < LARGE:
                with pytest.raises(ConfigError, match="a frame m"):
                    ends[1].send(0, wrong)


def test_probes_are_never_delivered(kind):
    with star(kind, 2) as ends:
        for end in ends:
            end.probe(1 - end.rank)
            end.probe(7)
        ends[0].send(1, pattern(1))
        assert receive(ends[1])[1].tolist() == pattern(1).tolist()
        assert ends[0].receive(0.05) is None


def test_closing_lets_others_take_what_is_queued_and_wakes_who_waits(kind):
    with star(kind, 2) as ends:
        ends[0].send(1, pattern(1))  # a conversation has begun
        receive(ends[1])
        woken = threading.Event()

        def wait():
            while ends[1].receive(None) is not None:
                pass
            woken.set()

        waiting = threading.Thread(target=wait)
        waiting.start()
        ends[1].send(0, pattern(LARGE))
        ends[1].send(0, pattern(3))
        assert not ends[1].closed
        ends[1].close(20.0)
        ends[1].close(20.0)
        assert ends[1].closed
        assert woken.wait(20.0)
        waiting.join(20.0)
        assert receive(ends[0])[1].numel() == LARGE
        assert receive(ends[0])[1].numel() == 3
        assert ends[1].receive(0.0) is None
        if kind != "in process":
            ends[1].send(0, pattern(1))
            assert ends[0].receive(0.05) is None
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("distopt-")]


def test_connections_are_counted_where_ranks_may_come_back(kind):
    with star(kind, 3) as ends:
        if kind == "in process":
            assert not isinstance(ends[0], ReturningTransport)
            return
        assert isinstance(ends[0], ReturningTransport)
        assert [ends[0].connections(rank) for rank in (1, 2)] == [1, 1]
        assert ends[1].connections(0) == 1

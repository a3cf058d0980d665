"""Heartbeats of several ranks in one process, over real sockets on loopback."""

import logging
import random
import socket
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.comm import heartbeat as heartbeats
from distopt.comm.beats import NONCE_BYTES, Datagram, decode, encode
from distopt.comm.heartbeat import Heartbeat, Member

NONCE = bytes(range(NONCE_BYTES))
DEADLINE_S = 120.0


class Group:
    """`num_ranks` heartbeats; closed at the end, and their errors collected."""

    def __init__(self, num_ranks, timeout_s=1.0, endpoints=None):
        self.endpoints = [bound() for _ in range(num_ranks)]
        self.members = [Member(r, f"host{r + 1}", *e.getsockname()) for r, e in enumerate(self.endpoints)]
        self.errors = {}
        self.told = [threading.Event() for _ in range(num_ranks)]
        self.beats = [self._start(rank, timeout_s) for rank in range(num_ranks)]
        assert [beat.wait_for_all(DEADLINE_S) for beat in self.beats] == [[]] * num_ranks
        for beat in self.beats:
            beat.watch()

    def _start(self, rank, timeout_s):
        def lost(error):
            self.errors[rank] = error
            self.told[rank].set()

        return Heartbeat(rank, self.members, NONCE, self.endpoints[rank], timeout_s=timeout_s, on_loss=lost)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for beat in self.beats:
            beat.close()


def bound():
    endpoint = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    endpoint.bind(("127.0.0.1", 0))
    return endpoint


def silence(beat):
    """What a stopped process does: its socket is open and nothing comes out. Waits until the thread has ended."""
    beat._send = lambda to: None
    beat.close()


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_everybody_who_is_left_names_the_silent_rank(num_ranks):
    with Group(num_ranks) as group:
        silence(group.beats[1])
        left = [rank for rank in range(num_ranks) if rank != 1]
        assert all(group.told[rank].wait(DEADLINE_S) for rank in left)
        assert {rank: error.ranks for rank, error in group.errors.items()} == dict.fromkeys(left, (1,))
        assert all("lost rank 1 (host2): " in str(error) for error in group.errors.values())
        assert all("start all ranks again from the last checkpoint" in str(error) for error in group.errors.values())
        cut_off = "perhaps it is host1 that is cut off"
        assert (cut_off in str(group.errors[0])) == (num_ranks == 2)
        assert group.beats[0].stats()["lost_ranks"] == [1]


def test_ranks_that_fall_silent_together_are_named_together():
    with Group(4, timeout_s=2.0) as group:
        silence(group.beats[1])
        time.sleep(0.2)  # two beats, as processes of one host go down
        silence(group.beats[3])
        assert group.told[0].wait(DEADLINE_S)
        assert group.told[2].wait(DEADLINE_S)
        assert {rank: error.ranks for rank, error in group.errors.items()} == {0: (1, 3), 2: (1, 3)}


def test_who_says_goodbye_is_not_missed():
    with Group(3, timeout_s=0.5) as group:
        group.beats[1].close()
        time.sleep(1.5)  # three timeouts
        assert not group.errors
        assert group.beats[0].error is None


def test_who_ends_with_an_error_is_lost_at_once_and_says_so():
    with Group(3, timeout_s=3600.0) as group:
        group.beats[1].close(failed=True)
        assert all(group.told[rank].wait(DEADLINE_S) for rank in (0, 2))
        assert all("rank 1 (host2): " in str(error) for error in group.errors.values())
        assert any("it has ended with an error" in str(error) for error in group.errors.values())


def test_a_verdict_spreads_to_who_has_not_seen_it_and_to_whom_it_is_about():
    with Group(3, timeout_s=3600.0) as group:
        with group.beats[0]._moved:
            group.beats[0]._table.declare_lost([2])
        assert all(told.wait(DEADLINE_S) for told in group.told)
        assert group.errors[0].ranks == group.errors[1].ranks == (2,)
        assert "rank 3 (" not in str(group.errors[2])
        assert "it has not heard of this rank, rank 2 (host3), and gave it up" in str(group.errors[2])


def test_nobody_is_accused_for_the_time_in_which_this_thread_did_not_run(monkeypatch):
    """The clock that counts is one of listening: a jump of a minute between two turns is no silence of the others."""
    offset = 0.0
    real = time.monotonic
    monkeypatch.setattr(heartbeats.time, "monotonic", lambda: real() + offset)
    with Group(2, timeout_s=1.0) as group:
        time.sleep(0.2)
        offset = 60.0
        time.sleep(0.5)
        assert not group.errors
        assert group.beats[0].stats()["stalled_s"] > 50


def test_after_a_collective_failed_a_few_beats_tell_who_went():
    with Group(3, timeout_s=6.0) as group:  # six beats are 1.8 s
        silence(group.beats[2])
        error = group.beats[0].wait_for_verdict()
        assert error is not None
        assert error.ranks == (2,)
        assert "after a collective failed" in str(error)


def test_after_a_collective_failed_who_has_left_is_named():
    with Group(2, timeout_s=2.0) as group:
        group.beats[1].close()
        error = group.beats[0].wait_for_verdict()
        assert error is not None
        assert "lost rank 1 (host2): it has ended or detached" in str(error)


def test_where_all_are_alive_there_is_no_verdict():
    with Group(3, timeout_s=2.0) as group:
        assert group.beats[0].wait_for_verdict() is None
        assert not group.errors


@settings(max_examples=25, deadline=None)
@given(st.lists(st.binary(max_size=100) | st.just(encode(Datagram(1, (9, 9)), bytes(NONCE_BYTES))), max_size=30))
def test_datagrams_of_strangers_are_counted_and_change_nothing(strange):
    endpoints = [bound(), bound()]
    members = [Member(r, "here", *e.getsockname()) for r, e in enumerate(endpoints)]
    beat = Heartbeat(0, members, NONCE, endpoints[0], timeout_s=100.0, on_loss=pytest.fail)
    try:
        before = beat._table.datagram().counters[1]
        for data in strange:
            endpoints[1].sendto(data, endpoints[0].getsockname())
        endpoints[1].sendto(encode(Datagram(1, (0, 5)), NONCE), endpoints[0].getsockname())
        assert beat.wait_for_all(DEADLINE_S) == []  # the last datagram has arrived, so the others have
        stats = beat.stats()
        assert (stats["datagrams_refused"], stats["datagrams_received"]) == (len(strange), 1)
        assert (before, beat._table.datagram().counters[1]) == (0, 5)
    finally:
        beat.close()
        endpoints[1].close()


def test_what_is_sent_carries_the_nonce_and_goes_to_the_ranks_1_2_4_further_on():
    endpoints = [bound() for _ in range(6)]
    members = [Member(r, "here", *e.getsockname()) for r, e in enumerate(endpoints)]
    beat = Heartbeat(0, members, NONCE, endpoints[0], timeout_s=100.0, on_loss=pytest.fail)
    try:
        for listener in (1, 2, 4):
            endpoints[listener].settimeout(DEADLINE_S)
            assert decode(endpoints[listener].recv(1000), NONCE, 6).sender == 0
    finally:
        beat.close()
        for endpoint in endpoints[1:]:
            endpoint.close()


def test_the_random_numbers_of_the_user_are_left_alone():
    random.seed(1)
    expected = random.random()
    random.seed(1)
    with Group(3):
        time.sleep(0.2)
    assert random.random() == expected


def test_closing_ends_thread_and_socket_and_may_be_done_twice():
    with Group(2) as group:
        beat = group.beats[0]
        beat.close()
        beat.close()
        assert not beat._thread.is_alive()
        assert beat._endpoint.fileno() == -1
        assert beat.stats()["datagrams_received"] > 0


def test_a_thread_that_breaks_says_so(monkeypatch, caplog):
    with Group(2, timeout_s=3600.0) as group, caplog.at_level(logging.ERROR, "distopt"):
        monkeypatch.setattr(heartbeats, "encode", None)
        group.beats[0]._thread.join(DEADLINE_S)
        assert "lost peers are not noticed any more" in caplog.text

"""A rank that leaves with an error of its own is a straggler for ever, at once; so is one whose death is hard to see.

No wait of the library ends within these tests by itself: the deadline of a round is far away.
"""

import threading
import time

import pytest
from coded_job import Rank, build, by_samples, finish, parameters, start, uncoded

from distopt.coding import Batches
from distopt.comm import InProcess
from distopt.errors import DecodeError, PeerLostError

FAR_S = 1000.0
STEPS = 12


def leave(*leavers):
    def before(rank, step):
        if rank.end.rank in leavers and step >= 3:
            raise OSError("the disk is full")

    return before


@pytest.mark.parametrize("config", [{"size": 5}, {"size": 4, "master": "sharded"}], ids=["first", "sharded"])
def test_a_rank_that_leaves_is_not_waited_for(config):
    ranks = finish(start(steps=STEPS, before=leave(1), deadline_s=FAR_S, **config))
    expected = uncoded([build()], STEPS)[0]
    for rank in ranks:
        if rank.end.rank == 1:
            assert isinstance(rank.error, OSError)
        else:
            assert rank.error is None
            assert (parameters(rank.models[0]) - expected).abs().max() <= 1e-12
    gone = ranks[0].stats["gone"]
    assert gone == {0 if config["size"] == 5 else 1: "OSError: the disk is full"}
    assert "gone: OSError: the disk is full" in ranks[0].report


def test_one_more_than_s_that_leave_end_the_job():
    ranks = finish(start(5, STEPS, before=leave(1, 3), deadline_s=FAR_S))
    assert isinstance(ranks[0].error, DecodeError)
    assert "without workers 0, 2, ranks 1, 3 (OSError: the disk is full)" in str(ranks[0].error)
    for worker in (2, 4):
        assert "the master has ended the training: DecodeError" in str(ranks[worker].error)


def test_one_more_than_s_that_leave_end_a_sharded_job():
    ranks = finish(start(4, STEPS, before=leave(0, 2), deadline_s=FAR_S, master="sharded"))
    for survivor in (1, 3):
        assert isinstance(ranks[survivor].error, DecodeError)
        assert "without rank 0 (OSError: the disk is full), rank 2 (OSError: the disk is full); " in str(
            ranks[survivor].error
        )


class Unnoticed(InProcess):
    """An end that finds a rank lost only after it has sent a probe, as a receive in the middle of a frame does."""

    probed: frozenset[int] = frozenset()

    @property
    def lost(self):
        return super().lost & self.probed

    def probe(self, destination):
        self.probed |= {destination}


def begin(size, steps, before):
    ranks = [Rank(end, [build()]) for end in Unnoticed.connect(size)]
    for rank in ranks:
        arguments = ({"deadline_s": FAR_S}, steps, Batches(120, 40), by_samples, before, None, 1)
        rank.thread = threading.Thread(target=rank.run, args=arguments, daemon=True)
        rank.thread.start()
    return ranks


class Died(Exception):
    """Ends the thread of a rank that is dead already."""


def die(victim):
    def before(rank, step):
        if rank.end.rank == victim and step == 3:
            rank.end.die()
            raise Died
        if rank.end.rank == 0 and step == 100:
            time.sleep(1.1)  # between two probes

    return before


def test_a_death_that_no_receive_notices_is_found_while_the_others_go_on():
    """The rounds end quickly without the dead worker, so the master never waits for it."""
    ranks = finish(begin(3, 150, die(2)))
    assert isinstance(ranks[2].error, Died)
    assert ranks[0].stats["gone"] == {1: "its connection is gone"}


def test_a_master_whose_death_no_receive_notices_is_found():
    ranks = finish(begin(3, STEPS, die(0)))
    for worker in (1, 2):
        assert isinstance(ranks[worker].error, PeerLostError)
        assert ranks[worker].error.ranks == (0,)

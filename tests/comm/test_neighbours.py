import os
import subprocess
import time

from distopt.comm import neighbours
from distopt.comm.neighbours import Neighbours


def card(process, *, machine=None, namespace=None):
    own_machine, own_namespace, _ = neighbours._CARD.unpack(Neighbours.own_card())
    return neighbours._CARD.pack(machine or own_machine, namespace or own_namespace, process)


def test_a_process_that_ends_is_noticed_and_others_are_not_accused():
    sleepers = [subprocess.Popen(["sleep", "60"]) for _ in range(3)]
    cards = {rank: card(sleeper.pid) for rank, sleeper in enumerate(sleepers)}
    with Neighbours(cards) as watched:
        assert watched.ended() == frozenset()
        sleepers[1].kill()  # not waited for: a zombie has ended too
        end = time.monotonic() + 10
        while not watched.ended() and time.monotonic() < end:
            time.sleep(0.01)
        assert watched.ended() == {1}
        sleepers[1].wait()
        assert watched.ended() == {1}  # also when its number is free again
    for sleeper in sleepers:
        sleeper.kill()
        sleeper.wait()


def test_a_process_that_is_gone_already_has_ended():
    gone = subprocess.Popen(["true"])
    gone.wait()
    with Neighbours({4: card(gone.pid), 5: Neighbours.own_card()}) as watched:
        assert watched.ended() == {4}


def test_processes_elsewhere_are_not_looked_for():
    gone = subprocess.Popen(["true"])
    gone.wait()
    elsewhere = {
        0: card(gone.pid, machine=b"another-boot"),
        1: card(gone.pid, namespace=1),
        2: bytes(Neighbours.CARD_BYTES),
    }
    with Neighbours(elsewhere) as watched:
        assert watched.ended() == frozenset()


def test_closing_gives_the_descriptors_back():
    before = len(os.listdir("/proc/self/fd"))
    Neighbours({0: Neighbours.own_card()}).close()
    assert len(os.listdir("/proc/self/fd")) == before

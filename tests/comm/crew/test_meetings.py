"""Boards and meetings of several ranks in one process, without models."""

import contextlib
import socket
import threading
import time

import pytest
import torch

from distopt.comm.crew import board as boards
from distopt.comm.crew import group as groups
from distopt.comm.crew.assembly import Assembly, VoidError
from distopt.comm.crew.board import Board, GoneError, UnreachableError, ask, ask_all
from distopt.comm.crew.interruption import SilentError
from distopt.comm.crew.staging import Staging
from distopt.errors import PeerLostError
from distopt.gossip import Complete
from distopt.gossip.ranks.rank_mixer import RankMixer

SECRET, OTHER = b"a secret of a test, and long enough", b"another one, which is as long as it"


@pytest.fixture
def board():
    made = Board("127.0.0.1", SECRET, lambda question, line: {"said": question})
    yield made
    made.close()


def test_a_board_answers_who_has_the_secret_and_nobody_else(board):
    assert ask(board.address, {"a": [1, "b"]}, SECRET) == {"said": {"a": [1, "b"]}}
    for wrong in (OTHER, None):
        with pytest.raises(UnreachableError):
            ask(board.address, {}, wrong)


@pytest.mark.parametrize("garbage", [b"", b"\0" * 200, b"\xff" * 200, b"GET / HTTP/1.0\r\n\r\n" * 10])
def test_garbage_ends_its_connection_and_nothing_else(board, garbage):
    with socket.create_connection(board.address, timeout=30) as connection:
        connection.sendall(garbage)
        with contextlib.suppress(OSError):  # it may have ended before
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1000):  # its nonce, then the end
                pass
    assert ask(board.address, 1, SECRET) == {"said": 1}


def test_what_is_too_long_is_refused(board, monkeypatch):
    question = "x" * 2000
    assert ask(board.address, question, SECRET) == {"said": question}
    monkeypatch.setattr(boards, "_MAX_BYTES", 1000)
    with pytest.raises(UnreachableError):
        ask(board.address, question, SECRET)


def test_who_has_ended_is_gone_and_who_does_not_answer_is_not(board):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        places = {0: tuple(board.address), 1: silent.getsockname()}
        ended = Board("127.0.0.1", None, lambda question, line: None)
        ended.close()
        places[2] = tuple(ended.address)
        said = ask_all(places, 0, SECRET, within_s=1.0)
    assert said[0] == {"said": 0}
    assert isinstance(said[1], UnreachableError)
    assert isinstance(said[2], GoneError)


class Ranks:
    """Assemblies of one job; each meets in a thread of its own."""

    def __init__(self, size, *, grace_s=0.4):
        self.settings = {"facts": {"model": 1}, "patience_s": 60.0, "grace_s": grace_s}
        self.all = {n: Assembly(n, "127.0.0.1", job="job", **self.settings) for n in range(size)}
        self.rounds = dict.fromkeys(range(size), 0)
        for each in self.all.values():
            each.begin({n: other.address for n, other in self.all.items()})

    def join(self, through):
        host, port = self.all[through].address
        made = Assembly.to_join(
            f"{host}:{port}", "127.0.0.1", **{"facts": {"model": 1}, "patience_s": 60.0, "grace_s": 1.0}
        )
        key = -1 - sum(number < 0 for number in self.all)
        self.all[key], self.rounds[key] = made, 0
        return key

    def meet(self, *numbers, **options):
        """The crews that these have found, by number."""
        crews, failures = {}, []

        def one(number):
            try:
                crews[number] = self.all[number].meet(self.rounds[number], new=number < 0, **options)
                self.all[number].settle(crews[number])
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=one, args=(number,)) for number in numbers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60.0)
            assert not thread.is_alive()
        assert not failures
        return crews

    def close(self):
        for each in self.all.values():
            each.close(farewell=False)


@pytest.fixture
def ranks(request):
    made = Ranks(*getattr(request, "param", (3,)))
    yield made
    made.close()


def test_ranks_meet_and_go_on_without_one_that_has_ended(ranks):
    crews = ranks.meet(0, 1, 2)
    assert {crew.members for crew in crews.values()} == {(0, 1, 2)}
    ranks.rounds.update({1: 8, 2: 7})
    ranks.all[0].close(farewell=False)
    crews = ranks.meet(1, 2)
    assert [(crew.lead, crew.members, crew.left) for crew in crews.values()] == [(1, (1, 2), ())] * 2
    assert {crew.round for crew in crews.values()} == {8}
    assert {number: crew.behind for number, crew in crews.items()} == {1: 0, 2: 1}


def test_who_has_left_is_known_to_have_also_when_the_lead_dies_after_it(ranks):
    ranks.meet(0, 1, 2)
    ranks.all[1].close()
    ranks.all[0].close(farewell=False)
    (crew,) = ranks.meet(2).values()
    assert crew.members == (2,)
    assert crew.left == (1,)


def test_a_meeting_calls_who_is_missing_and_waits_for_it(ranks):
    ranks.meet(0, 1, 2)
    found = {}
    one = threading.Thread(target=lambda: found.update(ranks.meet(2)))
    one.start()
    for number in (0, 1):
        assert ranks.all[number].await_call(60.0)
    time.sleep(1.2)  # longer than ranks are waited for that do not answer
    assert not found
    found.update(ranks.meet(0, 1))
    one.join(60.0)
    assert {crew.members for crew in found.values()} == {(0, 1, 2)}
    assert not any(each.called for each in ranks.all.values())


def test_who_is_accused_of_silence_is_not_waited_for_long(ranks):
    ranks.meet(0, 1, 2)
    crews = ranks.meet(0, 2, silent=[1])
    assert {crew.members for crew in crews.values()} == {(0, 2)}


def test_ranks_that_come_late_get_numbers_that_nobody_has(ranks):
    ranks.meet(0, 1, 2)
    late = ranks.join(through=1), ranks.join(through=2)
    crews = ranks.meet(0, 1, 2, *late)
    assert {crew.members for crew in crews.values()} == {(0, 1, 2, 3, 4)}
    assert {crew.new for crew in crews.values()} == {(3, 4)}
    assert {ranks.all[each].number for each in late} == {3, 4}


def test_members_tell_each_other_the_largest_of_their_values(ranks):
    crews = ranks.meet(0, 1, 2)
    found = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: ranks.all[n].largest(crews[n], "round", 2.5 * n)}))
        for n in crews
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert found == {0: 5.0, 1: 5.0, 2: 5.0}


def test_a_post_that_makes_no_sense_does_not_keep_others_from_meeting(ranks):
    for post in ({}, {"number": 1}, {"number": "x", "address": 3, "members": None}):
        with pytest.raises(UnreachableError):
            ask(ranks.all[0].address, {"kind": "post", "job": "job", **post}, None)
    crews = ranks.meet(0, 1, 2)
    assert {crew.members for crew in crews.values()} == {(0, 1, 2)}


@pytest.mark.parametrize("ranks", [(2,)], indirect=True)
def test_an_exchange_waits_for_as_long_as_it_may_and_not_only_as_for_connections(ranks, monkeypatch):
    monkeypatch.setattr(groups, "_FORM_S", 0.5)
    crews = ranks.meet(0, 1)
    mixers = [RankMixer(crews[n].group, n, Complete().graph(2), 0, Staging(), 60.0) for n in (0, 1)]
    found = {}
    one = threading.Thread(target=lambda: found.update({0: mixers[0].mix(torch.zeros(1, 3))[0]}))
    one.start()
    time.sleep(1.0)
    found[1] = mixers[1].mix(torch.ones(1, 3))[0]
    one.join(60.0)
    assert found[0].tolist() == found[1].tolist() == [[0.5, 0.5, 0.5]]
    with pytest.raises(SilentError):
        RankMixer(crews[0].group, 0, Complete().graph(2), 1, Staging(), 0.1).mix(torch.zeros(1, 3))


def asked(ranks, crews, value=float):
    """What members hear who ask for the largest of their values at the same time."""
    found = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: ranks.all[n].largest(crews[n], "round", value(n))}))
        for n in crews
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    return found


@pytest.mark.parametrize("ranks", [(2,)], indirect=True)
def test_who_asks_again_because_others_come_late_hears_the_same_as_they(ranks):
    crews = ranks.meet(0, 1)
    ranks.all[0]._patience_s = 0.1
    with pytest.raises(VoidError):
        ranks.all[0].largest(crews[0], "round", 0.0)
    ranks.all[0]._patience_s = 30.0
    assert asked(ranks, crews) == {0: 1.0, 1: 1.0}
    assert asked(ranks, crews, lambda n: 7.0 - n) == {0: 7.0, 1: 7.0}


@pytest.mark.parametrize("ranks", [(1,)], indirect=True)
def test_a_board_does_not_keep_what_nobody_asks_for_any_more(ranks):
    (crew,) = ranks.meet(0).values()
    kept = ranks.all[0]._meetings._past[crew.window].values
    lengths = []
    for _ in range(6):
        ranks.all[0].largest(crew, "round", 1.0)
        lengths.append(len(kept))
    assert lengths[-1] == lengths[1]
    told = ranks.all[0]._meetings._get(crew.window, ["round/6/0"], 1.0, None)
    assert told == {"values": {"round/6/0": 1.0}}  # without what gloo has laid down there


def test_a_rank_that_hears_another_not_says_where_it_should_be(ranks):
    for each in ranks.all.values():
        each.greet()
    ranks.all[0].close(farewell=False)
    ranks.all[2].close(farewell=False)
    host, port = ranks.all[0].address
    with pytest.raises(PeerLostError, match=rf"rank 1 must reach rank 0 at {host}:{port}, .*interface=.*JOB_SECRET"):
        ranks.all[1].greet()

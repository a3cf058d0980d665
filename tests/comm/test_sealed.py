import itertools
import threading

import pytest
import torch

from distopt.comm import GlooTransport, InProcess, Sealed
from distopt.comm.session import HEADER_BYTES, Header, seal
from distopt.errors import ConfigError
from meddler import flipped
from stars import SECRET, close, peer_of, tcp, wait_until

OTHER_SECRET = b"the secret of another job altogether"
FRAME, ASK, OFFER, CONFIRM, STALE = range(1, 6)


class Wire(InProcess):
    """The end of a transport on which a man in the middle sits: he sees, and says, what he likes."""

    seen: "list[tuple[int, int, bytes]]"

    def meddle(self, destination, data):
        """What goes on instead."""
        return [data]

    def send(self, destination, frame):
        data = frame.numpy().tobytes()
        self.seen.append((self.rank, destination, data))
        for words in self.meddle(destination, data):
            self.say(destination, words)

    def say(self, destination, words):
        super().send(destination, torch.frombuffer(bytearray(words), dtype=torch.uint8) if words else torch.empty(0))


def wires(size=2):
    ends = Wire.connect(size)
    seen = []
    for end in ends:
        end.seen = seen
    return ends


def kind(data):
    return data[4]


def frame(*values):
    return torch.tensor(values, dtype=torch.uint8)


def receive(end):
    got = end.receive(20.0)
    assert got is not None, "nothing has arrived"
    return got[0], got[1].tolist()


@pytest.fixture
def made():
    """Ends that are closed after the test."""
    ends = []
    yield ends
    close(ends, 0.0)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("distopt-")]


def sealed(made, wire, secret=SECRET):
    made.append(Sealed(wire, secret))
    return made[-1]


@pytest.fixture
def pair(made):
    """Two ends that have talked both ways, and their wires."""
    wire = wires()
    ends = [sealed(made, end) for end in wire]
    talk(*ends)
    return ends, wire


def talk(left, right, value=0):
    left.send(right.rank, frame(value, 1))
    assert receive(right) == (left.rank, [value, 1])
    right.send(left.rank, frame(value, 2))
    assert receive(left) == (right.rank, [value, 2])


def is_silent(*ends):
    return all(end.receive(0.15) is None for end in ends)


def count_of(end):
    return sum(end.refused.values())


# -- form ------------------------------------------------------------------------------------------------------------


def test_a_record_is_64_bytes_longer_than_its_frame(pair):
    ends, wire = pair
    ends[0].send(1, torch.zeros(1000, dtype=torch.uint8))
    assert ends[1].receive(20.0)[1].numel() == 1000
    assert len(wire[0].seen[-1][2]) == 1000 + Sealed.OVERHEAD_BYTES
    assert Sealed.OVERHEAD_BYTES % 64 == 0


def test_a_session_takes_three_records_and_each_direction_has_its_own(made):
    wire = wires()
    ends = [sealed(made, end) for end in wire]
    ends[0].send(1, frame(1))
    receive(ends[1])
    assert [(source, kind(data)) for source, _, data in wire[0].seen] == [
        (0, ASK),
        (1, OFFER),
        (0, CONFIRM),
        (0, FRAME),
    ]
    ends[1].send(0, frame(1))
    receive(ends[0])
    assert ends[0]._peers[1].outgoing.id != ends[0]._peers[1].incoming.id
    assert ends[0]._peers[1].outgoing.id == ends[1]._peers[0].incoming.id


def test_equal_frames_look_different_each_time(pair):
    ends, wire = pair
    for _ in range(2):
        ends[0].send(1, frame(7))
        receive(ends[1])
    first, second = (data for source, _, data in wire[0].seen[-2:] if source == 0)
    assert first != second


def test_both_ends_contribute_to_a_session(monkeypatch, made):
    """A session whose one end always says the same nonce is another one all the same."""
    import distopt.comm.sealed as module

    real, frozen = module.os.urandom, {"distopt-sealed": False, "MainThread": False}
    monkeypatch.setattr(
        module.os,
        "urandom",
        lambda count: bytes(count) if frozen[threading.current_thread().name] else real(count),
    )
    for constant in frozen:  # the sender draws in the main thread, the receiver in its own
        found = set()
        frozen.update(dict.fromkeys(frozen, False), **{constant: True})
        for _ in range(2):
            ends = [sealed(made, end) for end in wires()]
            ends[0].send(1, frame(1))
            receive(ends[1])
            found.add(ends[0]._peers[1].outgoing.id)
        assert len(found) == 2


def test_a_transport_whose_frames_are_too_short_is_refused_and_long_frames_in_the_call(made):
    end = InProcess.connect(2)[0]
    end.max_frame_bytes = 127
    with pytest.raises(ConfigError, match=r"at least 128, got 127; add Sealed\.OVERHEAD_BYTES"):
        Sealed(end, SECRET)
    end.max_frame_bytes = 200
    made.append(Sealed(end, SECRET))
    with pytest.raises(ConfigError, match="may have 0 to 136 bytes, got 137"):
        made[0].send(1, torch.zeros(137, dtype=torch.uint8))


@pytest.mark.parametrize("secret", [b"", b"0123456789abcde", "text", None])
def test_what_is_no_secret_is_refused(secret):
    with pytest.raises(ConfigError, match="a job secret must"):
        Sealed(InProcess.connect(2)[0], secret)


def over_gloo():
    transport = Sealed(GlooTransport(max_frame_bytes=1 << 20), SECRET)
    for rank in range(transport.size):
        for number in range(20):
            transport.send(rank, torch.full((10 + number,), number, dtype=torch.uint8))
    found = {}
    for _ in range(20 * transport.size):
        source, got = transport.receive(30.0)
        found.setdefault(source, []).append(got.tolist())
    transport.close(10.0)
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("distopt-")]
    return found, dict(transport.refused), left


def test_gloo_ranks_talk_sealed_and_close_well(ranks):
    expected = {rank: [[number] * (10 + number) for number in range(20)] for rank in range(3)}
    assert ranks(3)(over_gloo) == [(expected, {}, [])] * 3


def test_who_never_answers_leaves_the_transport_time_for_its_own_end(made, monkeypatch):
    wire = wires()
    end = sealed(made, wire[0])
    end.send(1, frame(1))
    given = []
    real = wire[0].close
    monkeypatch.setattr(wire[0], "close", lambda timeout_s: given.append(timeout_s) or real(timeout_s))
    end.close(1.0)
    assert given[0] > 0.1


# -- who does not belong ---------------------------------------------------------------------------------------------


def test_another_secret_is_no_secret(made):
    wire = wires()
    ends = [sealed(made, wire[0]), sealed(made, wire[1], OTHER_SECRET)]
    for end in ends:
        end.send(1 - end.rank, frame(1))
    wait_until(lambda: all(end.refused["unauthenticated"] for end in ends))
    assert is_silent(*ends)
    assert {kind(data) for _, _, data in wire[0].seen} == {ASK}
    assert all(end.pending_bytes(1 - end.rank) == 1 for end in ends)


def test_frames_that_are_not_sealed_are_dropped_and_counted(pair):
    ends, wire = pair
    told = [b"", b"x", b"\x80\x02}.", b"DREC", bytes(64), bytes(1000), b"DREC" + b"\xff" * 60]
    for words in told:
        wire[0].say(1, words)
    wait_until(lambda: count_of(ends[1]) == len(told))
    assert set(ends[1].refused) == {"garbage", "too long"}
    assert is_silent(ends[1])
    talk(*ends)


@pytest.mark.parametrize("at", range(HEADER_BYTES + 2))
def test_one_changed_bit_is_enough_for_a_frame_and_the_next_one_is_good(at, pair):
    ends, wire = pair
    wire[0].meddle = lambda destination, data: [flipped(data, at, bit=at % 8)]
    ends[0].send(1, frame(5, 6))
    wait_until(lambda: count_of(ends[1]) == 1)
    del wire[0].meddle
    ends[0].send(1, frame(7))
    assert receive(ends[1]) == (0, [7])


@pytest.mark.parametrize("which", [ASK, OFFER, CONFIRM])
@pytest.mark.parametrize("at", [4, 8, 16, 24, 32, 63, 64, 95])
def test_a_session_begins_in_spite_of_a_changed_bit(which, at, made):
    wire = wires()
    changed = []

    def meddle(destination, data):
        if kind(data) == which and not changed:
            changed.append(data)
            return [flipped(data, at)]
        return [data]

    for end in wire:
        end.meddle = meddle
    ends = [sealed(made, end) for end in wire]
    ends[0].send(1, frame(1))
    if which == CONFIRM:  # what comes behind it is lost with it, and its sender hears of it
        wait_until(lambda: ends[1].refused["unknown session"] > 0)
        wait_until(lambda: [kind(data) for _, _, data in wire[0].seen].count(CONFIRM) == 2)
        ends[0].send(1, frame(1))
    assert receive(ends[1]) == (0, [1])
    assert count_of(ends[0]) + count_of(ends[1]) >= 1
    assert changed


def test_a_frame_that_is_held_back_or_comes_twice_is_not_delivered_again(pair):
    ends, wire = pair
    held = []
    wire[0].meddle = lambda destination, data: held.append(data) or []
    ends[0].send(1, frame(1))
    del wire[0].meddle
    ends[0].send(1, frame(2))
    assert receive(ends[1]) == (0, [2])
    for words in (*held, wire[0].seen[-1][2], *held):
        wire[0].say(1, words)
    wait_until(lambda: ends[1].refused == {"replayed": 3})
    ends[0].send(1, frame(3))
    assert receive(ends[1]) == (0, [3])


def test_frames_in_another_order_are_not_handed_on_in_it(pair):
    ends, wire = pair
    held = []
    wire[0].meddle = lambda destination, data: held.append(data) or []
    for value in range(5):
        ends[0].send(1, frame(value))
    del wire[0].meddle
    for number in (1, 0, 3, 2, 4):
        wire[0].say(1, held[number])
    assert [receive(ends[1])[1][0] for _ in range(3)] == [1, 3, 4]
    assert ends[1].refused == {"replayed": 2}


def test_ones_own_words_and_those_to_another_are_refused(made):
    wire = wires(3)
    ends = [sealed(made, end) for end in wire]
    talk(ends[0], ends[1])
    talk(ends[0], ends[2])
    talk(ends[1], ends[2])
    for source, destination, data in list(wire[0].seen):
        before = count_of(ends[source])
        wire[destination].say(source, data)  # back to who has said it
        wait_until(lambda before=before, source=source: count_of(ends[source]) == before + 1)
        third = 3 - source - destination
        before = count_of(ends[third])
        wire[source].say(third, data)
        wait_until(lambda before=before, third=third: count_of(ends[third]) == before + 1)
    assert is_silent(*ends)
    talk(ends[0], ends[1], 9)


def test_whatever_is_said_again_ends_no_session_and_delivers_nothing(pair):
    ends, wire = pair
    for value in range(3):
        talk(*ends, value)
    recorded = list(wire[0].seen)
    sessions = [(end._peers[1 - end.rank].outgoing.id, end._peers[1 - end.rank].incoming.id) for end in ends]
    for repeated in (recorded, recorded[::-1], recorded * 3):
        for source, destination, data in repeated:
            wire[source].say(destination, data)
        wait_until(lambda: all(end._inner._inboxes[end.rank].empty() for end in ends))
        assert is_silent(*ends)
        talk(*ends, 7)
    assert [(end._peers[1 - end.rank].outgoing.id, end._peers[1 - end.rank].incoming.id) for end in ends] == sessions
    assert all(end.refused["replayed"] > 20 for end in ends)


def test_whoever_knows_the_form_but_not_the_secret_ends_no_session(pair):
    ends, wire = pair
    incoming = ends[1]._peers[0].incoming.id
    number = 0
    for kind_, length, session, key in itertools.product(
        range(8), (0, 8, 32, 64), (0, incoming, incoming + 1), (None, bytes(32))
    ):
        words = bytes(range(length))
        wire[0].say(1, seal(key, Header(kind_, session, 10**6, length), memoryview(words)) + words)
        number += 1
    wait_until(lambda: count_of(ends[1]) == number)
    talk(*ends, 3)
    assert ends[1]._peers[0].incoming.id == incoming
    assert count_of(ends[0]) < number  # it was told of sessions that it never had


# -- a new beginning -------------------------------------------------------------------------------------------------


def restarted(made, end):
    """The same rank as a new process would be: it knows nothing of before."""
    wire = end._inner
    made.remove(end)
    end._ended = True
    end._thread.join()
    return sealed(made, wire)


@pytest.mark.parametrize("who", [0, 1])
def test_a_new_process_takes_up_the_conversation(pair, made, who):
    ends, wire = pair
    old = list(wire[0].seen)
    ends[who] = restarted(made, ends[who])
    other = ends[1 - who]
    ends[who].send(1 - who, frame(1))
    assert receive(other) == (who, [1])
    other.send(who, frame(2))  # under a session that the new process does not know: lost, but its sender is told
    wait_until(lambda: ends[who].refused["unknown session"] == 1)
    wait_until(lambda: other._peers[who].outgoing is not None and ends[who]._peers[1 - who].incoming is not None)
    other.send(who, frame(3))
    assert receive(ends[who]) == (1 - who, [3])
    for source, destination, data in old:  # and what was said before is not taken for news
        wire[source].say(destination, data)
    wait_until(lambda: all(end._inner._inboxes[end.rank].empty() for end in ends))
    assert is_silent(*ends)
    talk(*ends, 5)


def test_a_session_can_be_confirmed_once(pair, made):
    ends, wire = pair
    for _ in range(3):
        ends[0] = restarted(made, ends[0])
        ends[0].send(1, frame(1))
        receive(ends[1])
    confirmations = [data for source, _, data in wire[0].seen if (source, kind(data)) == (0, CONFIRM)]
    current = ends[1]._peers[0].incoming.id
    before = ends[1].refused["replayed"]
    for data in confirmations:
        wire[0].say(1, data)
    wait_until(lambda: ends[1].refused["replayed"] == before + len(confirmations))
    assert ends[1]._peers[0].incoming.id == current


def test_an_old_offer_is_no_answer_to_a_new_question(pair, made):
    ends, wire = pair
    offer = next(data for source, _, data in wire[0].seen if (source, kind(data)) == (1, OFFER))
    ends[0] = restarted(made, ends[0])
    wire[0].meddle = lambda destination, data: []
    ends[0].send(1, frame(1))
    wire[1].say(0, offer)
    wait_until(lambda: ends[0].refused == {"replayed": 1})
    assert ends[0].pending_bytes(1) == 1
    del wire[0].meddle
    assert receive(ends[1]) == (0, [1])


def test_what_waits_for_a_lost_rank_is_dropped(made):
    wire = wires()
    end = sealed(made, wire[0])
    end.send(1, frame(*range(9)))
    assert end.pending_bytes(1) == 9
    wire[1].die()
    wait_until(lambda: not end.pending_bytes(1))
    assert not end._peers[1].waiting
    assert end.lost == {1}
    end.close(30.0)


def test_one_who_is_not_there_yet_is_asked_again(made):
    wire = wires()
    wire[0].meddle = lambda destination, data: []
    end = sealed(made, wire[0])
    end.send(1, frame(1))
    wait_until(lambda: len(wire[0].seen) == 2)
    del wire[0].meddle
    assert receive(sealed(made, wire[1])) == (0, [1])
    assert {data for _, _, data in wire[0].seen[:2]} == {wire[0].seen[0][2]}


def test_over_a_connection_that_broke_a_new_session_begins(made):
    server, peer = tcp(2)
    made += [Sealed(server, SECRET), Sealed(peer, SECRET)]
    talk(made[0], made[1])
    made.pop(1).close(5.0)
    wait_until(lambda: made[0].lost == {1})
    made.append(Sealed(peer_of(server, 1), SECRET))
    made[1].send(0, frame(1))
    assert receive(made[0]) == (1, [1])
    made[0].send(1, frame(2))  # the first frame after the return is not lost: the server knows of the return
    assert receive(made[1]) == (0, [2])
    assert made[0].connections(1) == 2
    assert not made[0].refused
    assert not made[1].refused


def test_a_transport_that_breaks_is_an_error_of_every_call(made):
    wire = wires()
    end = sealed(made, wire[0])
    wire[0].receive = lambda timeout_s: 1 / 0
    with pytest.raises(Exception, match="the sealed transport of rank 0 has broken"):
        end.receive(20.0)
    with pytest.raises(Exception, match="has broken"):
        end.send(1, frame(1))

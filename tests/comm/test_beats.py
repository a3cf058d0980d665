"""The table is a join: what arrives may come twice, late and in any order. The decoder takes any bytes."""

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distopt.comm.beats import LEFT, LOST, NONCE_BYTES, Datagram, Table, decode, encode

NONCE = bytes(range(NONCE_BYTES))
counts = st.integers(0, 50) | st.sampled_from([LEFT, LOST]) | st.integers(0, 2**32 - 1)


def datagrams(num_ranks):
    tables = st.lists(counts, min_size=num_ranks, max_size=num_ranks).map(tuple)
    return st.builds(Datagram, st.integers(0, num_ranks - 1), tables)


@given(st.integers(1, 40).flatmap(datagrams), st.binary(min_size=NONCE_BYTES, max_size=NONCE_BYTES))
def test_what_is_encoded_is_decoded_and_has_the_size_that_is_documented(datagram, nonce):
    data = encode(datagram, nonce)
    assert len(data) == 28 + 4 * len(datagram.counters)
    assert decode(data, nonce, len(datagram.counters)) == datagram


@given(st.binary(max_size=200), st.integers(1, 40))
def test_arbitrary_bytes_are_refused_and_never_raise(data, num_ranks):
    assert decode(data, NONCE, num_ranks) is None


@given(datagrams(5), st.data())
def test_damaged_datagrams_are_refused(datagram, data):
    """Any change to the head, another length, another job: refused. (A changed count is a count.)"""
    whole = bytearray(encode(datagram, NONCE))
    kind = data.draw(st.sampled_from(["head", "short", "long", "nonce", "ranks"]))
    if kind == "head":
        position = data.draw(st.integers(0, 27))
        other = data.draw(st.integers(1, 255))
        whole[position] ^= other
        heard = decode(bytes(whole), NONCE, 5)
        assert heard is None or (20 <= position < 24 and heard.sender < 5)
    elif kind == "short":
        assert decode(bytes(whole[: data.draw(st.integers(0, len(whole) - 1))]), NONCE, 5) is None
    elif kind == "long":
        assert decode(bytes(whole) + data.draw(st.binary(min_size=1)), NONCE, 5) is None
    elif kind == "nonce":
        assert decode(bytes(whole), bytes(NONCE_BYTES), 5) is None
    else:
        assert decode(bytes(whole), NONCE, data.draw(st.integers(1, 40).filter(lambda n: n != 5))) is None


def test_a_sender_outside_of_the_group_is_refused():
    data = bytearray(encode(Datagram(0, (1, 1)), NONCE))
    struct.pack_into("!I", data, 20, 2)
    assert decode(bytes(data), NONCE, 2) is None


@given(st.lists(datagrams(4), max_size=8), st.randoms())
def test_merging_does_not_depend_on_order_or_repetition(heard, shuffle):
    one, other = Table(0, 4, 0.0), Table(0, 4, 0.0)
    again = heard + [d for d in heard if shuffle.random() < 0.5]
    shuffle.shuffle(again)
    for datagram in heard:
        one.merge(datagram, 1.0)
    for datagram in again:
        other.merge(datagram, 1.0)
    assert one.datagram() == other.datagram()
    assert one.lost() == other.lost()
    assert (one.accuser is None) == (other.accuser is None)


@given(st.lists(datagrams(4), max_size=8))
def test_nobody_else_moves_the_own_entry(heard):
    table = Table(2, 4, 0.0)
    table.beat()
    for datagram in heard:
        table.merge(datagram, 1.0)
    assert table.datagram().counters[2] == 1
    assert 2 not in table.lost() + table.left() + table.silent(100.0, 1.0)


def test_an_entry_that_stands_still_is_silent_and_one_that_moves_is_not():
    table = Table(0, 3, 0.0)
    for now in (1.0, 2.0, 3.0):
        table.merge(Datagram(1, (0, int(now), 7)), now)
    assert table.silent(3.5, 1.0) == [2]  # its 7 was news only once
    assert table.silent_s(2, 3.5) == 2.5
    assert table.silent(3.5, 3.0) == []


@pytest.mark.parametrize("failed", [False, True])
def test_who_has_ended_is_never_silent_and_beats_no_more(failed):
    ending, other = Table(1, 2, 0.0), Table(0, 2, 0.0)
    ending.end(failed=failed)
    ending.beat()
    other.merge(ending.datagram(), 0.0)
    assert other.silent(1000.0, 1.0) == []
    assert (other.lost(), other.left()) == (([1], []) if failed else ([], [1]))
    assert other.told_by(1) == (1 if failed else None)


def test_a_verdict_travels_and_reaches_the_one_it_is_about():
    tables = [Table(rank, 3, 0.0) for rank in range(3)]
    tables[0].declare_lost([2])
    tables[1].merge(tables[0].datagram(), 1.0)
    tables[2].merge(tables[1].datagram(), 1.0)
    assert (tables[1].lost(), tables[1].told_by(2)) == ([2], 0)
    assert (tables[2].lost(), tables[2].accuser) == ([], 1)


@pytest.mark.parametrize("num_ranks", [2, 3, 8, 100])
def test_a_beat_reaches_all_in_log2_rounds(num_ranks):
    """The law behind the offsets 1, 2, 4, ...: without the one by chance, and whoever's turn comes last."""
    tables = [Table(rank, num_ranks, 0.0) for rank in range(num_ranks)]
    rounds = (num_ranks - 1).bit_length()
    for table in tables:
        table.beat()
    for _ in range(rounds):
        sent = [table.datagram() for table in tables]
        for sender in random.Random(0).sample(range(num_ranks), num_ranks):
            for step in range(rounds):
                tables[(sender + (1 << step)) % num_ranks].merge(sent[sender], 1.0)
    assert all(not table.unheard() for table in tables)

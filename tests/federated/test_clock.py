"""The virtual clock against a sorted list, its ties, and its state."""

import io
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distopt.errors import ConfigError, StateMismatchError
from distopt.federated import Arrival, VirtualClock

DELAYS = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.1, 0.2, 0.3, 1.0])), max_size=30)


def taken(arrivals):
    return [(arrival.time_s, arrival.client, arrival.payload) for arrival in arrivals]


@given(works=DELAYS, until_s=st.floats(0, 1.2))
def test_arrivals_come_by_time_then_client_then_order(works, until_s):
    clock = VirtualClock()
    for order, (client, delay_s) in enumerate(works):
        clock.schedule(client, delay_s, order)
    expected = sorted((delay_s, client, order) for order, (client, delay_s) in enumerate(works))
    assert clock.next_s == (expected[0][0] if expected else math.inf)
    first = taken(clock.next_arrivals(until_s))
    until_ns = round(until_s * 1e9)
    assert first == [each for each in expected if round(each[0] * 1e9) <= until_ns]
    assert clock.now_s == until_ns / 1e9
    rest = []
    while clock:
        rest.append(clock.next_arrival())
        assert clock.now_s == rest[-1].time_s
    assert first + taken(rest) == expected


def test_payloads_are_never_compared():
    clock = VirtualClock()
    for payload in ({"a": 1}, torch.ones(2), None):
        clock.schedule(0, 1.0, payload)
    assert [type(arrival.payload) for arrival in clock.next_arrivals(1.0)] == [dict, torch.Tensor, type(None)]


@pytest.mark.parametrize("delay_s", [0.1, 0.2, 0.7, 1 / 3, 1e-9])
def test_many_delays_end_exactly_at_their_multiple(delay_s):
    """Sums of floats do not: 0.1 + 0.1 + 0.1 > 0.3."""
    clock = VirtualClock()
    exact_s = round(delay_s * 1e9) / 1e9
    for work in range(1, 200):
        clock.schedule(0, delay_s)
        assert len(clock.next_arrivals(work * exact_s)) == 1


@given(works=DELAYS, half=st.floats(0, 1.0))
def test_a_resumed_clock_goes_on_alike(works, half):
    clock = VirtualClock()
    for client, delay_s in works:
        clock.schedule(client, delay_s, {"version": client, "weights": [1.0, 2.0]})
    clock.next_arrivals(half)
    state = clock.state_dict()
    assert json.loads(json.dumps(state)) == state
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    resumed = VirtualClock()
    resumed.schedule(9, 0.0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for each in (clock, resumed):
        each.schedule(1, 0.1, "later")
    assert (resumed.now_s, len(resumed)) == (clock.now_s, len(clock))
    assert taken(resumed.next_arrivals(9.0)) == taken(clock.next_arrivals(9.0))
    resumed.load_state_dict(state)  # it has not moved on with what was made of it
    assert resumed.state_dict() == state


def test_the_order_goes_on_after_a_resume():
    clock = VirtualClock()
    clock.schedule(0, 1.0, "first")
    resumed = VirtualClock()
    resumed.load_state_dict(clock.state_dict())
    resumed.schedule(0, 1.0, "second")
    resumed.schedule(0, 1.0, "third")
    assert [arrival.payload for arrival in resumed.next_arrivals(1.0)] == ["first", "second", "third"]


def test_what_the_clock_refuses():
    clock = VirtualClock()
    for delay_s in (-0.1, math.nan, math.inf, "1", None):
        with pytest.raises(ConfigError, match=r"delay_s must be finite and at least 0, got .*; nothing arrives in the"):
            clock.schedule(0, delay_s)
    with pytest.raises(ConfigError, match="there must be a scheduled arrival, got none; schedule some client's work"):
        clock.next_arrival()
    clock.schedule(3, 1.5, "x")
    assert clock.next_arrival() == Arrival(1.5, 3, "x")
    for until_s in (1.4, math.inf, math.nan, None):
        with pytest.raises(ConfigError, match=r"until_s must be finite and at least the time that it is, 1\.5, got"):
            clock.next_arrivals(until_s)
    assert clock.next_arrivals(1.5) == []
    for state in ({}, {"format": 2, "now_ns": 0, "scheduled": 0, "queue": []}, {"format": 1, "now_ns": 0}):
        with pytest.raises(
            StateMismatchError, match=r"the state must be a clock's, of format 1, got .*; load what its"
        ):
            clock.load_state_dict(state)
    assert clock.now_s == 1.5

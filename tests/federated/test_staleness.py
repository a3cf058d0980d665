"""The weights are unbiased where clients of different speed really arrive: exact clocks, in fractions of a second."""

import heapq
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.errors import ConfigError
from distopt.federated import (
    ParticipationWeights,
    async_fedavg_weights,
    fedbuff_weights,
    fedfix_rounds,
    fedfix_weights,
    polynomial_discount,
    sample_weights,
    synchronous_weights,
    uniform_weights,
)

TIMES = [Fraction(1, 5) + Fraction(4, 5) * i / 9 for i in range(10)]  # linear between 0.2 and 1.0
TIMES_S = [float(time) for time in TIMES]


def fedfix_arrivals(window, num_rounds):
    """Who arrives in each round: a client starts at a boundary, and restarts at the first one after it is ready."""
    started = [Fraction(0)] * len(TIMES)
    rounds = []
    for round in range(1, num_rounds + 1):
        now = round * window
        arrived = [now - started[i] >= TIMES[i] for i in range(len(TIMES))]
        started = [now if arrived[i] else started[i] for i in range(len(TIMES))]
        rounds.append(arrived)
    return torch.tensor(rounds)


def arrivals_until(end, times):
    """The client of each arrival up to the time `end`, where each restarts at once."""
    queue = [(time, i) for i, time in enumerate(times)]
    heapq.heapify(queue)
    found = []
    while queue[0][0] <= end:
        now, i = queue[0]
        heapq.heapreplace(queue, (now + times[i], i))
        found.append(i)
    return found


@pytest.mark.parametrize("window", [Fraction(1, 5), Fraction(1, 2), Fraction(4, 5), Fraction(1)])
@pytest.mark.parametrize("importances", [uniform_weights(10), sample_weights(range(1, 11))], ids=["uniform", "samples"])
def test_fedfix_counts_each_client_by_its_importance_on_average(window, importances):
    num_rounds = math.lcm(*range(1, 6))
    weights = fedfix_weights(TIMES_S, float(window), importances)
    average = (fedfix_arrivals(window, num_rounds) * weights).mean(0)
    torch.testing.assert_close(average, importances, rtol=1e-14, atol=0.0)
    if window == 1:
        assert torch.equal(weights, importances)
        assert fedfix_arrivals(window, 3).all()
    else:
        assert not torch.equal(weights, importances)


@pytest.mark.parametrize("window", [Fraction(1, 5), Fraction(1, 2), Fraction(4, 5), Fraction(1)])
def test_fedfix_without_known_times_is_what_participation_weights_count(window):
    counted = ParticipationWeights(10, math.inf)
    for arrived in fedfix_arrivals(window, 60):
        counted.update(arrived)
    assert torch.equal(counted.weights, fedfix_rounds(TIMES_S, float(window)).double())


def test_async_fedavg_counts_each_client_by_its_importance_on_average():
    times = [Fraction(i, 5) for i in range(1, 6)]
    importances = sample_weights([5, 1, 3, 2, 4])
    weights = async_fedavg_weights([float(time) for time in times], importances)
    arrivals = torch.tensor(arrivals_until(Fraction(12), times))  # from there on all begins anew
    average = torch.bincount(arrivals, minlength=5) * weights / len(arrivals)
    torch.testing.assert_close(average, importances, rtol=1e-12, atol=0.0)


def test_fedbuff_counts_each_client_by_its_importance_on_average():
    arrivals = arrivals_until(Fraction(100), TIMES)
    groups = [arrivals[i : i + 4] for i in range(0, len(arrivals) - 3, 4)]
    inside = torch.tensor([[client in group for client in range(10)] for group in groups])
    importances = uniform_weights(10)
    weights = fedbuff_weights(inside.double().mean(0), importances)
    torch.testing.assert_close((inside * weights).mean(0), importances, rtol=1e-12, atol=0.0)


def test_synchronous_weights_are_the_importances_in_a_new_tensor():
    importances = sample_weights([1, 3])
    weights = synchronous_weights(importances)
    assert torch.equal(weights, importances)
    weights.zero_()
    assert importances.tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    ("time_s", "window_s", "rounds"),
    [
        (0.3, 0.1, 3),
        (0.6, 0.2, 3),
        (0.1 + 0.2, 0.1, 3),  # the quotient is above 3
        (3.0000000004, 1.0, 3),
        (2.9999999996, 1.0, 3),
        (3.0000001, 1.0, 4),
        (2.9999, 1.0, 3),
        (1e-12, 1.0, 1),
        (1e-300, 1e300, 1),  # the quotient is 0
        (0.2, 1.0, 1),
        (1.0, 1.0, 1),
        (5e6 + 0.5, 1.0, 5_000_001),
    ],
)
def test_rounds_are_counted_as_if_the_clock_were_exact(time_s, window_s, rounds):
    assert fedfix_rounds([time_s], window_s).tolist() == [rounds]


@settings(max_examples=200, deadline=None)
@given(rounds=st.integers(1, 10_000), thousandths=st.integers(1, 100_000), inside=st.floats(0.001, 0.999))
def test_rounds_of_any_window(rounds, thousandths, inside):
    window_s = thousandths / 1000
    whole = rounds * thousandths / 1000
    assert fedfix_rounds([whole, (rounds - 1 + inside) * window_s], window_s).tolist() == [rounds, rounds]


def test_the_discount():
    assert polynomial_discount([0, 3, 8]).tolist() == pytest.approx([1.0, 0.5, 1 / 3])
    assert polynomial_discount(torch.tensor([0, 1, 3]), 1.0).tolist() == [1.0, 0.5, 0.25]
    assert polynomial_discount([0, 1, 3], 0).tolist() == [1.0, 1.0, 1.0]


P = uniform_weights(2)


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda: synchronous_weights([1.0, 1.0]), "sum to 1, got the minimum 1.0 and the sum 2.0; use uniform"),
        (lambda: synchronous_weights([1.5, -0.5]), "at least 0"),
        (lambda: synchronous_weights([]), "the sum 0.0"),
        (lambda: fedfix_weights([1.0, 0.0], 1.0, P), "times_s must be finite and above 0, got 0.0 at 1"),
        (lambda: fedfix_weights([1.0, math.inf], 1.0, P), "got inf at 1"),
        (lambda: fedfix_weights([1.0, 1.0], 0.0, P), "window_s must be a finite number above 0"),
        (lambda: fedfix_weights([1.0, 1.0], math.inf, P), "window_s must be"),
        (lambda: fedfix_weights([1.0], 1.0, P), "one value per client, got 1 for 2"),
        (lambda: async_fedavg_weights([1.0, -1.0], P), "got -1.0 at 1; give seconds"),
        (lambda: async_fedavg_weights([1.0], P), "one value per client"),
        (lambda: fedbuff_weights([1.0, 0.0], P), "leave out who never arrives"),
        (lambda: fedbuff_weights([1.0, 2.0], P), r"in \(0, 1\], got 2.0"),
        (lambda: fedbuff_weights([1.0], P), "one value per client"),
        (lambda: polynomial_discount([-1]), "staleness must be at least 0, got -1.0"),
        (lambda: polynomial_discount([1], -0.5), "exponent must be"),
        (lambda: polynomial_discount([1], math.nan), "exponent must be"),
    ],
)
def test_what_does_not_fit_is_refused(call, rule):
    with pytest.raises(ConfigError, match=rule):
        call()

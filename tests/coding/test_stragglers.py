"""The straggler models against their definitions, window by window, and the one rule that they are reduced to."""

import itertools
import math

import numpy as np
import pytest

from distopt.coding import Arbitrary, Bursty, PerRound
from distopt.errors import ConfigError

MODELS = [
    PerRound(0),
    PerRound(2),
    Bursty(1, 2, 2),
    Bursty(2, 4, 3),
    Bursty(3, 3, 2),
    Arbitrary(1, 3, 2),
    Arbitrary(2, 4, 3),
    Arbitrary(3, 3, 1),
]


def by_definition(model, pattern):
    """The models as the paper defines them: a condition on every window of the whole pattern."""
    if isinstance(model, PerRound):
        return (pattern.sum(axis=0) <= model.stragglers).all()
    rounds = pattern.shape[1]
    padded = np.hstack([pattern, np.zeros((len(pattern), model.window), dtype=bool)])
    for start in range(rounds):
        window = padded[:, start : start + model.window]
        if window.any(axis=1).sum() > model.stragglers:
            return False
        for worker in window:
            if isinstance(model, Arbitrary) and worker.sum() > model.times:
                return False
            slow = np.flatnonzero(worker)
            if isinstance(model, Bursty) and len(slow) and slow[-1] - slow[0] >= model.burst:
                return False
    return True


@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_round_by_round_is_the_definition(model):
    rng = np.random.default_rng(0)
    verdicts = []
    for density in np.linspace(0.02, 0.5, 150):
        pattern = rng.random((4, 7)) < density
        verdicts.append(model.conforms(pattern))
        assert verdicts[-1] == by_definition(model, pattern), pattern.astype(int)
    assert not all(verdicts)
    assert any(verdicts) or model == PerRound(0)


@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_generated_patterns_conform_and_nearly_always_have_no_room(model):
    rng = np.random.default_rng(1)
    full, differ = [], set()
    for _ in range(60):
        pattern = model.generate(6, 12, rng)
        assert by_definition(model, pattern)
        differ.add(pattern.tobytes())
        for round in range(12):
            limits = model.limits(pattern[:, :round])
            full.append(
                (limits.recent | pattern[:, round]).sum() == limits.distinct
                or (limits.recent | pattern[:, round] | limits.barred).all()
            )
    assert np.mean(full) > 0.7
    assert len(differ) > 30 or model == PerRound(0)


@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_the_moment_at_which_the_missing_are_allowed(model):
    """`met_at` against adding the answers one by one."""
    rng = np.random.default_rng(2)
    for _ in range(40):
        before = model.generate(6, int(rng.integers(0, 8)), rng)
        times = rng.permutation(6).astype(float)
        times[rng.random(6) < 0.2] = math.inf
        times[rng.random(6) < 0.2] = -math.inf
        moments = [-math.inf, *sorted(times[np.isfinite(times)]), math.inf]
        allowed = [each for each in moments if model.allows(before, times > each) and each < math.inf]
        assert model.limits(before).met_at(times) == (allowed[0] if allowed else math.inf)


def test_a_history_outside_the_model_allows_nothing_more():
    before = np.ones((4, 1), dtype=bool)
    limits = Bursty(1, 3, 2).limits(before)
    assert not limits.allow(np.zeros(4, dtype=bool))
    assert limits.met_at(np.zeros(4)) == math.inf


def test_larger_parameters_allow_more():
    rng = np.random.default_rng(3)
    for burst, stragglers in itertools.product((1, 2), (1, 2, 3)):
        pattern = Bursty(burst, 4, stragglers).generate(6, 12, rng)
        assert Bursty(burst + 1, 4, stragglers).conforms(pattern)
        assert Bursty(burst, 4, stragglers + 1).conforms(pattern)
        assert Arbitrary(burst, 4, stragglers).conforms(pattern)  # the same window: bursty is the stricter one
        assert PerRound(stragglers).conforms(pattern)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PerRound(-1), "stragglers must be an integer of at least 0, got -1"),
        (lambda: Bursty(0, 2, 1), "burst must be an integer of at least 1, got 0"),
        (lambda: Bursty(3, 2, 1), "window must be an integer of at least 3, got 2"),
        (lambda: Bursty(1, 2, 1.5), "stragglers must be an integer of at least 0, got 1.5"),
        (lambda: Arbitrary(0, 2, 1), "times must be an integer of at least 1, got 0"),
        (lambda: Arbitrary(1, 0, 1), "window must be an integer of at least 1, got 0"),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises(ConfigError, match=message):
        make()

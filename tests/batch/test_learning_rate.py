"""Rules for the learning rate of a grown batch, against the papers' equations and in their limits."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distopt.batch import AdamScale, AdaScale, LearningRateRule, Linear, SquareRoot
from distopt.errors import ConfigError

RULES = [Linear, SquareRoot, AdaScale, AdamScale]
AMOUNTS = st.floats(1e-6, 1e6)


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_linear_and_square_root_are_the_powers_1_and_a_half(batch, start):
    assert Linear().factor(batch, start) == pytest.approx((batch / start) ** 1)
    assert SquareRoot().factor(batch, start) == pytest.approx((batch / start) ** 0.5)


@given(st.integers(1, 512), st.integers(1, 64), AMOUNTS, AMOUNTS)
def test_the_gain_is_adascale_s(scale, start, var, sqr):
    # Johnson et al. write r = (sigma^2 + mu^2) / (sigma^2 / S + mu^2) for S batches of the size that sigma^2 is of
    gain = (var + sqr) / (var / scale + sqr)
    assert AdaScale().factor(scale * start, start, var=var, sqr=sqr) == pytest.approx(gain)
    assert AdamScale().factor(scale * start, start, var=var, sqr=sqr) == pytest.approx(math.sqrt(gain))
    assert 1 - 1e-9 <= gain <= scale + 1e-9


@pytest.mark.parametrize(("power", "rule"), [(1, AdaScale()), (0.5, AdamScale())])
def test_limits_of_the_gain(power, rule):
    assert rule.factor(256, 32, var=0.0, sqr=3.0) == 1.0  # no noise: a larger batch is of no use
    assert rule.factor(256, 32, var=3.0, sqr=0.0) == pytest.approx(8**power)  # noise alone: so many steps in one
    assert rule.factor(256, 32, var=0.0, sqr=0.0) == 1.0
    assert rule.factor(32, 32, var=5.0, sqr=2.0) == 1.0


@pytest.mark.parametrize("made", RULES)
def test_every_rule_is_1_at_the_start_grows_with_the_batch_and_stops_at_its_cap(made):
    factors = [made().factor(batch, 32, var=9.0, sqr=0.5) for batch in (32, 64, 128, 4096)]
    assert factors[0] == 1.0
    assert factors == sorted(set(factors))
    capped = [made(cap=1.5).factor(batch, 32, var=9.0, sqr=0.5) for batch in (32, 64, 128, 4096)]
    assert capped == [min(factor, 1.5) for factor in factors]
    assert capped[-1] == 1.5


def test_a_name_makes_a_rule():
    assert LearningRateRule.from_dict({"rule": "adascale", "cap": 4.0}) == AdaScale(cap=4.0)


@pytest.mark.parametrize("made", [AdaScale, AdamScale])
@pytest.mark.parametrize(
    "noise", [{}, {"var": 1.0}, {"sqr": 1.0}, {"var": -1.0, "sqr": 1.0}, {"var": 1.0, "sqr": math.nan}]
)
def test_a_rule_that_needs_the_noise_says_so(made, noise):
    with pytest.raises(ConfigError, match=r"(var|sqr) must be a finite number .* got .*; give the estimate"):
        made().factor(64, 32, **noise)


@pytest.mark.parametrize(("batch", "start"), [(0, 32), (32, 0), (32.0, 32), (True, 1)])
def test_batches_are_counts(batch, start):
    with pytest.raises(ConfigError, match="batch must be an integer of at least 1"):
        Linear().factor(batch, start)

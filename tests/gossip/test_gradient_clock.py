"""The clock of a rank that waits for nobody."""

import pytest

from distopt.gossip.gradient_clock import GradientClock


def run(seconds, every=1, exchanges=()):
    """Steps that take so long each, exchanges behind some of them."""
    at = [100.0]
    clock = GradientClock(every, lambda: at[0])
    seen = []
    for number, took in enumerate(seconds):
        at[0] += took
        clock.stepped()
        seen.append(clock.now)
        if number in exchanges:
            clock.exchanged()
    return seen


@pytest.mark.parametrize("took", [1e-3, 20.0])
def test_equal_steps_are_units(took):
    assert run([took] * 20, exchanges=range(20)) == pytest.approx(range(1, 21))


def test_time_goes_on_by_the_seconds_and_the_unit_follows_the_steps():
    seen = run([1.0] * 5 + [3.0] * 20)
    assert seen[5] - seen[4] == pytest.approx(3 / 2)  # of a unit that is now (1 + 3) / 2
    assert seen[6] - seen[5] == pytest.approx(3 / 2.5)
    assert seen[-1] - seen[-2] == pytest.approx(1.0, abs=1e-4)


def test_where_exchanges_are_rare_time_is_slow():
    seen = run([1.0] * 400, exchanges=range(9, 400, 10))
    assert seen[-1] - seen[-11] == pytest.approx(1.0, rel=1e-3)  # the units of an exchange, for which constants are
    assert run([1.0] * 40, every=10, exchanges=range(9, 40, 10)) == pytest.approx(range(1, 41))

"""DIFF2's noise: the numbers of its paper's formula, and what an accountant makes of them."""

import math

import pytest

from distopt.errors import ConfigError
from distopt.federated.privacy import Plan, calibrated, epsilon_of
from distopt.federated.privacy.calibration import releases

PAPER = {"delta": 1e-5, "rounds": 2000, "fewest_samples": 1651, "num_clients": 10}


def plan(**changed):
    return Plan(**{"epsilon": 3.0, "interval": 20, **PAPER, **changed})


def test_the_oracle_s_numbers():
    often, seldom = calibrated("closed-form", plan(interval=1)), calibrated("closed-form", plan())
    assert round(often.restart, 5) == 0.00938
    assert round(seldom.restart, 5) == 0.00235
    assert round(seldom.difference, 5) == round(often.difference, 5) == 0.02098


def test_restarts_are_counted_up():
    assert [plan(rounds=rounds, interval=20).restarts for rounds in (1, 19, 20, 21, 40)] == [1, 1, 1, 2, 2]
    up, down = calibrated("closed-form", plan(rounds=21)), calibrated("closed-form", plan(rounds=40))
    assert up.restart == down.restart
    assert up.difference < down.difference


@pytest.mark.parametrize("interval", [1, 3, 20, 100, 2000])
@pytest.mark.parametrize("epsilon", [0.5, 3.0, 5.0, 8.0])
def test_all_rounds_of_the_closed_form_cost_at_most_epsilon(interval, epsilon):
    job = plan(interval=interval, epsilon=epsilon)
    noise = calibrated("closed-form", job)
    spent = epsilon_of("closed-form", releases(noise, job, job.restarts, job.rounds - job.restarts), job.delta)
    assert 0.9 * epsilon < spent <= epsilon  # the formula counts R rounds with differences, restarts among them


@pytest.mark.parametrize("interval", [1, 20, 100, 2000])
@pytest.mark.parametrize("epsilon", [3.0, 5.0])
def test_the_accountant_finds_13_to_15_percent_less_noise_for_exactly_epsilon(interval, epsilon):
    job = plan(interval=interval, epsilon=epsilon)
    closed, found = calibrated("closed-form", job), calibrated("rdp", job)
    assert 0.13 <= 1 - found.restart / closed.restart <= 0.15
    assert found.difference / closed.difference == pytest.approx(found.restart / closed.restart)
    spent = epsilon_of("rdp", releases(found, job, job.restarts, job.rounds - job.restarts), job.delta)
    assert epsilon * (1 - 1e-6) < spent <= epsilon


def test_the_noise_multiplier_is_the_noise_over_the_sensitivity():
    job, clip = plan(), 0.7
    noise = calibrated("closed-form", job)
    sensitivity = 2 * clip / (job.fewest_samples * job.num_clients)
    restart, difference = releases(noise, job, 3, 4)
    assert restart.noise_multiplier == pytest.approx(clip * noise.restart / sensitivity)
    assert difference.noise_multiplier == pytest.approx(clip * noise.difference / sensitivity)
    assert (restart.count, difference.count) == (3, 4)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"epsilon": 0.0}, "epsilon must be a number above 0"),
        ({"epsilon": math.inf}, "epsilon must be a number above 0"),
        ({"delta": 1.0}, "delta must be a number in"),
        ({"rounds": 0}, "rounds must be an integer of at least 1"),
        ({"interval": 0}, "interval must be an integer of at least 1"),
        ({"fewest_samples": 0}, "fewest_samples must be an integer of at least 1"),
        ({"num_clients": 0}, "num_clients must be an integer of at least 1"),
    ],
)
def test_bad_plans_are_refused(changed, said):
    with pytest.raises(ConfigError, match=said):
        plan(**changed)
    with pytest.raises(ConfigError, match="accountant must be one of"):
        calibrated("moments", plan())

"""What releases cost, by the closed form and by dp-accounting."""

import builtins
import math

import numpy as np
import pytest

from distopt.errors import CompatibilityError, ConfigError
from distopt.federated import DIFF2, ClientData, Simulation
from distopt.federated.privacy import Releases, epsilon_of, smallest_multiplier
from distopt.federated.privacy.accountant import ACCOUNTANTS, smallest


def of(multiplier, count, sampling=1.0):
    return Releases(noise_multiplier=multiplier, count=count, sampling=sampling)


def test_the_closed_form_is_the_best_order_of_the_renyi_bound():
    delta, releases = 1e-5, [of(20.0, 100), of(70.0, 1900)]
    rho = 100 / (2 * 20.0**2) + 1900 / (2 * 70.0**2)
    orders = np.linspace(1.001, 100, 1_000_000)
    best = (orders * rho + math.log(1 / delta) / (orders - 1)).min()
    assert epsilon_of("closed-form", releases, delta) == pytest.approx(best, rel=1e-6)
    assert epsilon_of("closed-form", releases, delta) <= best


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_more_releases_cost_more_and_more_noise_costs_less(accountant):
    costs = [epsilon_of(accountant, [of(30.0, count)], 1e-5) for count in (0, 1, 10, 1000)]
    assert costs[0] == 0.0
    assert costs == sorted(costs)
    assert len(set(costs)) == 4
    assert epsilon_of(accountant, [of(60.0, 1000)], 1e-5) < costs[-1]
    assert epsilon_of(accountant, [of(30.0, 1000)], 1e-7) > costs[-1]
    assert epsilon_of(accountant, [], 1e-5) == 0.0
    parts = epsilon_of(accountant, [of(30.0, 400), of(30.0, 600)], 1e-5)
    assert parts == pytest.approx(costs[-1], rel=1e-12)


def test_the_rdp_accountant_is_tighter_and_above_the_exact_epsilon_of_a_gaussian():
    """Balle & Wang 2018: one Gaussian release has delta(eps) = Phi(1/2z - eps z) - e^eps Phi(-1/2z - eps z)."""

    def phi(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    for multiplier in (0.5, 1.0, 3.0, 10.0):
        closed = epsilon_of("closed-form", [of(multiplier, 1)], 1e-5)
        found = epsilon_of("rdp", [of(multiplier, 1)], 1e-5)
        half = 1 / (2 * multiplier)
        exact_delta = phi(half - found * multiplier) - math.exp(found) * phi(-half - found * multiplier)
        assert exact_delta <= 1e-5
        assert found < closed


def test_sampling_in_secret_costs_less_and_only_the_rdp_accountant_counts_it():
    all_of_them = epsilon_of("rdp", [of(1.0, 100)], 1e-5)
    sampled = epsilon_of("rdp", [of(1.0, 100, 0.1)], 1e-5)
    assert sampled < all_of_them / 5
    assert epsilon_of("rdp", [of(1.0, 100, 0.01)], 1e-5) < sampled
    with pytest.raises(ConfigError, match="accountant must be 'rdp' where clients are drawn"):
        epsilon_of("closed-form", [of(1.0, 100, 0.1)], 1e-5)


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0])
def test_bisection_ends_at_epsilon_and_never_above(accountant, epsilon):
    multiplier = smallest_multiplier(accountant, epsilon, 1e-6, 300)
    spent = epsilon_of(accountant, [of(multiplier, 300)], 1e-6)
    assert epsilon * (1 - 1e-6) < spent <= epsilon


def test_an_epsilon_out_of_reach_is_refused():
    with pytest.raises(ConfigError, match="epsilon must be one that some noise reaches"):
        smallest(lambda factor: 1.0, 0.5)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: epsilon_of("moments", [], 1e-5), "accountant must be one of 'closed-form', 'rdp', got 'moments'"),
        (lambda: epsilon_of("rdp", [], 0.0), "delta must be a number in"),
        (lambda: smallest_multiplier("rdp", 0.0, 1e-5, 3), "epsilon must be a number above 0"),
        (lambda: smallest_multiplier("rdp", 1.0, 1e-5, 0), "rounds must be an integer of at least 1"),
    ],
)
def test_bad_values_are_refused(call, said):
    with pytest.raises(ConfigError, match=said):
        call()


def test_without_dp_accounting_the_closed_form_works_and_rdp_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("dp_accounting"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert epsilon_of("closed-form", [of(31.7, 12)], 1e-5) > 0
    with pytest.raises(CompatibilityError, match=r'pip install "torch-distopt\[privacy\]"'):
        epsilon_of("rdp", [of(31.7, 12)], 1e-5)
    import torch

    data = ClientData((torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)), [np.arange(2), np.arange(2, 4)])
    settings = {"num_clients": 2, "fewest_samples": 2}
    Simulation(model=torch.nn.Linear(2, 2), clients=data, algorithm=DIFF2(**settings)).run(1)
    with pytest.raises(CompatibilityError, match=r"torch-distopt\[privacy\]"):
        Simulation(model=torch.nn.Linear(2, 2), clients=data, algorithm=DIFF2(accountant="rdp", **settings))

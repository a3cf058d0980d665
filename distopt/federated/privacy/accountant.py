"""What releases cost together: epsilon at a delta, of Gaussian noise, by either of two accountants.

"closed-form" needs nothing but this file. A release with noise multiplier z (standard deviation over sensitivity) has
Rényi divergence alpha / (2 z^2) of order alpha; divergences add up to alpha rho, and a guarantee of order alpha gives

    epsilon = alpha rho + ln(1/delta) / (alpha - 1),   at the best alpha   epsilon = rho + 2 sqrt(rho ln(1/delta))

(Mironov, *Rényi Differential Privacy*, CSF 2017; Bun & Steinke, *Concentrated Differential Privacy*, TCC 2016). This is
the conversion that the paper of DIFF2 uses. "rdp" is the RDP accountant of Google's dp-accounting, which converts more
tightly and also counts what is gained where each client is drawn by chance and in secret.

Limits: neither is exact; the real epsilon of a Gaussian mechanism is smaller still.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from distopt.config import check_choice, check_count, check_number
from distopt.errors import CompatibilityError, ConfigError
from distopt.federated.checks import check_above_zero

CLOSED_FORM, RDP = "closed-form", "rdp"
ACCOUNTANTS = (CLOSED_FORM, RDP)
_MOST_MULTIPLIER = 1e6
_PRECISION = 1e-9  # relative, of a noise multiplier that is searched
# Of fractional orders dp-accounting's series for sampled releases may not converge; integers lose next to nothing.
_ORDERS_OF_SAMPLED = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024)


@dataclass(frozen=True, kw_only=True)
class Releases:
    """Some releases of one kind.

    Attributes:
        noise_multiplier: Standard deviation of the noise over the sensitivity, above 0.
        count: How many.
        sampling: The probability with which a client is drawn, in secret and by itself; 1 for all in each round.
    """

    noise_multiplier: float
    count: int
    sampling: float = 1.0


def epsilon_of(accountant: str, releases: Sequence[Releases], delta: float) -> float:
    """The epsilon of all releases together; 0.0 of none.

    Args:
        accountant: One of `ACCOUNTANTS`.
        releases: In any order.
        delta: In (0, 1).

    Raises:
        ConfigError: A value breaks its rule, or sampling is to be counted by the closed form.
        CompatibilityError: dp-accounting is asked for and not installed.
    """
    check_choice("accountant", accountant, ACCOUNTANTS)
    check_delta(delta)
    counted = tuple(each for each in releases if each.count)
    if not counted:
        return 0.0
    return _closed_form(counted, delta) if accountant == CLOSED_FORM else _rdp(counted, delta)


@lru_cache
def smallest_multiplier(accountant: str, epsilon: float, delta: float, rounds: int, *, sampling: float = 1.0) -> float:
    """The noise multiplier with which `rounds` releases cost at most epsilon, found by bisection.

    Raises:
        ConfigError: A value breaks its rule.
        CompatibilityError: dp-accounting is asked for and not installed.
    """
    check_epsilon(epsilon)
    check_count("rounds", rounds, low=1, remedy="give how many rounds share the epsilon")

    def cost(multiplier: float) -> float:
        releases = Releases(noise_multiplier=multiplier, count=rounds, sampling=sampling)
        return epsilon_of(accountant, [releases], delta)

    return smallest(cost, epsilon)


def smallest(cost: Callable[[float], float], epsilon: float) -> float:
    """The smallest factor whose cost is at most epsilon, to a billionth and never below; the cost falls with it."""
    low, high = 0.0, 1.0
    while cost(high) > epsilon:
        low, high = high, 2 * high
        if high > _MOST_MULTIPLIER:
            raise ConfigError(f"epsilon must be one that some noise reaches, got {epsilon!r}; use a larger one")
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        low, high = (middle, high) if middle == 0.0 or cost(middle) > epsilon else (low, middle)
    return high


def check_epsilon(epsilon: object) -> None:
    """Raises `ConfigError` unless epsilon is a finite number above 0."""
    remedy = "use 3.0; a smaller one needs more noise"
    check_above_zero("epsilon", epsilon, remedy=remedy)


def check_delta(delta: object) -> None:
    """Raises `ConfigError` unless delta is in (0, 0.1]."""
    remedy = "use 1e-5, well below one over the number of those who are protected"
    check_number("delta", delta, rule="a number in (0, 0.1]", remedy=remedy, low=0.0, high=0.1)


def check_installed(accountant: str) -> None:
    """Raises `CompatibilityError` if the accountant needs dp-accounting and it is not installed."""
    if accountant == RDP:
        _dp_accounting()


def _closed_form(releases: Sequence[Releases], delta: float) -> float:
    if any(each.sampling < 1.0 for each in releases):
        raise ConfigError(
            f"accountant must be {RDP!r} where clients are drawn with a probability, got {CLOSED_FORM!r}, which cannot "
            "count what that gains; use accountant='rdp'"
        )
    rho = sum(each.count / (2 * each.noise_multiplier**2) for each in releases)
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))


@lru_cache(maxsize=4096)
def _rdp(releases: tuple[Releases, ...], delta: float) -> float:
    dp, rdp = _dp_accounting()
    sampled = any(each.sampling < 1.0 for each in releases)
    accountant = rdp.RdpAccountant(_ORDERS_OF_SAMPLED if sampled else None)
    for each in releases:
        event = dp.GaussianDpEvent(each.noise_multiplier)
        if each.sampling < 1.0:
            event = dp.PoissonSampledDpEvent(each.sampling, event)
        accountant.compose(event, each.count)
    return float(accountant.get_epsilon(delta))


def _dp_accounting() -> tuple[Any, Any]:
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError as error:
        raise CompatibilityError(
            f"accountant 'rdp' needs dp-accounting, which is not installed ({error}); pip install "
            '"torch-distopt[privacy]", or use accountant="closed-form", which adds 13 to 15% more noise'
        ) from error
    return dp_accounting, rdp

"""How much noise DIFF2 needs for an epsilon: the paper's closed form, or as much of it as an accountant asks for.

Murata & Suzuki, *DIFF2: Differential Private Optimization via Gradient Differences for Nonconvex Distributed Learning*,
ICML 2023, 2302.03884. In R rounds, of which ceil(R/T) restart, with n the samples of the smallest of P clients:

    alpha = 1 + ceil(2 ln(1/delta) / epsilon)
    s1^2 = c1 alpha ceil(R/T) / (n^2 P^2 epsilon),   c1 = 4u if T > 1, else 4
    s2^2 = 4u/(u-1) alpha R / (n^2 P^2 epsilon),     u = 1.25

The noise on the *mean over the clients* has the standard deviation C1 s1 in a restart and C2 ||x_r - x_{r-1}|| s2 in
the other rounds. Replacing one sample moves those means by at most 2 C1/(n P) and 2 C2 ||x_r - x_{r-1}||/(n P), so the
noise multipliers, which an accountant counts, are s n P / 2. `accounted` keeps the ratio of s1 and s2, and takes the
smallest factor of both with which all rounds cost epsilon.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from distopt.config import check_choice, check_count
from distopt.federated.privacy.accountant import (
    ACCOUNTANTS,
    CLOSED_FORM,
    Releases,
    check_delta,
    check_epsilon,
    epsilon_of,
    smallest,
)

_U = 1.25


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A DIFF2 job, as far as its noise depends on it.

    Attributes:
        epsilon: Of all rounds together.
        delta: Likewise.
        rounds: R.
        interval: T, from one restart to the next; 1 is DP-GD.
        fewest_samples: n, of the client that has the fewest.
        num_clients: P.
    """

    epsilon: float
    delta: float
    rounds: int
    interval: int
    fewest_samples: int
    num_clients: int

    def __post_init__(self) -> None:
        check_epsilon(self.epsilon)
        check_delta(self.delta)
        check_count("rounds", self.rounds, low=1, remedy="give how many rounds share the epsilon")
        check_count("interval", self.interval, low=1, remedy="use 20; 1 is DP-GD")
        check_count("fewest_samples", self.fewest_samples, low=1, remedy="give the samples of the smallest client")
        check_count("num_clients", self.num_clients, low=1, remedy="give how many clients take part")

    @property
    def restarts(self) -> int:
        """How many rounds restart, ceil(R/T)."""
        return -(-self.rounds // self.interval)


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Standard deviations on the mean over the clients.

    Attributes:
        restart: s1, in units of C1.
        difference: s2, in units of C2 ||x_r - x_{r-1}||.
    """

    restart: float
    difference: float


def calibrated(accountant: str, plan: Plan) -> Noise:
    """The noise of a plan, by "closed-form" or "rdp".

    Raises:
        ConfigError: There is no such accountant.
        CompatibilityError: dp-accounting is asked for and not installed.
    """
    check_choice("accountant", accountant, ACCOUNTANTS)
    return closed_form(plan) if accountant == CLOSED_FORM else accounted(accountant, plan)


def closed_form(plan: Plan) -> Noise:
    """The paper's s1 and s2, see the module."""
    alpha = 1 + math.ceil(2 * math.log(1 / plan.delta) / plan.epsilon)
    c1 = 4 * _U if plan.interval > 1 else 4.0
    unit = alpha / (plan.fewest_samples**2 * plan.num_clients**2 * plan.epsilon)
    return Noise(
        restart=math.sqrt(c1 * unit * plan.restarts),
        difference=math.sqrt(4 * _U / (_U - 1) * unit * plan.rounds),
    )


@lru_cache
def accounted(accountant: str, plan: Plan) -> Noise:
    """The smallest multiple of the closed form with which all rounds cost at most epsilon by the accountant."""
    start = closed_form(plan)

    def scaled(factor: float) -> Noise:
        return Noise(restart=factor * start.restart, difference=factor * start.difference)

    counts = plan.restarts, plan.rounds - plan.restarts

    def cost(factor: float) -> float:
        return epsilon_of(accountant, releases(scaled(factor), plan, *counts), plan.delta)

    return scaled(smallest(cost, plan.epsilon))


def releases(noise: Noise, plan: Plan, restarts: int, differences: int) -> tuple[Releases, Releases]:
    """What an accountant is told of so many rounds of each kind."""
    half = plan.fewest_samples * plan.num_clients / 2
    return (
        Releases(noise_multiplier=noise.restart * half, count=restarts),
        Releases(noise_multiplier=noise.difference * half, count=differences),
    )

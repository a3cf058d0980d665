"""Partitions that do not look at the labels: equal sizes, and sizes that differ by a law.

Both give every client a random sample of the whole data, so only the amounts of data are uneven, never its kind.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distopt.config import check_choice, check_count, check_number
from distopt.federated.partition.base import IntArray, Partition, check_minimum, equal_sizes


@dataclass(frozen=True, kw_only=True)
class IIDPartition(Partition, name="iid"):
    """Every client gets a random sample; sizes differ by at most one."""

    def _owners(self, values: NDArray[Any], num_clients: int, rng: np.random.Generator) -> IntArray:
        return _dealt(equal_sizes(len(values), num_clients), rng)


@dataclass(frozen=True, kw_only=True)
class QuantityPartition(Partition, name="quantity"):
    """Every client gets a random sample, and the sizes follow a law.

    `dirichlet`: the shares of the data are one draw of Dir(alpha). `power-law`: the client of rank r, counted from 1,
    has a share in proportion to r^-exponent; which client has which rank is random. The shares divide what is left
    when every client has `min_samples`, rounded so that all of it is used.

    Raises:
        ConfigError: A value breaks its rule.
    """

    law: str = "dirichlet"  # or "power-law"
    alpha: float = 1.0  # of dirichlet: smaller makes the sizes more uneven
    exponent: float = 1.0  # of power-law: larger gives the first ranks more
    min_samples: int = 1  # larger makes the sizes more even; 0 lets clients have none

    def __post_init__(self) -> None:
        check_choice("law", self.law, ("dirichlet", "power-law"))
        check_alpha(self.alpha)
        remedy = "use 1.0, or an IID partition for equal sizes"
        check_number("exponent", self.exponent, rule="a number in (0, 20]", remedy=remedy, low=0.0, high=20.0)
        check_count("min_samples", self.min_samples, low=0, remedy="use 1 so that nobody is without data")

    def _owners(self, values: NDArray[Any], num_clients: int, rng: np.random.Generator) -> IntArray:
        check_minimum(self.min_samples, len(values), num_clients)
        if self.law == "dirichlet":
            shares = rng.dirichlet(np.full(num_clients, self.alpha))
        else:
            weights = np.arange(1, num_clients + 1, dtype=np.float64) ** -self.exponent
            shares = rng.permutation(weights / weights.sum())
        spare = len(values) - self.min_samples * num_clients
        return _dealt(self.min_samples + apportioned(spare, shares), rng)


def apportioned(total: int, shares: NDArray[np.float64]) -> IntArray:
    """Integers that sum to `total`, in proportion to `shares`, which sum to 1: the largest remainders go up."""
    exact = shares * total
    counts: IntArray = np.floor(exact).astype(np.int64)
    left = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:left]] += 1
    return counts


def check_alpha(value: object) -> None:
    """Raises `ConfigError` unless value is a concentration of a Dirichlet distribution."""
    remedy = "use 0.1 for a very uneven split, 100 for a nearly even one"
    check_number("alpha", value, rule="a number in (0, 1e6]", remedy=remedy, low=0.0, high=1e6)


def _dealt(sizes: IntArray, rng: np.random.Generator) -> IntArray:
    """Owners at random, `sizes[i]` times client i."""
    return rng.permutation(np.repeat(np.arange(len(sizes), dtype=np.int64), sizes))

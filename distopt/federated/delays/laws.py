"""Delays by a law: a mean for each client, times a random number of mean 1."""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from distopt.config import check_count, check_number
from distopt.errors import ConfigError
from distopt.federated.delays.base import DelayProcess, Delays, FloatArray
from distopt.federated.per_client import PerClient, checked, for_clients
from distopt.federated.randomness import stream


@dataclass(frozen=True, kw_only=True)
class _Scaled(Delays):
    """A mean per client, times a random number of mean 1 that is drawn alike for all."""

    mean_s: PerClient = 1.0  # of all, or one for each: larger is slower
    slowest: float = 1.0  # the last client takes so many times mean_s, the first mean_s, those between linearly

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean_s", _checked_mean(self.mean_s))
        remedy = "use 5.0 for a last client that takes five times as long as the first, 1.0 for equal ones"
        if isinstance(self.slowest, bool) or self.slowest != 1:
            check_number("slowest", self.slowest, rule="a number of at least 1", remedy=remedy, low=1.0, high=1e9)
            if isinstance(self.mean_s, tuple):
                raise ConfigError(
                    f"slowest must be 1.0 with a mean_s for each client, got {self.slowest!r}; leave it out"
                )

    def begin(self, num_clients: int, seed: int = 0) -> DelayProcess:
        """See `Delays.begin`."""
        check_count("num_clients", num_clients, low=1, remedy="give the number of clients")
        mean_s = for_clients("mean_s", self.mean_s, num_clients) * np.linspace(1.0, self.slowest, num_clients)
        return _ScaledProcess(self, mean_s, seed)

    @abstractmethod
    def factor(self, rng: np.random.Generator) -> float:
        """A positive random number of mean 1."""


class _ScaledProcess(DelayProcess):
    def __init__(self, configuration: _Scaled, mean_s: FloatArray, seed: int) -> None:
        super().__init__(configuration.name, mean_s, seed, may_grow=True)
        self._configuration = configuration
        self._factor: Callable[[np.random.Generator], float] = configuration.factor

    def _seconds(self, client: int, work: int) -> float:
        return float(self.mean_s[client]) * self._factor(stream(self._key, client, work))

    def _mean_of_joined(self, num_clients: int, mean_s: Any) -> FloatArray:
        if mean_s is None and (isinstance(self._configuration.mean_s, tuple) or self._configuration.slowest != 1):
            raise ConfigError(
                "mean_s must be given for clients that join where clients differ by the configuration, got None; "
                "give theirs"
            )
        rule, remedy = "a positive number of seconds", "use 1.0"
        given = self._configuration.mean_s if mean_s is None else mean_s
        return for_clients(
            "mean_s", checked("mean_s", given, rule=rule, remedy=remedy, low=0.0, high=1e12), num_clients
        )


@dataclass(frozen=True, kw_only=True)
class ConstantDelays(_Scaled, name="constant"):
    """Every work of a client takes its mean.

    Raises:
        ConfigError: A value breaks its rule.
    """

    def factor(self, rng: np.random.Generator) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class UniformDelays(_Scaled, name="uniform"):
    """A client's work takes between (1 - spread) and (1 + spread) times its mean, uniformly.

    Raises:
        ConfigError: A value breaks its rule.
    """

    spread: float = 0.5  # larger makes a client's works differ more

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = "use 0.5 for half to one and a half times the mean"
        check_number("spread", self.spread, rule="a number in (0, 1]", remedy=remedy, low=0.0, high=1.0)

    def factor(self, rng: np.random.Generator) -> float:
        """Uniform in (1 - spread, 1 + spread]."""
        return 1.0 + self.spread * (1.0 - 2.0 * rng.random())


@dataclass(frozen=True, kw_only=True)
class ExponentialDelays(_Scaled, name="exponential"):
    """A client's work takes an exponential time: what remains of it does not depend on how long it has gone on.

    Raises:
        ConfigError: A value breaks its rule.
    """

    def factor(self, rng: np.random.Generator) -> float:
        """Exponential with mean 1."""
        return max(float(rng.standard_exponential()), math.ulp(0.0))


@dataclass(frozen=True, kw_only=True)
class HeavyTailedDelays(_Scaled, name="heavy-tailed"):
    """A client's work takes a Pareto time: P(X > x) = (least / x)^tail from least = mean (tail - 1) / tail on.

    So most works take a little less than the mean, and a few very much longer. The variance is infinite for
    tail <= 2, so the average of few works may be far from the mean.

    Raises:
        ConfigError: A value breaks its rule.
    """

    tail: float = 2.0  # index, above 1: smaller makes the rare long works longer

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = "use 2.0; from 1 down there is no mean"
        check_number("tail", self.tail, rule="a number above 1", remedy=remedy, low=1.0, high=1e6)

    def factor(self, rng: np.random.Generator) -> float:
        """Pareto with mean 1."""
        return (self.tail - 1) / self.tail * (1.0 + float(rng.pareto(self.tail)))


def _checked_mean(value: Any) -> PerClient:
    return checked("mean_s", value, rule="a positive number of seconds", remedy="use 1.0", low=0.0, high=1e12)

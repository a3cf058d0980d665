"""The server chooses: a fixed number of clients per round, or everybody.

Source: McMahan et al., AISTATS 2017, algorithm 1: max(C K, 1) of K clients, uniformly, without replacement.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from distopt.config import check_count, check_number
from distopt.errors import ConfigError
from distopt.federated.participation.base import (
    FloatArray,
    IntArray,
    Participation,
    ParticipationProcess,
    check_no_probability,
)
from distopt.federated.process_state import check_saved
from distopt.federated.randomness import check_seed, generator, generator_state, load_generator_state

_TENTH = 0.1


@dataclass(frozen=True, kw_only=True)
class UniformSampling(Participation, name="uniform"):
    """Some of the clients per round, uniformly and without replacement: every set of that size is equally likely.

    Raises:
        ConfigError: A value breaks its rule.
    """

    fraction: float | None = None  # of the clients, to the nearest number and at least one: more make a round dearer
    count: int | None = None  # of the clients; where neither is given, a tenth of them take part

    def __post_init__(self) -> None:
        if self.fraction is not None:
            rule, remedy = "a number in (0, 1]", "use 0.1 for 10%"
            check_number("fraction", self.fraction, rule=rule, remedy=remedy, low=0.0, high=1.0)
            if self.count is not None:
                raise ConfigError(
                    f"fraction must be left out beside count={self.count}, got {self.fraction}; give one of them"
                )
        if self.count is not None:
            check_count("count", self.count, low=1, remedy="give the number of clients per round, or use fraction")

    def count_of(self, num_clients: int) -> int:
        """How many of so many clients take part.

        Raises:
            ConfigError: `count` is more than there are.
        """
        if self.count is None:
            return max(1, round((_TENTH if self.fraction is None else self.fraction) * num_clients))
        if self.count > num_clients:
            raise ConfigError(
                f"count must be at most the number of clients, {num_clients}, got {self.count}; use a fraction"
            )
        return self.count

    def begin(self, num_clients: int, seed: int = 0) -> "UniformSamplingProcess":
        """See `Participation.begin`."""
        return UniformSamplingProcess(self, num_clients, seed)


class UniformSamplingProcess(ParticipationProcess):
    """The process of `UniformSampling`."""

    name = "uniform"
    keys = ("generator", "count")

    def __init__(self, configuration: UniformSampling, num_clients: int, seed: int) -> None:
        super().__init__(num_clients)
        self._configuration = configuration
        self._count = configuration.count_of(num_clients)
        self._rng = generator(seed, "participation uniform")

    @property
    def probabilities(self) -> FloatArray:
        """See `ParticipationProcess.probabilities`."""
        return np.full(self.num_clients, self._count / self.num_clients)

    def next_round(self) -> IntArray:
        """See `ParticipationProcess.next_round`."""
        chosen = self._rng.choice(self.num_clients, self._count, replace=False, shuffle=False)
        return np.sort(chosen.astype(np.int64, copy=False))

    def _join(self, num_clients: int, probability: Any) -> None:
        check_no_probability(self.name, probability)
        self._count = self._configuration.count_of(self.num_clients + num_clients)

    def _values(self) -> dict[str, Any]:
        return {"generator": generator_state(self._rng), "count": self._count}

    def _take(self, values: dict[str, Any]) -> None:
        count = self._configuration.count_of(values["num_clients"])
        check_saved("count", values["count"], count)
        load_generator_state(self._rng, values["generator"])
        self._count = count


@dataclass(frozen=True, kw_only=True)
class Everybody(Participation, name="everybody"):
    """All clients take part in every round."""

    def begin(self, num_clients: int, seed: int = 0) -> "EverybodyProcess":
        """See `Participation.begin`."""
        check_seed(seed)
        return EverybodyProcess(num_clients)


class EverybodyProcess(ParticipationProcess):
    """The process of `Everybody`."""

    name = "everybody"
    keys = ()

    @property
    def probabilities(self) -> FloatArray:
        """See `ParticipationProcess.probabilities`."""
        return np.ones(self.num_clients)

    def next_round(self) -> IntArray:
        """See `ParticipationProcess.next_round`."""
        return np.arange(self.num_clients, dtype=np.int64)

    def _join(self, num_clients: int, probability: Any) -> None:
        check_no_probability(self.name, probability)

    def _values(self) -> dict[str, Any]:
        return {}

    def _take(self, values: dict[str, Any]) -> None:
        pass

"""Clients with a probability each: independent rounds, a chain of available and unavailable rounds, and cycles.

Source: Wang & Ji, *A Lightweight Method for Tackling Unknown Participation Statistics in Federated Averaging*, ICLR
2024, whose defaults these are.

Limits: clients are independent of each other; an array of 8 bytes per client goes through a generator in each round of
Bernoulli and Markov.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distopt.config import check_count, check_number
from distopt.errors import ConfigError
from distopt.federated.participation.base import FloatArray, IntArray, Participation, ParticipationProcess
from distopt.federated.per_client import PerClient, checked, for_clients
from distopt.federated.process_state import check_same_start, check_saved
from distopt.federated.randomness import generator, generator_state, load_generator_state


def checked_probability(value: Any) -> PerClient:
    """One probability, or a tuple of one per client.

    Raises:
        ConfigError: One is not in (0, 1].
    """
    remedy = "use 0.1 for one round in ten; leave a client out that never takes part"
    return checked("probability", value, rule="a number in (0, 1]", remedy=remedy, low=0.0, high=1.0)


@dataclass(frozen=True, kw_only=True)
class _WithProbability(Participation):
    probability: PerClient = 0.1  # for all, or one for each: larger makes clients take part more often

    def __post_init__(self) -> None:
        object.__setattr__(self, "probability", checked_probability(self.probability))


class _ChancesProcess(ParticipationProcess):
    """Holds the probabilities, and what else there is per client, in arrays that grow."""

    def __init__(self, probability: PerClient, num_clients: int, seed: int) -> None:
        super().__init__(num_clients)
        self._default = probability
        self._probability = for_clients("probability", probability, num_clients)
        self._rng = generator(seed, f"participation {self.name}")

    @property
    def probabilities(self) -> FloatArray:
        """See `ParticipationProcess.probabilities`."""
        return self._probability.copy()

    @abstractmethod
    def _enter(self, probability: FloatArray) -> None:
        """Begins the rounds of more clients."""

    def _join(self, num_clients: int, probability: Any) -> None:
        given = self._default if probability is None else checked_probability(probability)
        if probability is None and isinstance(given, tuple):
            raise ConfigError(
                "probability must be given for clients that join where the configuration has one for each client, "
                "got None; give theirs"
            )
        more = for_clients("probability", given, num_clients)
        self._enter(more)
        self._probability = np.concatenate([self._probability, more])

    def _values(self) -> dict[str, Any]:
        return {"generator": generator_state(self._rng), "probability": self._probability}

    def _take(self, values: dict[str, Any]) -> None:
        check_same_start("probability", values["probability"], self._probability)
        load_generator_state(self._rng, values["generator"])
        self._probability = values["probability"]


@dataclass(frozen=True, kw_only=True)
class Bernoulli(_WithProbability, name="bernoulli"):
    """In every round every client takes part with its probability, independently.

    Raises:
        ConfigError: A probability breaks its rule.
    """

    def begin(self, num_clients: int, seed: int = 0) -> "BernoulliProcess":
        """See `Participation.begin`."""
        return BernoulliProcess(self.probability, num_clients, seed)


class BernoulliProcess(_ChancesProcess):
    """The process of `Bernoulli`."""

    name = "bernoulli"
    keys = ("generator", "probability")

    def next_round(self) -> IntArray:
        """See `ParticipationProcess.next_round`."""
        return _ids(self._rng.random(self.num_clients) < self._probability)

    def _enter(self, probability: FloatArray) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Markov(_WithProbability, name="markov"):
    """A client that takes part goes on taking part for a while: a chain of two states whose stationary share is p.

    P(off to on) = a and P(on to off) = a (1/p - 1); where that is above 1, both are divided by it. The first round is
    drawn from the stationary state, Bernoulli(p).

    Raises:
        ConfigError: A value breaks its rule.
    """

    off_to_on: float = 0.05  # a: smaller makes longer runs of rounds, both on and off

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = "the paper uses 0.05"
        check_number("off_to_on", self.off_to_on, rule="a number in (0, 1]", remedy=remedy, low=0.0, high=1.0)

    def begin(self, num_clients: int, seed: int = 0) -> "MarkovProcess":
        """See `Participation.begin`."""
        return MarkovProcess(self, num_clients, seed)


class MarkovProcess(_ChancesProcess):
    """The process of `Markov`."""

    name = "markov"
    keys = ("generator", "probability", "active", "off_to_on")

    def __init__(self, configuration: Markov, num_clients: int, seed: int) -> None:
        super().__init__(configuration.probability, num_clients, seed)
        self._rate = configuration.off_to_on
        self._active: NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)  # in the next round
        self._off_to_on, self._on_to_off = self.transitions(self._probability)
        self._enter(self._probability)

    def transitions(self, probability: FloatArray) -> tuple[FloatArray, FloatArray]:
        """P(off to on) and P(on to off) of clients with these probabilities, both of their shape."""
        on_to_off = self._rate * (1 / probability - 1)
        excess = np.maximum(on_to_off, 1.0)
        return self._rate / excess, on_to_off / excess

    def next_round(self) -> IntArray:
        """See `ParticipationProcess.next_round`."""
        clients = _ids(self._active)
        draws = self._rng.random(self.num_clients)
        self._active = np.where(self._active, draws >= self._on_to_off, draws < self._off_to_on)
        return clients

    def _enter(self, probability: FloatArray) -> None:
        self._active = np.concatenate([self._active, self._rng.random(len(probability)) < probability])

    def _join(self, num_clients: int, probability: Any) -> None:
        super()._join(num_clients, probability)
        self._off_to_on, self._on_to_off = self.transitions(self._probability)

    def _values(self) -> dict[str, Any]:
        return {**super()._values(), "active": self._active, "off_to_on": self._rate}

    def _take(self, values: dict[str, Any]) -> None:
        check_saved("off_to_on", values["off_to_on"], self._rate)
        super()._take(values)
        self._active = values["active"]
        self._off_to_on, self._on_to_off = self.transitions(self._probability)


@dataclass(frozen=True, kw_only=True)
class Cyclic(_WithProbability, name="cyclic"):
    """Every client takes part in round(p period) rounds one after the other, and then not until the period is over.

    Each client's first such round is random. Unlike the paper's, a client takes part at least once per period.

    Raises:
        ConfigError: A value breaks its rule.
    """

    period: int = 100  # in rounds: longer makes the absences longer

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("period", self.period, low=1, remedy="the paper uses 100 rounds")

    def begin(self, num_clients: int, seed: int = 0) -> "CyclicProcess":
        """See `Participation.begin`."""
        return CyclicProcess(self, num_clients, seed)


class CyclicProcess(_ChancesProcess):
    """The process of `Cyclic`."""

    name = "cyclic"
    keys = ("generator", "probability", "phase", "round", "period")

    def __init__(self, configuration: Cyclic, num_clients: int, seed: int) -> None:
        super().__init__(configuration.probability, num_clients, seed)
        self._period = configuration.period
        self._round = 0  # within the period
        self._phase: IntArray = np.zeros(0, dtype=np.int64)
        self._enter(self._probability)

    @property
    def probabilities(self) -> FloatArray:
        """The exact share of rounds, (num_clients,): the number of active rounds divided by the period."""
        return self._active_rounds / self._period

    @property
    def _active_rounds(self) -> IntArray:
        return np.maximum(1, np.rint(self._probability * self._period)).astype(np.int64)

    def next_round(self) -> IntArray:
        """See `ParticipationProcess.next_round`."""
        clients = _ids((self._round + self._phase) % self._period < self._active_rounds)
        self._round = (self._round + 1) % self._period
        return clients

    def _enter(self, probability: FloatArray) -> None:
        self._phase = np.concatenate([self._phase, self._rng.integers(0, self._period, len(probability))])

    def _values(self) -> dict[str, Any]:
        return {**super()._values(), "phase": self._phase, "round": self._round, "period": self._period}

    def _take(self, values: dict[str, Any]) -> None:
        check_saved("period", values["period"], self._period)
        super()._take(values)
        self._phase, self._round = values["phase"], values["round"]


def _ids(active: NDArray[np.bool_]) -> IntArray:
    return np.flatnonzero(active).astype(np.int64, copy=False)

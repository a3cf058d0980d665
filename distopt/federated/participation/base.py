"""What every participation model promises: a round's clients are sorted ids, and a resumed run goes on bit by bit.

A model is a configuration; `begin` makes the process that a run asks for one round after the other.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from distopt.config import Configurable, check_count
from distopt.errors import ConfigError
from distopt.federated.process_state import from_state, to_state

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


class ParticipationProcess(ABC):
    """Who takes part, round by round.

    Attributes:
        num_clients: How many clients there are.
    """

    name: ClassVar[str]  # of the model, as in its configuration
    keys: ClassVar[tuple[str, ...]]  # of the state, beside its header
    may_grow: ClassVar[bool] = True

    def __init__(self, num_clients: int) -> None:
        check_count("num_clients", num_clients, low=1, remedy="give the number of clients")
        self.num_clients = num_clients

    @property
    @abstractmethod
    def probabilities(self) -> FloatArray | None:
        """(num_clients,) the share of rounds in which each client takes part in the long run; None where unknown."""

    @abstractmethod
    def next_round(self) -> IntArray:
        """The clients that take part in the next round: int64 ids, ascending; there may be none."""

    def add_clients(self, num_clients: int, probability: Any = None) -> None:
        """More clients join; they have the next ids and may take part from the next round on.

        Args:
            num_clients: How many.
            probability: Of their taking part, one number or one for each; None for the one number of the configuration.

        Raises:
            ConfigError: This model cannot say when they would take part, or a value breaks its rule.
        """
        check_count("num_clients", num_clients, low=1, remedy="give how many clients join")
        self._join(num_clients, probability)
        self.num_clients += num_clients

    def state_dict(self) -> dict[str, Any]:
        """Where the process is: plain values and tensors, which `torch.load(weights_only=True)` reads."""
        return to_state("participation", self.name, self.num_clients, self._values())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a process of the same configuration was, with the clients that had joined it.

        Raises:
            StateMismatchError: The state belongs to another model, configuration or number of clients.
        """
        values = from_state("participation", self.name, self.num_clients, self.keys, state, may_grow=self.may_grow)
        self._take(values)
        self.num_clients = values["num_clients"]

    @abstractmethod
    def _values(self) -> dict[str, Any]:
        """What the state holds, by `keys`."""

    @abstractmethod
    def _take(self, values: dict[str, Any]) -> None:
        """Takes the values back; changes nothing if it raises."""

    @abstractmethod
    def _join(self, num_clients: int, probability: Any) -> None:
        """What `add_clients` does beside counting; changes nothing if it raises."""


class Participation(Configurable, tag="participation"):
    """Base of the participation models."""

    @abstractmethod
    def begin(self, num_clients: int, seed: int = 0) -> ParticipationProcess:
        """A process at its first round.

        Args:
            num_clients: How many clients there are.
            seed: The same seed gives the same rounds.

        Raises:
            ConfigError: The model does not fit the number of clients.
        """


def check_no_probability(name: str, probability: Any) -> None:
    """Raises `ConfigError` if joining clients are given a probability that the model has no use for."""
    if probability is not None:
        raise ConfigError(f"probability must be None for {name!r} participation, got {probability!r}; leave it out")

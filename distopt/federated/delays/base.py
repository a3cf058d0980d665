"""How long a client takes for a round's work, for algorithms that do not wait for everybody, on a virtual clock.

The k-th work of a client takes the same time in every run of a seed, in whichever order clients are asked: two
algorithms can be compared on the same delays, and the state is only how much work each client has done.

Limits: a client's works are independent of each other; a time is drawn in about 25 microseconds.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distopt.config import Configurable, check_count
from distopt.errors import ConfigError
from distopt.federated.process_state import check_same_start, from_state, to_state
from distopt.federated.randomness import stream_key

FloatArray = NDArray[np.float64]


class DelayProcess(ABC):
    """How long each client's next work takes.

    Attributes:
        num_clients: How many clients there are.
        mean_s: (num_clients,) float64, the mean seconds of each client's work.
    """

    def __init__(self, name: str, mean_s: FloatArray, seed: int, *, may_grow: bool) -> None:
        self.num_clients = len(mean_s)
        self.mean_s = mean_s
        self._name, self._may_grow = name, may_grow
        self._key = stream_key(seed, f"delays {name}")
        self._done: NDArray[np.int64] = np.zeros(len(mean_s), dtype=np.int64)

    def next(self, client: int) -> float:
        """The seconds that the next work of a client takes, more than 0.

        Raises:
            ConfigError: There is no such client, or a trace has no more works of it.
        """
        if not 0 <= client < self.num_clients:
            raise ConfigError(f"client must be in [0, {self.num_clients}), got {client}; clients count from 0")
        seconds = self._seconds(int(client), int(self._done[client]))
        self._done[client] += 1
        return seconds

    @abstractmethod
    def _seconds(self, client: int, work: int) -> float:
        """Of the client's 0-based work: a function of its arguments and the seed alone."""

    def add_clients(self, num_clients: int, mean_s: Any = None) -> None:
        """More clients join; they have the next ids.

        Args:
            num_clients: How many.
            mean_s: Mean seconds of their work, one number or one for each; None for the configuration's one number.

        Raises:
            ConfigError: This model cannot say how long they take, or a value breaks its rule.
        """
        check_count("num_clients", num_clients, low=1, remedy="give how many clients join")
        self.mean_s = np.concatenate([self.mean_s, self._mean_of_joined(num_clients, mean_s)])
        self._done = np.concatenate([self._done, np.zeros(num_clients, dtype=np.int64)])
        self.num_clients += num_clients

    @abstractmethod
    def _mean_of_joined(self, num_clients: int, mean_s: Any) -> FloatArray:
        """(num_clients,) mean seconds of clients that join."""

    def state_dict(self) -> dict[str, Any]:
        """Where the process is: plain values and tensors, which `torch.load(weights_only=True)` reads."""
        values = {"key": list(self._key), "done": self._done, "mean_s": self.mean_s}
        return to_state("delays", self._name, self.num_clients, values)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a process of the same configuration was, with its seed and the clients that had joined it.

        Raises:
            StateMismatchError: The state belongs to another model, configuration or number of clients.
        """
        keys = ("key", "done", "mean_s")
        values = from_state("delays", self._name, self.num_clients, keys, state, may_grow=self._may_grow)
        check_same_start("mean_s", values["mean_s"], self.mean_s)
        self.num_clients, self.mean_s = values["num_clients"], values["mean_s"]
        self._key, self._done = list(values["key"]), values["done"]


class Delays(Configurable, tag="delays"):
    """Base of the models of delays."""

    @abstractmethod
    def begin(self, num_clients: int, seed: int = 0) -> DelayProcess:
        """A process in which no client has worked yet.

        Args:
            num_clients: How many clients there are.
            seed: The same seed gives the same times.

        Raises:
            ConfigError: The model does not fit the number of clients.
        """

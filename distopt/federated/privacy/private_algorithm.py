"""What an algorithm with differential privacy says besides its rule: what a round costs, and where its noise is from.

The ledger of releases and the source of noise lie among the counters of the server's memory, so the ledger is in every
checkpoint; the noise's key is in none.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from distopt.config import check_choice
from distopt.federated.algorithm import FederatedAlgorithm
from distopt.federated.memory import ServerMemory
from distopt.federated.privacy.accountant import (
    ACCOUNTANTS,
    CLOSED_FORM,
    Releases,
    check_delta,
    check_installed,
    epsilon_of,
)
from distopt.federated.privacy.ledger import Ledger
from distopt.federated.privacy.noise import NoiseSource, check_noise_seed

EPSILON, EPSILON_TO_SERVER, MISSED, CLIP = "epsilon", "epsilon_to_server", "missed", "clip"
COLUMNS = (EPSILON, EPSILON_TO_SERVER, MISSED, CLIP)
_LEDGER, _NOISE = "ledger", "noise"


@dataclass(frozen=True, kw_only=True)
class PrivateAlgorithm(FederatedAlgorithm):
    """Base of the private algorithms.

    Args:
        delta: Of (epsilon, delta).
        accountant: "closed-form", or "rdp", which needs dp-accounting.
        noise_seed: None draws noise from the operating system. A number repeats a simulation to the bit, and whoever
            knows it can take the noise away.

    Attributes:
        kinds: Of the releases that it makes.
    """

    delta: float = 1e-5  # smaller needs more noise; well below one over the number of those who are protected
    accountant: str = CLOSED_FORM  # "rdp" finds the same noise to cost less
    noise_seed: int | None = None  # a number is for simulations only

    kinds: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        check_delta(self.delta)
        check_choice("accountant", self.accountant, ACCOUNTANTS)
        check_noise_seed(self.noise_seed)

    # -- what it costs -------------------------------------------------------------------------------------------------

    @abstractmethod
    def releases(self, counts: Mapping[str, int]) -> Sequence[Releases]:
        """What the accountant is told of so many releases of each kind."""

    @abstractmethod
    def next_kind(self, memory: ServerMemory) -> str:
        """The kind of release that the coming round makes."""

    @property
    def most_epsilon(self) -> float:
        """What the settings promise: a run ends before a round that would pass it."""
        return math.inf

    def spent(self, memory: ServerMemory) -> float:
        """The epsilon of all releases so far."""
        return self._cost(self.ledger(memory).counts)

    def spent_after_another(self, memory: ServerMemory) -> float:
        """The epsilon after one more round."""
        return self._cost(self.ledger(memory).with_another(self.next_kind(memory)))

    def columns(self, memory: ServerMemory) -> dict[str, Any]:
        """What the history's row of the round that has just ended gets."""
        return {EPSILON: self.spent(memory)}

    def _cost(self, counts: Mapping[str, int]) -> float:
        return epsilon_of(self.accountant, self.releases(counts), self.delta)

    # -- server --------------------------------------------------------------------------------------------------------

    def begin(self, memory: ServerMemory) -> None:
        """See `FederatedAlgorithm.begin`.

        Raises:
            CompatibilityError: The accountant is not installed.
        """
        super().begin(memory)
        check_installed(self.accountant)
        memory.counters[_LEDGER] = Ledger(*self.kinds)
        memory.counters[_NOISE] = NoiseSource(self.noise_seed)

    def ledger(self, memory: ServerMemory) -> Ledger:
        """Of the releases."""
        found: Ledger = memory.counters[_LEDGER]
        return found

    def noise_source(self, memory: ServerMemory) -> NoiseSource:
        """Of the server."""
        found: NoiseSource = memory.counters[_NOISE]
        return found

    def share_secrets(
        self, memory: ServerMemory, said_by_leader: Callable[[Callable[[], list[int]]], list[int]]
    ) -> None:
        """Lets several processes that compute one server draw the same noise; see `Exchange.said_by_leader`."""
        self.noise_source(memory).share(said_by_leader)

    def trust_in_rest(self, weights: Sequence[float]) -> float:
        """Not at all: a mean without noise would tell about the data."""
        return 0.0

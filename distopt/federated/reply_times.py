"""Unbiased weights for servers that do not wait, from the times that clients take where those are known."""

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from distopt.errors import ConfigError
from distopt.federated.arrivals import TakesOldReplies
from distopt.federated.gap_weights import GapWeighted
from distopt.federated.memory import ServerMemory
from distopt.federated.per_client import PerClient, checked, for_clients


@dataclass(frozen=True, kw_only=True)
class Timed(TakesOldReplies, GapWeighted):
    """`GapWeighted`, with gaps that follow from the clients' times or, without these, are estimated.

    Args:
        times_s: tau_k, seconds from one reply of client k to its next, one for each client or one for all; right where
            clients begin anew at once. None estimates what is needed of them, also where they pause.
        max_staleness: See `TakesOldReplies`.
        weighting: p_k, see `GapWeighted`.
        cutoff: Of the estimate, see `ParticipationWeights`.
        server_lr: See `SteppingServer`.
        server_optimizer: See `SteppingServer`.
    """

    times_s: PerClient | None = None
    cutoff: float = math.inf

    def __post_init__(self) -> None:
        GapWeighted.__post_init__(self)
        TakesOldReplies.__post_init__(self)
        if self.times_s is not None:
            rule, remedy = "a positive number of seconds", "leave it out if it is not known"
            times = checked("times_s", self.times_s, rule=rule, remedy=remedy, low=0.0, high=1e12)
            object.__setattr__(self, "times_s", times)

    @abstractmethod
    def gaps_of(self, times_s: Tensor) -> Tensor:
        """(num_clients,) float64, aggregations from one reply of a client to its next, from the times of all."""

    def begin(self, memory: ServerMemory) -> None:
        """Also checks that there is a time for each client."""
        super().begin(memory)
        self.gaps(memory)

    def gaps(self, memory: ServerMemory) -> Tensor:
        """See `GapWeighted.gaps`."""
        if self.times_s is None:
            return super().gaps(memory)
        return self.gaps_of(torch.from_numpy(for_clients("times_s", self.times_s, memory.num_clients)))

    def add_clients(self, memory: ServerMemory, count: int) -> None:
        """See `FederatedAlgorithm.add_clients`.

        Raises:
            ConfigError: The times were given one by one, and there are none for those who join.
        """
        if count and isinstance(self.times_s, tuple):
            raise ConfigError(
                f"times_s must be one number or left out where clients join, got {len(self.times_s)}; begin anew with "
                "one for each client, or leave it out, and what is needed of them is estimated"
            )
        super().add_clients(memory, count)

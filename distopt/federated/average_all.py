"""The sum of all deltas divided by the number of registered clients: who is away counts as an update of zero.

A baseline of Wang & Ji, *A Lightweight Method for Tackling Unknown Participation Statistics in Federated Averaging*,
ICLR 2024: `x + eta_g (1/N) sum_S Delta_k`.

Limits: the mean over rounds leans towards clients that come often, as FedAvg's does. Steps are as short as few clients
reply, so eta_g must make up for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from distopt.federated.deltas import SummedDeltas
from distopt.federated.memory import ServerMemory
from distopt.federated.messages import Reply


@dataclass(frozen=True, kw_only=True)
class AverageAll(SummedDeltas, name="average-all"):
    """Weights 1/N; see the module.

    Args:
        server_lr: See `SummedDeltas`.
        server_optimizer: See `SummedDeltas`.

    Raises:
        ConfigError: A value breaks its rule.
    """

    server_lr: float | None = 10.0  # larger makes up for fewer replies: 10 where one client in ten takes part

    def weights(self, memory: ServerMemory, replies: Sequence[Reply]) -> list[float]:
        """See `FederatedAlgorithm.weights`."""
        return [1 / memory.num_clients] * len(replies)

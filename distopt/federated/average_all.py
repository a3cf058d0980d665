"""The sum of all deltas divided by the number of registered clients: who is away counts as an update of zero.

A baseline of Wang & Ji, *A Lightweight Method for Tackling Unknown Participation Statistics in Federated Averaging*,
ICLR 2024: `x + eta_g (1/N) sum_S Delta_k`.

Limits: the mean over rounds leans towards clients that come often, as FedAvg's does. The fewer clients reply, the
shorter are the steps: give a `server_lr` that makes up for it.
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
        server_lr: See `SummedDeltas`; 10 makes up for it where one client in ten takes part.
        server_optimizer: See `SteppingServer`.

    Raises:
        ConfigError: A value breaks its rule.
    """

    def weights(self, memory: ServerMemory, replies: Sequence[Reply]) -> list[float]:
        """See `FederatedAlgorithm.weights`."""
        return [1 / memory.num_clients] * len(replies)

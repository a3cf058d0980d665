"""MIFA: the mean of the latest update of every client, however long ago it was sent.

Gu et al., *Fast Federated Learning in the Presence of Arbitrary Device Unavailability*, NeurIPS 2021:
`x + eta_g (1/N) sum over all N clients of the latest Delta_k`.

Limits: the server keeps a vector of d elements for each client that has ever replied. The paper's first round waits
for everybody; here a client that has never replied counts as an update of zero. A round in which nobody replies is no
step. The sum gathers rounding errors, one per round.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from distopt.federated.deltas import SteppingServer
from distopt.federated.fedvarp import LATEST, LATEST_SUM, remember_latest
from distopt.federated.memory import ServerMemory
from distopt.federated.messages import Reply


@dataclass(frozen=True, kw_only=True)
class MIFA(SteppingServer, name="mifa"):
    """Uniform over all clients; see the module.

    Args:
        server_lr: See `SteppingServer`.
        server_optimizer: See `SteppingServer`.

    Raises:
        ConfigError: A value breaks its rule.
    """

    remembered = (LATEST_SUM,)
    tables = (LATEST,)

    def weights(self, memory: ServerMemory, replies: Sequence[Reply]) -> list[float]:
        """See `FederatedAlgorithm.weights`; those who are away count as much."""
        return [1 / memory.num_clients] * len(replies)

    def advance(
        self, memory: ServerMemory, model: Tensor, replies: Sequence[Reply], weights: Sequence[float]
    ) -> Tensor:
        """See `FederatedAlgorithm.advance`."""
        remember_latest(memory, replies)
        return self.step_along(memory, model, memory.vectors[LATEST_SUM] / memory.num_clients)

"""FedVarp: the server stands in for clients that are away with the last update that each of them has sent.

Jhunjhunwala et al., *FedVARP: Tackling the Variance Due to Partial Client Participation in Federated Learning*, UAI
2022:

    x + eta_g (mean_S (Delta_k - h_k) + mean of h over all N clients);  then h_k = Delta_k for those in S

Limits: the server keeps a vector of d elements for each client that has ever replied. The sum of all h is kept up to
date by what changes, so it gathers rounding errors, one per round.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from distopt.federated.deltas import SteppingServer, mean_weights
from distopt.federated.memory import ServerMemory
from distopt.federated.messages import Reply
from distopt.federated.rows import weighted_rows

LATEST = "latest"
LATEST_SUM = "latest_sum"


def remember_latest(memory: ServerMemory, replies: Sequence[Reply]) -> list[Tensor]:
    """Puts the replies' deltas in place of the latest ones, keeps their sum, and returns what changed, (d,) each."""
    latest = memory.tables[LATEST]
    changes = []
    for reply in replies:
        changes.append(reply.delta - latest.get(reply.client))
        latest.set(reply.client, reply.delta)
    memory.vectors[LATEST_SUM] = memory.vectors[LATEST_SUM] + weighted_rows(changes, [1.0] * len(changes))
    return changes


@dataclass(frozen=True, kw_only=True)
class FedVarp(SteppingServer, name="fedvarp"):
    """Uniform over all clients, with the variance of who takes part reduced; see the module.

    Args:
        server_lr: See `SteppingServer`.
        server_optimizer: See `SteppingServer`.

    Raises:
        ConfigError: A value breaks its rule.
    """

    remembered = (LATEST_SUM,)
    tables = (LATEST,)

    def weights(self, memory: ServerMemory, replies: Sequence[Reply]) -> list[float]:
        """See `FederatedAlgorithm.weights`."""
        return mean_weights("uniform", replies)

    def advance(
        self, memory: ServerMemory, model: Tensor, replies: Sequence[Reply], weights: Sequence[float]
    ) -> Tensor:
        """See `FederatedAlgorithm.advance`."""
        mean_before = memory.vectors[LATEST_SUM] / memory.num_clients
        changes = remember_latest(memory, replies)
        return self.step_along(memory, model, weighted_rows(changes, weights) + mean_before)

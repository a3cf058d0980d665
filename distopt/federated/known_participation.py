"""What FedAU estimates, known: each client's update is divided by the probability with which it takes part.

Wang & Ji, *A Lightweight Method for Tackling Unknown Participation Statistics in Federated Averaging*, ICLR 2024,
compare with it: `x + eta_g sum_S Delta_k / (N p_k)`, whose expectation is the uniform mean over all N clients.

Limits: somebody must know the probabilities. A client with a small one makes rare and long steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from distopt.errors import ConfigError
from distopt.federated.deltas import SummedDeltas
from distopt.federated.memory import ServerMemory
from distopt.federated.messages import Reply
from distopt.federated.participation.chances import checked_probability
from distopt.federated.per_client import PerClient, for_clients


@dataclass(frozen=True, kw_only=True)
class KnownParticipation(SummedDeltas, name="known-participation"):
    """Weights 1/(N p_k); see the module.

    Args:
        probability: p_k in (0, 1], one for each client or one for all.
        server_lr: See `SteppingServer`.
        server_optimizer: See `SteppingServer`.

    Raises:
        ConfigError: A value breaks its rule.
    """

    probability: PerClient  # of taking part in a round: smaller makes an update count more

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "probability", checked_probability(self.probability))

    def begin(self, memory: ServerMemory) -> None:
        """Also checks that there is a probability for each client."""
        super().begin(memory)
        for_clients("probability", self.probability, memory.num_clients)

    def weights(self, memory: ServerMemory, replies: Sequence[Reply]) -> list[float]:
        """See `FederatedAlgorithm.weights`."""
        p, n = self.probability, memory.num_clients
        return [1 / (n * (p[reply.client] if isinstance(p, tuple) else p)) for reply in replies]

    def add_clients(self, memory: ServerMemory, count: int) -> None:
        """See `FederatedAlgorithm.add_clients`.

        Raises:
            ConfigError: The probabilities were given one by one, and there are none for those who join.
        """
        if count and isinstance(self.probability, tuple):
            raise ConfigError(
                f"probability must be one number where clients join, got {len(self.probability)}; begin anew with one "
                "for each client, or use FedAU, which needs none"
            )
        super().add_clients(memory, count)

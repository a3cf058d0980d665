"""FedAU: clients that come rarely count more, by an estimate of how rarely that the server makes as it goes.

Wang & Ji, *A Lightweight Method for Tackling Unknown Participation Statistics in Federated Averaging*, ICLR 2024,
2306.03401:

    x + eta_g (1/N) sum_S omega_k Delta_k

divided by all N registered clients, never by how many replied. omega_k estimates 1/p_k, see `ParticipationWeights`. The
objective is the uniform mean over clients; for the one over samples omega_k is multiplied by N q_k, where q_k is the
client's share of all samples.

Limits: q_k needs the samples of all clients, and a server learns them from replies; those that it has never heard of
are taken to have the mean of the others. A round in which nobody replies counts as a round without participation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from distopt.config import check_choice
from distopt.federated.deltas import WEIGHTINGS, SummedDeltas
from distopt.federated.memory import ServerMemory
from distopt.federated.messages import Reply
from distopt.federated.participation_weights import ParticipationWeights
from distopt.federated.sample_counts import SampleCounts

PARTICIPATION = "participation"
SAMPLES = "samples"


@dataclass(frozen=True, kw_only=True)
class FedAU(SummedDeltas, name="fedau"):
    """Unbiased whoever takes part more often than others; see the module.

    Args:
        cutoff: K, see `ParticipationWeights`.
        weighting: "uniform", the objective is the mean over clients; "samples", that over samples.
        server_lr: See `SummedDeltas`.
        server_optimizer: See `SummedDeltas`.

    Raises:
        ConfigError: A value breaks its rule.
    """

    cutoff: float = 50  # lower: less variance, more bias against clients that come rarely; math.inf for none
    weighting: str = "uniform"  # "samples" makes clients with more data count more

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("weighting", self.weighting, WEIGHTINGS)
        ParticipationWeights(0, self.cutoff)  # checks it

    def begin(self, memory: ServerMemory) -> None:
        """See `FederatedAlgorithm.begin`."""
        super().begin(memory)
        memory.counters[PARTICIPATION] = ParticipationWeights(memory.num_clients, self.cutoff)
        if self.weighting == SAMPLES:
            memory.counters[SAMPLES] = SampleCounts(memory.num_clients)

    def weights(self, memory: ServerMemory, replies: Sequence[Reply]) -> list[float]:
        """See `FederatedAlgorithm.weights`."""
        omega = memory.counters[PARTICIPATION].weights
        weights = [float(omega[reply.client]) / memory.num_clients for reply in replies]
        if self.weighting == SAMPLES:
            counts: SampleCounts = memory.counters[SAMPLES]
            counts.note(replies)
            mean = counts.mean
            weights = [weight * reply.num_samples / mean for weight, reply in zip(weights, replies, strict=True)]
        return weights

    def tick(self, memory: ServerMemory, participated: Tensor) -> None:
        """See `FederatedAlgorithm.tick`."""
        memory.counters[PARTICIPATION].update(participated)

    def add_clients(self, memory: ServerMemory, count: int) -> None:
        """See `FederatedAlgorithm.add_clients`."""
        super().add_clients(memory, count)
        for counter in memory.counters.values():
            counter.add_clients(count)

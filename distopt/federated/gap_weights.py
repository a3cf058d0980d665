"""Weights by how many aggregations lie between two replies of a client, on average: what makes any pacing unbiased.

A client that is in one aggregation of g counts g times its importance p_k, so over time it counts p_k. Where g is not
known it is estimated as the algorithm runs, see `ParticipationWeights`.

Limits: with `weighting="samples"` p_k = n_k / sum of n_k needs the samples of all clients, and a server learns them
from replies; clients that it has never heard of are taken to have the mean of the others.
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
class GapWeighted(SummedDeltas):
    """`x + eta_g sum_S g_k p_k Delta_k`.

    Args:
        weighting: "uniform", p_k = 1/N of all N registered clients, or "samples", p_k = n_k / sum of all n_k.
        cutoff: K, see `ParticipationWeights`.
        server_lr: See `SteppingServer`.
        server_optimizer: See `SteppingServer`.
    """

    weighting: str = "uniform"  # "samples" makes clients with more data count more
    cutoff: float = 50  # lower: less variance, more bias against clients that come rarely; math.inf for none

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

    def gaps(self, memory: ServerMemory) -> Tensor:
        """(num_clients,) float64, g."""
        estimated: Tensor = memory.counters[PARTICIPATION].weights
        return estimated

    def weights(self, memory: ServerMemory, replies: Sequence[Reply]) -> list[float]:
        """See `FederatedAlgorithm.weights`."""
        gaps = self.gaps(memory)
        weights = [float(gaps[reply.client]) / memory.num_clients for reply in replies]
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

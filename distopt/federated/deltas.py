"""What most algorithms do with the deltas of a round: add them up with weights, and step along the sum.

Sums are taken in the order of the clients, so their bits do not depend on who answered first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distopt.config import check_number
from distopt.errors import ConfigError
from distopt.federated.algorithm import FederatedAlgorithm, LinearAlgorithm, Vectors, WeightedSum
from distopt.federated.client_weights import sample_weights, uniform_weights
from distopt.federated.memory import ServerMemory
from distopt.federated.messages import DELTA, Reply
from distopt.federated.server_optimizer import PlainStep, ServerOptimizer

WEIGHTINGS = ("samples", "uniform")
ALL_DELTAS = "all_deltas"


def mean_weights(weighting: str, replies: Sequence[Reply]) -> list[float]:
    """n_k / sum of n_k, or the same for all; they sum to 1."""
    uniform = weighting == "uniform"
    found = uniform_weights(len(replies)) if uniform else sample_weights([reply.num_samples for reply in replies])
    return [float(weight) for weight in found]


@dataclass(frozen=True, kw_only=True)
class SteppingServer(FederatedAlgorithm):
    """`x + eta_g * D`, or what a server optimizer makes of D; a subclass says what D is.

    Args:
        server_lr: eta_g; None takes the server optimizer's own, 1 for a plain step.
        server_optimizer: What it makes of D before it goes along it.
    """

    server_lr: float | None = None  # larger goes further along the sum, 1 is a mean of models where weights sum to 1
    server_optimizer: ServerOptimizer = field(  # PlainStep forgets earlier rounds, the others smooth over them
        default_factory=PlainStep, metadata={"configurable": ServerOptimizer}
    )

    def __post_init__(self) -> None:
        if self.server_lr is not None:
            rule, remedy = "a number in (0, 1e6]", "use 1.0 for the mean, or leave it out"
            check_number("server_lr", self.server_lr, rule=rule, remedy=remedy, low=0.0, high=1e6)
        if not isinstance(self.server_optimizer, ServerOptimizer):
            raise ConfigError(
                f"server_optimizer must be a server optimizer, got {self.server_optimizer!r}; use "
                "distopt.federated.PlainStep()"
            )

    def begin(self, memory: ServerMemory) -> None:
        """See `FederatedAlgorithm.begin`."""
        self.server_optimizer.begin(memory)

    def step_along(self, memory: ServerMemory, model: Tensor, delta: Tensor) -> Tensor:
        """`x + eta_g * delta`, or what the server optimizer makes of it."""
        lr = self.server_optimizer.usual_lr if self.server_lr is None else self.server_lr
        return torch.add(model, self.server_optimizer.direction(memory, delta), alpha=lr)


@dataclass(frozen=True, kw_only=True)
class SummedDeltas(SteppingServer, LinearAlgorithm):
    """`x + eta_g * sum_k w_k Delta_k` over the clients that replied; a subclass says the weights.

    Args:
        server_lr: eta_g; None takes the server optimizer's own, 1 for a plain step.
        server_optimizer: What it makes of the sum before it goes along it.
    """

    def sums(self, replies: Sequence[Reply], weights: Sequence[float]) -> Mapping[str, WeightedSum]:
        """See `LinearAlgorithm.sums`."""
        return {DELTA: WeightedSum(DELTA, weights)}

    def move(self, memory: ServerMemory, model: Tensor, sums: Vectors) -> Tensor:
        """See `LinearAlgorithm.move`."""
        return self.step_along(memory, model, sums[DELTA])


class CorrectedMean(LinearAlgorithm):
    """`x + sum_S w_k Delta_k + (1/N) sum of all deltas of all rounds`, this one included: what FedDyn's server does.

    The memory has the vector "all_deltas"; it is remembered as a sum, so that N may grow.
    """

    def sums(self, replies: Sequence[Reply], weights: Sequence[float]) -> Mapping[str, WeightedSum]:
        """See `LinearAlgorithm.sums`."""
        return {DELTA: WeightedSum(DELTA, weights), ALL_DELTAS: WeightedSum(DELTA, [1.0] * len(replies))}

    def move(self, memory: ServerMemory, model: Tensor, sums: Vectors) -> Tensor:
        """See `LinearAlgorithm.move`."""
        memory.vectors[ALL_DELTAS] = memory.vectors[ALL_DELTAS] + sums[ALL_DELTAS]
        return model + (sums[DELTA] + memory.vectors[ALL_DELTAS] / memory.num_clients)

"""What most algorithms do with the deltas of a round: add them up with weights, and step along the sum.

Sums are taken in the order of the clients, so their bits do not depend on who answered first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distopt.config import check_number
from distopt.errors import ConfigError
from distopt.federated.algorithm import FederatedAlgorithm, stacked
from distopt.federated.averaging import sample_weights, uniform_weights
from distopt.federated.memory import ServerMemory
from distopt.federated.messages import DELTA, Reply
from distopt.federated.server_optimizer import PlainStep, ServerOptimizer
from distopt.ops import weighted_sum_

WEIGHTINGS = ("samples", "uniform")


def mean_weights(weighting: str, replies: Sequence[Reply]) -> list[float]:
    """n_k / sum of n_k, or the same for all; they sum to 1."""
    uniform = weighting == "uniform"
    found = uniform_weights(len(replies)) if uniform else sample_weights([reply.num_samples for reply in replies])
    return [float(weight) for weight in found]


def weighted_rows(rows: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`weights[0] rows[0] + weights[1] rows[1] + ...`, in this order; 16-bit rows are added in float32."""
    rows = [row.contiguous() for row in rows]
    dtype = rows[0].dtype
    total = torch.empty_like(rows[0], dtype=dtype if dtype is torch.float64 else torch.float32)
    weighted_sum_(total, rows, weights)
    return total.to(dtype)


def weighted_delta(replies: Sequence[Reply], weights: Sequence[float], num_trained: int, name: str = DELTA) -> Tensor:
    """(d,), the sum of one tensor of each reply times its weight, in the order of the clients."""
    return weighted_rows(stacked(replies, name, num_trained), weights)


@dataclass(frozen=True, kw_only=True)
class SummedDeltas(FederatedAlgorithm):
    """`x + eta_g * sum_k w_k Delta_k` over the clients that replied; a subclass says the weights.

    Args:
        server_lr: eta_g; None takes the server optimizer's own, 1 for a plain step.
        server_optimizer: What it makes of the sum before it goes along it.
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

    def advance(
        self, memory: ServerMemory, model: Tensor, replies: Sequence[Reply], weights: Sequence[float]
    ) -> Tensor:
        """See `FederatedAlgorithm.advance`."""
        return self.step_along(memory, model, weighted_delta(replies, weights, memory.num_trained))

    def step_along(self, memory: ServerMemory, model: Tensor, delta: Tensor) -> Tensor:
        """`x + eta_g * delta`, or what the server optimizer makes of it."""
        lr = self.server_optimizer.usual_lr if self.server_lr is None else self.server_lr
        return torch.add(model, self.server_optimizer.direction(memory, delta), alpha=lr)


def mean_with_all_corrections(
    memory: ServerMemory, name: str, replies: Sequence[Reply], weights: Sequence[float]
) -> Tensor:
    """(d,), `sum_S w_k Delta_k + (1/N) sum of all deltas of all rounds`, which is what FedDyn's server adds to x.

    Args:
        memory: Of the server.
        name: Its vector that holds the sum of all deltas; this round's are added first.
        replies: Whose deltas are y_k - x.
        weights: w_k.
    """
    moved = weighted_delta(replies, [1.0] * len(replies), memory.num_trained)
    memory.vectors[name] = memory.vectors[name] + moved
    return weighted_delta(replies, weights, memory.num_trained) + memory.vectors[name] / memory.num_clients

"""FedSpeed: local steps along a gradient taken a little uphill, drawn to the round's start, and corrected for that.

Sun et al., *FedSpeed: Larger Local Interval, Less Communication Round, and Higher Generalization Accuracy*, ICLR 2023,
2302.10429. Client i keeps ghat_i, zero at first; both gradients are of the same minibatch:

    g1 = grad F_i(y);  g2 = grad F_i(y + rho g1/||g1||);  g = (1 - alpha) g1 + alpha g2
    gradient g - ghat_i + (y - x)/lambda
    at the end  ghat_i - (y - x)/lambda;  sends  y - lambda ghat_i  with the new ghat_i, so as many bytes as FedAvg

The paper's server takes the uniform mean of what was sent: `server="paper"`. A public simulator of it averages the
correction -lambda ghat_i over all N clients, as FedDyn's server does: `server="public-simulator"`, for which clients
send y. The two are the same where all clients take part in each round, and differ otherwise.

Limits: two gradients per step. The paper's settings also have a weight decay of 1e-3, which belongs to g1 and g2, and
the norm of the whole gradient, with its correction, is clipped to 10: `LocalTraining(weight_decay=1e-3, max_norm=10.0,
lr=0.1, lr_decay=0.998)`. A reply that the server refuses leaves ghat_i changed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distopt.config import check_choice, check_number
from distopt.federated.algorithm import LocalRound, Vectors, WeightedSum
from distopt.federated.checks import check_from_zero
from distopt.federated.deltas import ALL_DELTAS, CorrectedMean, mean_weights
from distopt.federated.memory import ServerMemory
from distopt.federated.messages import DELTA, Reply

CORRECTION = "correction"
PAPER = "paper"
PUBLIC_SIMULATOR = "public-simulator"


@dataclass(frozen=True, kw_only=True)
class FedSpeed(CorrectedMean, name="fedspeed"):
    """Uniform over the clients; see the module.

    Args:
        rho: Length of the ascent step.
        alpha: Share of the gradient that is taken after it, in [0, 1].
        lambda_: lambda, the inverse weight of the pull towards x.
        server: Whose mean of the corrections, "paper" or "public-simulator".

    Raises:
        ConfigError: A value breaks its rule.
    """

    rho: float = 0.1  # larger looks for flatter minima, further away; 0 takes the same gradient twice
    alpha: float = 1.0  # 1 uses only the gradient after the ascent step, 0 only the one before it
    lambda_: float = 10.0  # larger lets clients move further from the server's model, and corrects more
    server: str = PAPER  # "public-simulator" counts the corrections of those who are away too

    kept = (CORRECTION,)

    def __post_init__(self) -> None:
        check_from_zero("rho", self.rho, remedy="use 0.1")
        check_from_zero("alpha", self.alpha, high=1.0, remedy="use 1.0, the gradient after the ascent step")
        check_number("lambda_", self.lambda_, rule="a number above 0", remedy="use 10.0", low=0.0, high=1e9)
        check_choice("server", self.server, (PAPER, PUBLIC_SIMULATOR))

    def direction(
        self, gradient: Callable[[Tensor | None], Tensor], moved: Tensor, kept: Vectors, extras: Vectors
    ) -> Tensor:
        """See `FederatedAlgorithm.direction`."""
        before = gradient(None)
        norm = before.norm(dim=-1, keepdim=True)
        after = gradient(self.rho * (before / torch.where(norm > 0, norm, 1.0)))  # no ascent step where g1 = 0
        mixed = (1 - self.alpha) * before + self.alpha * after
        return mixed - kept[CORRECTION] + moved / self.lambda_

    def finish(self, local: LocalRound) -> tuple[Vectors, Vectors]:
        """See `FederatedAlgorithm.finish`."""
        correction = local.kept[CORRECTION] - local.moved / self.lambda_
        sent = local.moved - self.lambda_ * correction if self.server == PAPER else local.moved
        return {CORRECTION: correction}, {DELTA: sent}

    def begin(self, memory: ServerMemory) -> None:
        """See `FederatedAlgorithm.begin`."""
        if self.server == PUBLIC_SIMULATOR:
            memory.remember(ALL_DELTAS)  # -lambda times the sum of all ghat_i

    def weights(self, memory: ServerMemory, replies: Sequence[Reply]) -> list[float]:
        """See `FederatedAlgorithm.weights`."""
        return mean_weights("uniform", replies)

    def sums(self, replies: Sequence[Reply], weights: Sequence[float]) -> Mapping[str, WeightedSum]:
        """See `LinearAlgorithm.sums`."""
        return {DELTA: WeightedSum(DELTA, weights)} if self.server == PAPER else super().sums(replies, weights)

    def move(self, memory: ServerMemory, model: Tensor, sums: Vectors) -> Tensor:
        """See `LinearAlgorithm.move`."""
        return model + sums[DELTA] if self.server == PAPER else super().move(memory, model, sums)

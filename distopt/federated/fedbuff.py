"""FedBuff: the server aggregates whenever a buffer of replies is full, and old ones count less.

Nguyen et al., *Federated Learning with Buffered Asynchronous Aggregation*, AISTATS 2022, 2106.06639:

    x + eta_g (1/K) sum over the buffer of s(a_k) Delta_k,   s(a) = 1/sqrt(1 + a)

K is the buffer's size, not the sum of s; a_k is how many aggregations the client has missed while it worked, and
Delta_k is against the version that it was sent.

Clients that answer more often are in more buffers, so the objective leans towards them, and the discount adds to that.
`correction="participation"` takes the unbiased weights of Fraboni et al., JMLR 2023, 2206.10189, instead: p_k over the
share of the aggregations that client k is in, estimated as in FedAU, and no discount.

Limits: where fewer than K clients are left at work, the server takes what there is, still divided by K.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from distopt.config import check_choice, check_count
from distopt.federated.arrivals import TakesOldReplies
from distopt.federated.checks import check_from_zero
from distopt.federated.gap_weights import GapWeighted
from distopt.federated.memory import ServerMemory
from distopt.federated.messages import Reply
from distopt.federated.pacing import AfterArrivals, Pacing
from distopt.federated.staleness import polynomial_discount

STALENESS = "staleness"
PARTICIPATION = "participation"


@dataclass(frozen=True, kw_only=True)
class FedBuff(TakesOldReplies, GapWeighted, name="fedbuff"):
    """Aggregates at every `buffer_size` replies; see the module.

    Args:
        buffer_size: K.
        concurrency: How many clients work at a time; None for all that there are.
        correction: Of the weights, "staleness" (the paper's) or "participation" (unbiased).
        discount: Exponent of s(a) = (1 + a)^-discount.
        max_staleness: See `TakesOldReplies`.
        weighting: p_k, see `GapWeighted`; with `correction="participation"` only.
        cutoff: Of the estimate, see `ParticipationWeights`.
        server_lr: See `SteppingServer`.
        server_optimizer: See `SteppingServer`.

    Raises:
        ConfigError: A value breaks its rule.
    """

    buffer_size: int = 10  # larger: fewer and less noisy aggregations, which wait longer
    concurrency: int | None = None  # more clients at a time: more work done, and older
    correction: str = STALENESS
    discount: float = 0.5  # larger: old replies count less; 0: all the same
    cutoff: float = math.inf

    def __post_init__(self) -> None:
        GapWeighted.__post_init__(self)
        TakesOldReplies.__post_init__(self)
        check_count("buffer_size", self.buffer_size, low=1, remedy="use 10")
        if self.concurrency is not None:
            check_count("concurrency", self.concurrency, low=1, remedy="leave it out for all clients")
        check_choice("correction", self.correction, (STALENESS, PARTICIPATION))
        check_from_zero("discount", self.discount, remedy="use 0.5")

    @property
    def pacing(self) -> Pacing:
        """See `FederatedAlgorithm.pacing`."""
        return AfterArrivals(count=self.buffer_size, concurrency=self.concurrency)

    def weights(self, memory: ServerMemory, replies: Sequence[Reply]) -> list[float]:
        """See `FederatedAlgorithm.weights`."""
        if self.correction == PARTICIPATION:
            return super().weights(memory, replies)
        ages = [float(memory.version - reply.version) for reply in replies]
        discounts: list[float] = (polynomial_discount(ages, self.discount) / self.buffer_size).tolist()
        return discounts

"""FedAsync: each reply is mixed into the model when it comes, less of it the older it is.

Xie, Koyejo & Gupta, *Asynchronous Federated Optimization*, 2019, 1903.03934:

    x <- (1 - a_t) x + a_t y_k,   a_t = a (1 + age)^-discount

y_k is the client's whole model, not its change, so the model is drawn back towards where it was when the client began.
A reply has the change; the server adds it to the version that the client was sent, and remembers the last
`max_staleness + 1` of them for that.

Limits: leans towards clients that answer often; the server remembers up to `max_staleness + 1` models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from distopt.config import check_count, check_number
from distopt.federated.arrivals import TakesOldReplies
from distopt.federated.checks import check_from_zero
from distopt.federated.memory import ServerMemory
from distopt.federated.messages import Reply
from distopt.federated.pacing import AfterArrivals, Pacing
from distopt.federated.recent_models import RecentModels
from distopt.federated.staleness import polynomial_discount

RECENT = "recent_models"


@dataclass(frozen=True, kw_only=True)
class FedAsync(TakesOldReplies, name="fedasync"):
    """Mixes each reply in when it arrives; see the module.

    Args:
        mixing: a.
        discount: Exponent of (1 + age).
        max_staleness: How many aggregations a client may have missed; older replies are refused.

    Raises:
        ConfigError: A value breaks its rule.
    """

    mixing: float = 0.6  # larger goes further towards each client's model
    discount: float = 0.5  # larger: old replies count less; 0: all the same
    max_staleness: int = 50  # larger refuses fewer, and remembers more models

    def __post_init__(self) -> None:
        check_number("mixing", self.mixing, rule="a number in (0, 1]", remedy="use 0.6", low=0.0, high=1.0)
        check_from_zero("discount", self.discount, remedy="use 0.5")
        check_count("max_staleness", self.max_staleness, low=0, remedy="use 50")

    @property
    def pacing(self) -> Pacing:
        """See `FederatedAlgorithm.pacing`."""
        return AfterArrivals(count=1)

    def begin(self, memory: ServerMemory) -> None:
        """See `FederatedAlgorithm.begin`."""
        memory.counters[RECENT] = RecentModels(self.max_staleness)

    def weights(self, memory: ServerMemory, replies: Sequence[Reply]) -> list[float]:
        """See `FederatedAlgorithm.weights`."""
        ages = [float(memory.version - reply.version) for reply in replies]
        weights: list[float] = (self.mixing * polynomial_discount(ages, self.discount)).tolist()
        return weights

    def advance(
        self, memory: ServerMemory, model: Tensor, replies: Sequence[Reply], weights: Sequence[float]
    ) -> Tensor:
        """See `FederatedAlgorithm.advance`; several replies are mixed in one after the other."""
        recent: RecentModels = memory.counters[RECENT]
        recent.add(memory.version, model)
        for reply, weight in zip(replies, weights, strict=True):
            model = model + weight * (recent.get(reply.version) + reply.delta - model)
        return model

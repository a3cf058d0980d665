"""What the asynchronous algorithms have in common: replies to older versions count, up to an age."""

from collections.abc import Sequence
from dataclasses import dataclass

from distopt.config import check_count
from distopt.federated.algorithm import FederatedAlgorithm


@dataclass(frozen=True, kw_only=True)
class TakesOldReplies(FederatedAlgorithm):
    """A reply counts if its version is not too old; each delta is against the version that its client was sent.

    Args:
        max_staleness: How many aggregations a client may have missed while it worked; None for any number. A reply that
            is older is refused as late.
    """

    max_staleness: int | None = None  # lower refuses more of what slow clients send, which biases against them

    def __post_init__(self) -> None:
        if self.max_staleness is not None:
            check_count("max_staleness", self.max_staleness, low=0, remedy="use 50")

    def accepts(self, answered: int, version: int) -> bool:
        """See `FederatedAlgorithm.accepts`."""
        return answered <= version and (self.max_staleness is None or version - answered <= self.max_staleness)

    def trust_in_rest(self, weights: Sequence[float]) -> float:
        """See `FederatedAlgorithm.trust_in_rest`: as far as the replies' weights go, all the way at 1."""
        return min(1.0, sum(weights))

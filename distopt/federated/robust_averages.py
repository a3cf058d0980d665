"""Robust averages as algorithms: the model moves by what a rule of `distopt.federated.robust` makes of the deltas.

Every client counts the same, because whoever lies about its delta lies about its samples too.

Limits: fewer replies than a rule needs leave the model as it is, and are counted ("too few replies"). Where clients'
data differ much, honest clients look like liars: Krum follows one of them, and the mean of the others is lost.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from distopt.config import check_count
from distopt.federated import robust
from distopt.federated.deltas import SteppingServer
from distopt.federated.memory import ServerMemory
from distopt.federated.messages import Reply


@dataclass(frozen=True, kw_only=True)
class RobustAverage(SteppingServer):
    """`x + eta_g * rule(deltas)`.

    Args:
        num_byzantine: f, how many of a round's replies may be arbitrary.
        server_lr: eta_g; None takes the server optimizer's own, 1 for a plain step.
        server_optimizer: What it makes of the rule's delta before it goes along it.
    """

    num_byzantine: int = 1  # more bears more liars, and needs more replies

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_byzantine", self.num_byzantine, low=0, remedy="give how many clients may be wrong")

    @abstractmethod
    def combine(self, deltas: list[Tensor]) -> Tensor:
        """(d,), what the rule makes of the deltas, which are in the order of the clients."""

    def weights(self, memory: ServerMemory, replies: Sequence[Reply]) -> list[float]:
        """Of no use to these rules."""
        return [1.0] * len(replies)

    def advance(
        self, memory: ServerMemory, model: Tensor, replies: Sequence[Reply], weights: Sequence[float]
    ) -> Tensor:
        """See `FederatedAlgorithm.advance`."""
        return self.step_along(memory, model, self.combine([reply.delta for reply in replies]))


@dataclass(frozen=True, kw_only=True)
class TrimmedMean(RobustAverage, name="trimmed-mean"):
    """Per coordinate the mean without the f largest and the f smallest (Yin et al., ICML 2018)."""

    @property
    def fewest_replies(self) -> int:
        """2 f + 1."""
        return 2 * self.num_byzantine + 1

    def combine(self, deltas: list[Tensor]) -> Tensor:
        """See `robust.trimmed_mean`."""
        return robust.trimmed_mean(deltas, self.num_byzantine)


@dataclass(frozen=True, kw_only=True)
class Median(RobustAverage, name="median"):
    """Per coordinate the median (Yin et al., ICML 2018); bears fewer liars than half the replies."""

    @property
    def fewest_replies(self) -> int:
        """2 f + 1."""
        return 2 * self.num_byzantine + 1

    def combine(self, deltas: list[Tensor]) -> Tensor:
        """See `robust.median`."""
        return robust.median(deltas)


@dataclass(frozen=True, kw_only=True)
class Krum(RobustAverage, name="krum"):
    """The delta nearest to its n - f - 2 nearest neighbours (Blanchard et al., NeurIPS 2017)."""

    @property
    def fewest_replies(self) -> int:
        """2 f + 3."""
        return 2 * self.num_byzantine + 3

    def combine(self, deltas: list[Tensor]) -> Tensor:
        """See `robust.krum`."""
        return robust.krum(deltas, self.num_byzantine)


@dataclass(frozen=True, kw_only=True)
class MultiKrum(RobustAverage, name="multi-krum"):
    """The mean of the deltas that Krum likes best (Blanchard et al., NeurIPS 2017).

    Args:
        num_byzantine: f, how many of a round's replies may be arbitrary.
        server_lr: eta_g; None takes the server optimizer's own, 1 for a plain step.
        server_optimizer: What it makes of the rule's delta before it goes along it.
        num_selected: How many, at most n - f; None for n - f - 2.
    """

    num_selected: int | None = None  # more averages more noise away and trusts more

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_selected is not None:
            check_count("num_selected", self.num_selected, low=1, remedy="leave it out for n - f - 2")

    @property
    def fewest_replies(self) -> int:
        """2 f + 3, and as many as are selected beside the f."""
        return max(2 * self.num_byzantine + 3, (self.num_selected or 0) + self.num_byzantine)

    def combine(self, deltas: list[Tensor]) -> Tensor:
        """See `robust.multi_krum`."""
        selected = self.num_selected or len(deltas) - self.num_byzantine - 2
        return robust.multi_krum(deltas, self.num_byzantine, selected)


@dataclass(frozen=True, kw_only=True)
class Bulyan(RobustAverage, name="bulyan"):
    """Krum's choice, then per coordinate those near the median (El Mhamdi et al., ICML 2018)."""

    @property
    def fewest_replies(self) -> int:
        """4 f + 3."""
        return 4 * self.num_byzantine + 3

    def combine(self, deltas: list[Tensor]) -> Tensor:
        """See `robust.bulyan`."""
        return robust.bulyan(deltas, self.num_byzantine)

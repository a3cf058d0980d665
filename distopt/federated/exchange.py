"""Where the tensors of a round's replies are: all here, or some with other ranks of the same round."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from distopt.errors import DistoptError
from distopt.federated.algorithm import WeightedSum, added_up
from distopt.federated.messages import Reply

T = TypeVar("T")
WhyNot = Callable[[Reply], str | None]


class Exchange(Protocol):
    """What those who compute a round together tell each other.

    Attributes:
        leads: Whether this process writes files and reports.
    """

    leads: bool

    def reasons(self, replies: Sequence[Reply], why_not: WhyNot) -> list[str | None]:
        """Why each reply does not count, None if it does, as whoever has its tensors finds."""

    def sums(
        self, asked: Mapping[str, WeightedSum], replies: Sequence[Reply], like: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Weighted sums over all replies; `like` has a tensor of the form of each."""

    def complete(self, replies: Sequence[Reply]) -> list[Reply]:
        """The replies with their tensors."""

    def said_by_leader(self, fact: Callable[[], T]) -> T:
        """What the leading process finds; the others do not call it."""

    def fail_together(self, problem: DistoptError | None) -> None:
        """Raises everywhere if somebody has a problem."""

    def check_same(self, facts: Mapping[str, str]) -> None:
        """Raises `StateMismatchError` everywhere if these are not the same everywhere."""


class Here:
    """All replies are here, and nobody else is."""

    leads = True

    def reasons(self, replies: Sequence[Reply], why_not: WhyNot) -> list[str | None]:
        """See `Exchange.reasons`."""
        return [why_not(reply) for reply in replies]

    def sums(
        self, asked: Mapping[str, WeightedSum], replies: Sequence[Reply], like: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """See `Exchange.sums`."""
        return {key: added_up(each, replies) for key, each in asked.items()}

    def complete(self, replies: Sequence[Reply]) -> list[Reply]:
        """See `Exchange.complete`."""
        return list(replies)

    def said_by_leader(self, fact: Callable[[], T]) -> T:
        """See `Exchange.said_by_leader`."""
        return fact()

    def fail_together(self, problem: DistoptError | None) -> None:
        """See `Exchange.fail_together`."""
        if problem is not None:
            raise problem

    def check_same(self, facts: Mapping[str, str]) -> None:
        """See `Exchange.check_same`."""


HERE = Here()

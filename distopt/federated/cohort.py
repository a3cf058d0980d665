"""Who answers a round, behind one small protocol: the clients of a simulation, or those of other processes."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from distopt.federated.exchange import Exchange
from distopt.federated.messages import Broadcast, Reply


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What happened between two aggregations.

    Attributes:
        started: The clients that were sent this round's broadcast.
        participants: Those whose answers have come, in ascending order.
        replies: Of the participants, in any order, unless some are with other ranks: then by client.
        refused: Messages that were no replies of this job, by reason.
    """

    started: list[int]
    participants: list[int]
    replies: list[Reply]
    refused: Counter[str] = field(default_factory=Counter)


class Cohort(Protocol):
    """The clients of a job, as `Rounds` sees them.

    Attributes:
        exchange: With the other processes that are the same server; `HERE` where there is none.
        described: What a checkpoint's run and this one must agree in, by name: plain values.
        time_s: Seconds at the end of the last round; None if no time is counted.
    """

    @property
    def exchange(self) -> Exchange:
        """See the class."""

    @property
    def described(self) -> Mapping[str, Any]:
        """See the class."""

    @property
    def time_s(self) -> float | None:
        """See the class."""

    def begin(self, version: int) -> None:
        """Rounds are about to go on from this version; called again only after `load_state_dict`."""

    def answers(self, broadcast: Broadcast) -> Answers:
        """Sends the broadcast to those who begin now, and takes what the aggregation at the end takes."""

    def saving(self, version: int) -> None:
        """The state of this version is about to be saved."""

    def saved(self, version: int) -> None:
        """It has been."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, by names that are not those of `Rounds`."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a cohort of the same description was."""

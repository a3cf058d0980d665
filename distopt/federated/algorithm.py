"""What a federated algorithm says: the client's side and the server's side of one rule, as pure functions.

Everything speaks of flat vectors of the d trained elements (`Layout`). The client's functions also take vectors of many
clients at once, (num_clients, d), so they work along the last dimension only. Drivers (`Client`, `Server`, and whatever
carries their messages) own the rest: batches, local optimizers, refused replies, buffers.

A round: the server sends x and the `extras`. A client moves from x to y in local steps, each with the gradient that
`direction` makes of the loss's; at its end `finish` says what it keeps for its next round and what it sends. The server
gives each reply a weight and makes the next x.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from distopt.config import Algorithm
from distopt.federated.memory import ServerMemory
from distopt.federated.messages import DELTA, Reply

Vectors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class LocalRound:
    """What a client has done at the end of its local steps.

    Attributes:
        moved: (..., d), y - x.
        num_steps: K, how many local steps, at least 1; (..., 1) float where clients differ.
        lr: eta_l, the local learning rate; the mean over the steps where it changes.
        kept: What the client kept from its last round, zeros in its first, (..., d) each.
        extras: Of the broadcast, (d,) each.
    """

    moved: Tensor
    num_steps: Tensor | int
    lr: float
    kept: Vectors
    extras: Vectors


class FederatedAlgorithm(Algorithm):
    """Base of all; a subclass is one file, and needs no more than `weights` and `advance`.

    Attributes:
        kept: Names of the vectors (d,) that each client keeps between its rounds; zeros at first.
        remembered: Names of the vectors (d,) that the server remembers; zeros at first.
        tables: Names of what the server remembers of each client, a vector (d,) each; zeros at first.
        sends: Names of the vectors (d,) that a reply has besides the delta.
    """

    kept: ClassVar[tuple[str, ...]] = ()
    remembered: ClassVar[tuple[str, ...]] = ()
    tables: ClassVar[tuple[str, ...]] = ()
    sends: ClassVar[tuple[str, ...]] = ()

    @property
    def fewest_replies(self) -> int:
        """With fewer, the round leaves the model as it is."""
        return 1

    # -- client --------------------------------------------------------------------------------------------------------

    def direction(
        self, gradient: Callable[[Tensor | None], Tensor], moved: Tensor, kept: Vectors, extras: Vectors
    ) -> Tensor:
        """(..., d): what the local optimizer gets as the gradient of this step.

        Args:
            gradient: Of the loss on the step's minibatch, at y plus the displacement it is given; None for none.
            moved: (..., d), y - x.
            kept: Of the client, (..., d) each.
            extras: Of the broadcast, (d,) each.
        """
        return gradient(None)

    def finish(self, local: LocalRound) -> tuple[Vectors, Vectors]:
        """What the client keeps for its next round, and what it sends."""
        return {}, {DELTA: local.moved}

    # -- server --------------------------------------------------------------------------------------------------------

    def begin(self, memory: ServerMemory) -> None:
        """Puts counters into a new memory, and vectors that only these settings need."""

    def accepts(self, answered: int, version: int) -> bool:
        """Whether a reply to version `answered` counts in the round of `version`; a synchronous one takes its own."""
        return answered == version

    def extras(self, memory: ServerMemory) -> Vectors:
        """What the clients of the coming round need besides the model."""
        return {}

    @abstractmethod
    def weights(self, memory: ServerMemory, replies: Sequence[Reply]) -> Sequence[float]:
        """One weight for each reply; the replies are of different clients, in ascending order.

        May note in the memory what the replies say of their clients, such that asking again changes nothing.
        """

    @abstractmethod
    def advance(
        self, memory: ServerMemory, model: Tensor, replies: Sequence[Reply], weights: Sequence[float]
    ) -> Tensor:
        """The next x, (d,), not in place. There is at least one reply, `model` is x, (d,). May change the memory."""

    def tick(self, memory: ServerMemory, participated: Tensor) -> None:
        """After every round, empty ones too: (num_clients,) bool says whose replies have counted."""

    def add_clients(self, memory: ServerMemory, count: int) -> None:
        """So many clients join, with the numbers after the last one."""
        memory.num_clients += count


def stacked(replies: Sequence[Reply], name: str, length: int) -> list[Tensor]:
    """The first `length` elements of one tensor of each reply."""
    return [reply.tensors[name][:length] for reply in replies]

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
from distopt.federated.pacing import Pacing, Synchronous
from distopt.federated.rows import weighted_rows

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
        squared_gradients: Gives (..., d), the mean over the client's samples of the squared gradient of each one's
            loss at y, with the model in evaluation mode: the diagonal of the empirical Fisher information. It takes
            another pass over the data.
    """

    moved: Tensor
    num_steps: Tensor | int
    lr: float
    kept: Vectors
    extras: Vectors
    squared_gradients: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a client has that takes no steps, but looks at each of its samples once.

    Attributes:
        client: Its number.
        version: Of the broadcast that it answers.
        num_samples: How many it has, at least 1.
        model: (d,), x.
        extras: Of the broadcast, (d,) each.
        clipped_sum: Gives (d,) float64, the sum over its samples of each one's gradient at x, clipped to a norm; with a
            vector x' (d,) besides, of the gradient's difference from that at x'.
    """

    client: int
    version: int
    num_samples: int
    model: Tensor
    extras: Vectors
    clipped_sum: Callable[[float, Tensor | None], Tensor]


class FederatedAlgorithm(Algorithm):
    """Base of all; a subclass is one file, and needs no more than `weights` and `advance`.

    Attributes:
        kept: Names of the vectors (d,) that each client keeps between its rounds; zeros at first.
        remembered: Names of the vectors (d,) that the server remembers; zeros at first.
        tables: Names of what the server remembers of each client, a vector (d,) each; zeros at first.
        sends: Names of the vectors (d,) that a reply has besides the delta.
        sends_whole: Those of them that are no changes: parts of them left for later would be wrong, so they are never
            compressed.
        assumes_plain_sgd: Whether its equations hold only where clients take steps of plain SGD.
        takes_steps: Whether clients take local steps; else they `look`.
    """

    kept: ClassVar[tuple[str, ...]] = ()
    remembered: ClassVar[tuple[str, ...]] = ()
    tables: ClassVar[tuple[str, ...]] = ()
    sends: ClassVar[tuple[str, ...]] = ()
    sends_whole: ClassVar[tuple[str, ...]] = ()
    assumes_plain_sgd: ClassVar[bool] = False
    takes_steps: ClassVar[bool] = True

    @property
    def fewest_replies(self) -> int:
        """With fewer, the round leaves the model as it is; with 0 the server makes a next model of nothing, too."""
        return 1

    @property
    def corrects(self) -> bool:
        """Whether the local optimizer gets something else than the gradient."""
        return type(self).direction is not FederatedAlgorithm.direction

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

    def look(self, look: Look) -> Vectors:
        """What a client sends that takes no steps."""
        raise NotImplementedError(f"{self.name} takes steps")

    # -- server --------------------------------------------------------------------------------------------------------

    @property
    def pacing(self) -> Pacing:
        """When the server makes the next model."""
        return Synchronous()

    def begin(self, memory: ServerMemory) -> None:
        """Puts counters into a new memory, and vectors that only these settings need."""

    def accepts(self, answered: int, version: int) -> bool:
        """Whether a reply to version `answered` counts in the round of `version`; a synchronous one takes its own."""
        return answered == version

    def why_not(self, reply: Reply) -> str | None:
        """Why a reply that fits the model does not count, in a few words; None if it does."""
        return None

    def trust_in_rest(self, weights: Sequence[float]) -> float:
        """How far the elements behind the trained ones go towards the mean of the replies', 0 to 1.

        All the way where a round's replies speak for everybody, which is a synchronous one's assumption.
        """
        return 1.0

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
        """The next x, (d,), not in place; `model` is x, (d,). May change the memory.

        There is at least one reply, unless `fewest_replies` is 0.
        """

    def tick(self, memory: ServerMemory, participated: Tensor) -> None:
        """After every round, empty ones too: (num_clients,) bool says whose replies have counted."""

    def add_clients(self, memory: ServerMemory, count: int) -> None:
        """So many clients join, with the numbers after the last one."""
        memory.num_clients += count


@dataclass(frozen=True)
class WeightedSum:
    """`weights[0] * the first reply's tensor + ...`, in the order of the replies."""

    tensor: str
    weights: Sequence[float]


class LinearAlgorithm(FederatedAlgorithm):
    """One that needs no more of a round's replies than weighted sums, which ranks can add up with one all-reduce."""

    @abstractmethod
    def sums(self, replies: Sequence[Reply], weights: Sequence[float]) -> Mapping[str, WeightedSum]:
        """Which sums it needs, by names of its own, from the replies' numbers: their tensors may be elsewhere."""

    @abstractmethod
    def move(self, memory: ServerMemory, model: Tensor, sums: Vectors) -> Tensor:
        """The next x, (d,), not in place, from the sums by name, (d,) each. May change the memory."""

    def advance(
        self, memory: ServerMemory, model: Tensor, replies: Sequence[Reply], weights: Sequence[float]
    ) -> Tensor:
        """See `FederatedAlgorithm.advance`."""
        asked = self.sums(replies, weights)
        return self.move(memory, model, {key: added_up(each, replies) for key, each in asked.items()})


def added_up(asked: WeightedSum, replies: Sequence[Reply]) -> Tensor:
    """(d,), one of a `LinearAlgorithm`'s sums."""
    return weighted_rows([reply.tensors[asked.tensor] for reply in replies], asked.weights)

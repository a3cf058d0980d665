"""What server and clients tell each other: flat tensors and a few numbers, whatever carries them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

DELTA = "delta"
REST = "rest"


@dataclass(frozen=True, eq=False, kw_only=True)
class Broadcast:
    """What a server sends to the clients of a round.

    Attributes:
        version: Of the model: how many aggregations it has behind it.
        model: The averaged part of the model, flat, see `Layout`: (d,) trained elements and those behind them.
        extras: What else the algorithm's clients need, by name, each (d,).
    """

    version: int
    model: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return self.model.nbytes + sum(tensor.nbytes for tensor in self.extras.values())


@dataclass(frozen=True, eq=False, kw_only=True)
class Reply:
    """What a client sends back.

    Attributes:
        client: Its number.
        version: That of the broadcast that it answers.
        num_samples: How many it has trained on; 0 counts for nothing.
        num_steps: Local steps that it has taken.
        tensors: By name: "delta", (d,), what its trained elements have changed by, or what its algorithm sends for
            that; "rest", the elements behind them as they are, where there are any; those of the algorithm, (d,) each.
        wire_bytes: How many bytes the tensors were on the wire; None if they were sent as they are.
    """

    client: int
    version: int
    num_samples: int
    num_steps: int
    tensors: Mapping[str, Tensor]
    wire_bytes: int | None = None

    @property
    def delta(self) -> Tensor:
        """(d,)."""
        return self.tensors[DELTA]

    @property
    def num_bytes(self) -> int:
        """On the wire."""
        if self.wire_bytes is not None:
            return self.wire_bytes
        return sum(tensor.nbytes for tensor in self.tensors.values())

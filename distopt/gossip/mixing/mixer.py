"""The exchange as mixing rules see it: rows in, weighted averages of all ranks' rows out."""

from typing import Protocol

from torch import Tensor

from distopt.gossip.codec import Codec


class Mixer(Protocol):
    """One round's exchange. A real rank has one row; a simulation has one for each of its nodes.

    Attributes:
        squares: (n,) float64, the sum of the squared weights of each row's average.
    """

    squares: Tensor

    def mix(self, *rows: Tensor, by_squares: Tensor | None = None) -> tuple[Tensor, ...]:
        """`W rows` for each of the (n, k), new; all in one message.

        Args:
            rows: Any number of tensors.
            by_squares: One more, which is multiplied by the squares of the weights and comes last.
        """

    def mix_(self, rows: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """`W rows` in their own place, and new `W others`; all in one message. If it fails, the rows are as before."""

    def mix_coded(self, rows: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
        """What decoding makes of the code of each row (n, k), and the averages of that over the ranks, (n, k)."""

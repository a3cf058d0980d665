"""What an attachment tells of its gradients to whoever listens: a test of their noise, say.

An attachment that can be listened to has `observe_gradients(observer)`, `makes_dense_mean` and `add_up`, see
`Observable`. Where nobody listens it costs nothing.

Limits: a step that is left out (a gradient was not finite, a rank was lost) has no `end`; the next one begins anew.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor


class GradientObserver(Protocol):
    """Hears of gradients in parts: `begin`, then for each part `local` and perhaps `mean`, then `end`.

    `mean` and `end` may come in another thread than `begin` and `local`, but never two calls at once, and all of them
    before the optimizer's step of those gradients (with local steps: before the exchange is over).
    """

    def begin(self) -> bool:
        """Before the exchange of a step, on every rank alike: whether this step's gradients are wanted."""

    def local(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """A part of this rank's own gradients, before anything is done to it.

        Args:
            parameters: Those of the part, the same on every rank.
            gradients: Of each the gradient, of its shape, in the dtype of the exchange, without a loss scale. Neither
                to be changed nor kept. Zeros where the backward pass did not reach a parameter.
        """

    def mean(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """The same part averaged over the ranks, the same bits on each; only where `makes_dense_mean`."""

    def end(self) -> None:
        """All parts have been given."""


class Handle(Protocol):
    """Ends an observation."""

    def remove(self) -> None:
        """Tells the observer nothing any more."""


class Observable(Protocol):
    """What an attachment must have to be listened to."""

    @property
    def family(self) -> str:
        """Its family: "ddp", or "local", whose gradients are what local steps have moved."""

    @property
    def makes_dense_mean(self) -> bool:
        """Whether `GradientObserver.mean` is called."""

    def observe_gradients(self, observer: GradientObserver) -> Handle:
        """Tells the observer of every exchange from now on, until the handle's `remove`. On every rank alike."""

    def add_up(self, tensor: Tensor) -> Callable[[], int]:
        """Starts to sum a float tensor (n,), in place, over the ranks that take part; the same bits on each.

        Collective, between the optimizer's steps. The tensor is on the parameters' device.

        Returns:
            What waits for the sum, and says over how many ranks it was made.
        """

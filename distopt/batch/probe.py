"""A sample of a gradient's coordinates, the same on every rank: what stands for the whole where no mean of it exists.

One coordinate is drawn from each of `size` equal stretches of the flat gradient (stratified sampling: every coordinate
is as likely as any other, and they come in order). Each draw has its own seed, so that errors average out over tests.

Limits: positions count each parameter's entries in its memory order, which must be the same on all ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distopt.ops.checks import is_dense_in_memory


class Probe:
    """Draws coordinates of a model's gradient.

    Args:
        parameters: Of the model, in an order that all ranks share.
        size: Coordinates of a draw; all of them where there are no more.
        seed: The same on all ranks.

    Attributes:
        numel: Coordinates of the whole gradient.
        size: Coordinates of a draw.
    """

    def __init__(self, parameters: Sequence[Tensor], *, size: int, seed: int) -> None:
        starts = [0]
        for parameter in parameters:
            starts.append(starts[-1] + parameter.numel())
        self._number = {id(parameter): i for i, parameter in enumerate(parameters)}
        self._starts = starts
        self.numel = starts[-1]
        self.size = min(size, self.numel)
        self._seed = seed
        self._stretches = torch.arange(self.size, dtype=torch.float64)
        self._bounds = torch.tensor(starts)
        self._positions: list[Tensor] = []
        self._places: list[int] = []

    def draw(self, number: int, device: torch.device) -> None:
        """Draws the coordinates of this number: the same for the same seed and number."""
        if self.size == self.numel:
            if self._positions:
                return
            positions = torch.arange(self.numel)
        else:
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + number) % 2**63)
            within = torch.rand(self.size, generator=generator)
            positions = self._stretches.add(within).mul_(self.numel / self.size).long().clamp_(max=self.numel - 1)
        self._places = torch.searchsorted(positions, self._bounds).tolist()
        self._positions = [
            (positions[first:last] - start).to(device)
            for first, last, start in zip(self._places, self._places[1:], self._starts, strict=False)
        ]

    def gather_(self, into: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Writes the drawn coordinates of a part of the gradient to their places in `into`, shape (size,)."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            number = self._number.get(id(parameter))
            if number is None:
                continue
            first, last = self._places[number], self._places[number + 1]
            if first < last:
                into[first:last] = flat(gradient)[self._positions[number]]


def flat(gradient: Tensor) -> Tensor:
    """A gradient's entries in memory order, shape (numel,), without a copy where they are dense in memory."""
    if is_dense_in_memory(gradient):
        return gradient.as_strided((gradient.numel(),), (1,))
    return gradient.reshape(-1)

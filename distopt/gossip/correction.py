"""When and where variance correction is applied to a model's flat rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distopt.gossip.variance import respread, respread_factors, row_variances

CORRECTIONS = ("off", "on", "auto")
_AUTO_BELOW = 0.9  # "auto" corrects a tensor while averaging leaves less than this of its variance


@dataclass(frozen=True)
class Segment:
    """Where one tensor lies in a flat row.

    Attributes:
        name: Of the parameter.
        start: First element.
        stop: Behind the last.
        dimensions: Of its shape.
    """

    name: str
    start: int
    stop: int
    dimensions: int


class Correction:
    """Restores the spread of averaged rows, tensor by tensor.

    Args:
        mode: "on" corrects every tensor, "auto" those of at least two dimensions that lose more than a tenth of their
            variance: averages of models that resemble each other are left alone.
        segments: The tensors of a row.

    Attributes:
        ratio: (n,), what the last average left of the variance of the tensor that lost most.
    """

    def __init__(self, mode: str, segments: Sequence[Segment]) -> None:
        least = 2 if mode == "auto" else 0
        self._below = _AUTO_BELOW if mode == "auto" else 1.0
        self._segments = [each for each in segments if each.dimensions >= least and each.stop - each.start > 1]
        self.ratio: Tensor | None = None

    def variances(self, rows: Tensor) -> Tensor:
        """(n, t) float64, of each corrected tensor: travels with the rows, taken before they are mixed."""
        columns = [row_variances(rows[:, each.start : each.stop]) for each in self._segments]
        return torch.stack(columns, 1) if columns else rows.new_zeros((len(rows), 0), dtype=torch.float64)

    def restore_(self, rows: Tensor, targets: Tensor, squares: Tensor) -> None:
        """Corrects averages in place.

        Args:
            rows: (n, d).
            targets: (n, t), the averages of `variances`, with the same weights.
            squares: (n,), sums of the squared weights.
        """
        ratios = []
        for number, each in enumerate(self._segments):
            part = rows[:, each.start : each.stop]
            factors, ratio = respread_factors(part, targets[:, number], squares)
            restored = respread(part, torch.where(ratio < self._below, factors, 1.0))
            if restored is not part:
                part.copy_(restored)
            ratios.append(ratio)
        self.ratio = torch.stack(ratios).amin(0) if ratios else None

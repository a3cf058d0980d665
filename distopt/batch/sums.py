"""What a test needs of a gradient, added up part by part as an attachment tells of it.

Where the attachment makes a dense mean, the sums are those of the whole gradient: this rank's |g|^2 and |gbar|^2, and
their inner product where the test asks for it (which takes a copy of the gradient for the time of the exchange).
Elsewhere they are |g|^2 and a probe of the gradient, from which the ranks make the rest (see `from_probe`).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from distopt.batch import estimator
from distopt.batch.probe import Probe, flat


class _Of(TypedDict):
    num_gradients: int
    samples: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sums:
    """What J gradients, each the mean over m samples, say of their noise.

    Attributes:
        num_gradients: J.
        samples: m.
        squares: A, the sum of their squared norms.
        square_of_mean: B, the squared norm of their mean.
        projections: The sum of their squared inner products with their mean; 0 where no test asks for it.
        coordinate_ratio: See `estimator.coordinate_ratio`; 0 where no test asks for it.
    """

    num_gradients: int
    samples: float
    squares: float
    square_of_mean: float
    projections: float = 0.0
    coordinate_ratio: float = 0.0

    def quantities(self, test: str) -> dict[str, float]:
        """What is to be averaged over tests, by name; unbiased, so that |G|^2 may be negative here."""
        of: _Of = {"num_gradients": self.num_gradients, "samples": self.samples}
        trace = estimator.trace(self.squares, self.square_of_mean, **of)
        found = {
            "trace": trace,
            "square": estimator.square(self.square_of_mean, trace, **of),
            "raw_square": self.square_of_mean,
        }
        if test == "augmented":
            found["inner_product"] = estimator.inner_product_variance(self.projections, self.square_of_mean, **of)
            found["orthogonal"] = estimator.orthogonal_variance(
                self.squares, self.projections, self.square_of_mean, **of
            )
        if test == "coordinate":
            found["coordinate_ratio"] = self.coordinate_ratio
        return found


class DenseSums:
    """Adds up where `mean` is told.

    Args:
        parameters: Of the model, in an order that all ranks share.
        projects: Whether <g, gbar> is wanted.
        device: Of the gradients.
    """

    def __init__(self, parameters: Sequence[Tensor], *, projects: bool, device: torch.device) -> None:
        self._numbers = {id(parameter): i for i, parameter in enumerate(parameters)}
        self._projects = projects
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._own: dict[int, Tensor] = {}

    def clear(self, number: int) -> None:
        """Begins the test of this number."""
        self._sums.zero_()
        self._own = {}

    def tensors(self) -> list[Tensor]:
        """What has been added up so far, and of which parameters the mean is still to come: numbers and gradients."""
        return [self._sums, torch.tensor(list(self._own), dtype=torch.int64), *self._own.values()]

    def load(self, number: int, tensors: Sequence[Tensor]) -> None:
        """Goes on adding up the test of this number."""
        self.clear(number)
        self._sums.copy_(tensors[0])
        self._own = {int(i): own.to(self._sums.device) for i, own in zip(tensors[1], tensors[2:], strict=True)}

    @torch.no_grad()
    def local(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """See `GradientObserver.local`."""
        self._sums[0] += squared_norm(gradients)
        if self._projects:
            kept = {self._numbers[id(p)]: g.detach().clone() for p, g in zip(parameters, gradients, strict=True)}
            self._own.update(kept)

    @torch.no_grad()
    def mean(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """See `GradientObserver.mean`."""
        self._sums[1] += squared_norm(gradients)
        for parameter, gradient in zip(parameters, gradients, strict=True) if self._projects else ():
            own = self._own.pop(self._numbers[id(parameter)])
            wide = torch.promote_types(gradient.dtype, torch.float32)
            self._sums[2] += torch.dot(flat(own).to(wide), flat(gradient).to(wide))

    def summands(self) -> Tensor:
        """What is added up over the ranks, shape (3,), float64: |g|^2, |gbar|^2 and <g, gbar>^2."""
        return torch.stack([self._sums[0], self._sums[1], self._sums[2].square()])

    @staticmethod
    def sums(total: Tensor, num_ranks: int, samples: float) -> Sums:
        """From the sum over the ranks of `summands`."""
        squares, means, projections = total.tolist()
        return Sums(
            num_gradients=num_ranks,
            samples=samples,
            squares=squares,
            square_of_mean=means / num_ranks,  # of bits that are equal: so are they on ranks whose hardware differs
            projections=projections,
        )


class ProbeSums:
    """Adds up where only `local` is told.

    Args:
        probe: Draws the coordinates.
        device: Of the gradients.

    Attributes:
        row: The probe of this rank's gradient, shape (probe.size,), float32.
        square: This rank's |g|^2.
    """

    def __init__(self, probe: Probe, *, device: torch.device) -> None:
        self.probe = probe
        self._device = device
        self.row = torch.zeros(probe.size, device=device)
        self._square = torch.zeros((), dtype=torch.float64, device=device)

    def clear(self, number: int) -> None:
        """Begins the test of this number."""
        self.probe.draw(number, self._device)
        self.row = torch.zeros_like(self.row)
        self._square.zero_()

    def tensors(self) -> list[Tensor]:
        """What has been added up so far."""
        return [self.row, self._square]

    def load(self, number: int, tensors: Sequence[Tensor]) -> None:
        """Goes on adding up the test of this number."""
        self.clear(number)
        self.row.copy_(tensors[0])
        self._square.copy_(tensors[1])

    @torch.no_grad()
    def local(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """See `GradientObserver.local`."""
        self._square += squared_norm(gradients)
        self.probe.gather_(self.row, parameters, gradients)

    def mean(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Not needed: the mean of the probes is made by the ranks."""

    @property
    def square(self) -> Tensor:
        """|g|^2 of this rank, a scalar, float64."""
        return self._square.clone()


def from_probe(
    mean: Tensor,
    *,
    num_gradients: int,
    samples: float,
    squares: float,
    probe_squares: float,
    projections: float = 0.0,
    coordinate_squares: Tensor | None = None,
) -> Sums:
    """The sums of whole gradients from those of a probe of them.

    |gbar|^2 is what the probe says of it in relation to the squared norms, which are known exactly: where few
    coordinates hold most of a gradient, this errs less than scaling by the number of coordinates.

    Args:
        mean: The mean of the probes, shape (n,).
        num_gradients: J.
        samples: m.
        squares: A, of the whole gradients.
        probe_squares: The same of the probes.
        projections: The sum of squared inner products of the probes with their mean.
        coordinate_squares: The sum of their squares on each coordinate, where the test asks for it.
    """
    # A probe that has missed all of a gradient says nothing: NaN, and the test does not count.
    scale = squares / probe_squares if probe_squares > 0.0 else (math.nan if squares else 0.0)
    ratio = 0.0
    if coordinate_squares is not None:
        ratio = estimator.coordinate_ratio(mean, coordinate_squares, num_gradients=num_gradients, samples=samples)
    return Sums(
        num_gradients=num_gradients,
        samples=samples,
        squares=squares,
        square_of_mean=scale * float(mean.double().square().sum()),
        projections=scale**2 * projections,
        coordinate_ratio=ratio,
    )


def squared_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of all entries, a scalar, float64; computed in no less than float32."""
    norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    return torch.stack(norms).double().square().sum() if norms else torch.zeros((), dtype=torch.float64)


def is_finite(quantities: Mapping[str, float]) -> bool:
    """Whether a test counts: a step with Inf, which a GradScaler skips, says nothing of noise.

    Nor does one in which all gradients agree on every coordinate: an infinite ratio has no average.
    """
    return all(math.isfinite(value) for value in quantities.values())

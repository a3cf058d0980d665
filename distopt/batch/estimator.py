"""How noisy a gradient is, and how large a batch that makes it calm enough: pure functions of a few sums.

J gradients g_1 .. g_J of the same model, each the mean over m samples; gbar is their mean, b = J m the whole batch.
With S the covariance of one sample's gradient and G its expectation,

    A = sum_j |g_j|^2,   B = |gbar|^2,   trS = m / (J - 1) (A - J B),   |G|^2 = B - trS / (J m)

have the expectations that they name, for any J >= 2 (McCandlish et al., arXiv 1812.06162, appendix A.1, for J ranks).
The noise scale trS / |G|^2 is the batch at which noise and signal are as large as each other.

Tests, and the batch T that just passes each: norm (Byrd et al. 2012; AdAdaGrad, arXiv 2402.11215), inner product and
orthogonality (Bollapragada et al. 2018; both together: "augmented"), and coordinate-wise.

Limits: the unbiased |G|^2 of one test may be negative. Average several, then cut at 0.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def trace(squares: float, square_of_mean: float, *, num_gradients: int, samples: float) -> float:
    """trS, the trace of the covariance of one sample's gradient: unbiased.

    Args:
        squares: A, the sum of the squared norms of the gradients.
        square_of_mean: B, the squared norm of their mean.
        num_gradients: J, at least 2.
        samples: m, of which each gradient is the mean.
    """
    return samples / (num_gradients - 1) * (squares - num_gradients * square_of_mean)


def square(square_of_mean: float, trace: float, *, num_gradients: int, samples: float) -> float:
    """|G|^2, the squared norm of the expected gradient: unbiased, and negative at times.

    Args:
        square_of_mean: B, the squared norm of the mean of the gradients.
        trace: trS.
        num_gradients: J.
        samples: m, of which each gradient is the mean.
    """
    return square_of_mean - trace / (num_gradients * samples)


def inner_product_variance(projections: float, square_of_mean: float, *, num_gradients: int, samples: float) -> float:
    """Variance over samples of <g_i, gbar>.

    Args:
        projections: sum_j <g_j, gbar>^2.
        square_of_mean: B, which is also the mean of <g_j, gbar>.
        num_gradients: J, at least 2.
        samples: m, of which each gradient is the mean.
    """
    return samples / (num_gradients - 1) * (projections - num_gradients * square_of_mean**2)


def orthogonal_variance(
    squares: float, projections: float, square_of_mean: float, *, num_gradients: int, samples: float
) -> float:
    """Variance over samples, summed over coordinates, of the part of g_i that is orthogonal to gbar.

    Args:
        squares: A, the sum of the squared norms of the gradients.
        projections: sum_j <g_j, gbar>^2.
        square_of_mean: B, the squared norm of their mean.
        num_gradients: J, at least 2.
        samples: m, of which each gradient is the mean.
    """
    along = projections / square_of_mean if square_of_mean > 0.0 else 0.0
    return samples / (num_gradients - 1) * (squares - along)


def coordinate_ratio(mean: Tensor, squares: Tensor, *, num_gradients: int, samples: float) -> float:
    """The least gbar_c^2 / Var_c over coordinates c: the coordinate-wise test needs a batch of 1 / (eta^2 of this).

    A coordinate on which all gradients agree needs nothing, a zero that they agree on neither.

    Args:
        mean: gbar, shape (n,).
        squares: sum_j g_jc^2, shape (n,), of the same dtype.
        num_gradients: J, at least 2.
        samples: m, of which each gradient is the mean.
    """
    mean, squares = mean.double(), squares.double()
    variance = (squares - num_gradients * mean.square()).mul_(samples / (num_gradients - 1))
    noisy = variance > 1e-6 * squares  # below that it is rounding
    ratios = torch.where(noisy, mean.square() / variance.clamp(min=torch.finfo(torch.float64).tiny), torch.inf)
    return float(ratios.min()) if ratios.numel() else math.inf


def noise_scale(trace: float, square: float) -> float:
    """The trace of S over |G|^2, in samples; 0 without noise, infinite without signal."""
    return _over(trace, square)


def norm_test(trace: float, square: float, *, eta: float) -> float:
    """The batch T that just passes trS / T <= eta^2 |G|^2."""
    return _over(trace, eta**2 * square)


def inner_product_test(variance: float, square: float, *, theta: float) -> float:
    """The batch T that just passes Var(<g_i, gbar>) / T <= theta^2 |G|^4."""
    return _over(variance, theta**2 * square**2)


def orthogonality_test(variance: float, square: float, *, nu: float) -> float:
    """The batch T that just passes Var(the part of g_i orthogonal to gbar) / T <= nu^2 |G|^2."""
    return _over(variance, nu**2 * square)


def coordinate_test(ratio: float, *, eta: float) -> float:
    """The batch T that just passes Var_c / T <= eta^2 gbar_c^2 on every coordinate; see `coordinate_ratio`."""
    return _over(1.0, eta**2 * ratio)


def grown(batch: int, needed: float, *, growth: float, largest: int, multiple: int = 1) -> int:
    """The batch of the next step: `min(ceil(max(b, T)), max)`; never less than now, at most `growth` times as large.

    Args:
        batch: b, a multiple of `multiple`.
        needed: T, of a test; may be infinite.
        growth: At least 1.
        largest: At least `batch`, and a multiple of `multiple`.
        multiple: Ranks, say, all of which take as many samples; rounded up.
    """
    wanted = math.ceil(max(batch, min(needed, growth * batch, largest)))
    return min(-(-wanted // multiple) * multiple, largest)


class Averages:
    """Exponential averages over about `window` tests, the plain mean of all for as long as there are fewer.

    Args:
        window: Tests; 1 keeps the latest only.

    Attributes:
        count: Tests so far.
        values: The average of each quantity, by name.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.count = 0
        self.values: dict[str, float] = {}

    def add(self, found: Mapping[str, float]) -> None:
        """Takes the quantities of one test in."""
        self.count += 1
        weight = 1.0 / min(self.count, self.window)
        for name, value in found.items():
            before = self.values.get(name, 0.0)
            self.values[name] = before + weight * (value - before)

    @property
    def is_settled(self) -> bool:
        """Whether a whole window of tests is in it."""
        return self.count >= self.window


def _over(noise: float, signal: float) -> float:
    if noise <= 0.0:
        return 0.0
    return noise / signal if signal > 0.0 else math.inf

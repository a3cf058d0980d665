"""Variance-corrected averaging: models that do not know each other lose the spread of their weights, and get it back.

Tian et al., "Vanishing Variance Problem in Fully Decentralized Neural-Network Systems", 2024.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distopt.errors import ConfigError

_FLAT = 1e-12  # of max(mean squared, target): less spread than this is rounding, and says nothing


def variance_corrected(tensors: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """The weighted average, with the mean of its elements kept and their variance restored.

    `(avg - mu) sqrt(target / s2) + mu` with the weighted average of the tensors' variances as target. The factor is at
    least 1 and at most `1 / sqrt(sum a_i^2)`, by which uncorrelated tensors lose. A tensor of one element, or without
    spread, is averaged.

    Args:
        tensors: Of one shape and floating dtype, on one device; not changed.
        weights: a_i, at least 0, which add up to 1; 1/N each if left out.

    Returns:
        A new tensor like them.

    Raises:
        ConfigError: There are none, they are not alike, or the weights are not such.
    """
    if not tensors or any((t.shape, t.dtype) != (tensors[0].shape, tensors[0].dtype) for t in tensors):
        forms = [(tuple(t.shape), t.dtype) for t in tensors]
        raise ConfigError(
            f"tensors must be one or more, of one shape and dtype, got {forms!r:.200}; average them apart"
        )
    if not tensors[0].is_floating_point():
        raise ConfigError(f"tensors must be of a floating dtype, got {tensors[0].dtype}; leave counters as they are")
    parts = [1.0 / len(tensors)] * len(tensors) if weights is None else [float(weight) for weight in weights]
    if len(parts) != len(tensors) or min(parts) < 0 or not math.isclose(sum(parts), 1.0, abs_tol=1e-6):
        raise ConfigError(
            f"weights must be {len(tensors)} numbers of at least 0 that add up to 1, got {parts!r:.200}; divide them "
            "by their sum"
        )
    wide = [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
    average, target = torch.zeros_like(wide[0]), torch.zeros((1,), dtype=torch.float64, device=wide[0].device)
    for part, tensor in zip(parts, wide, strict=True):
        average.add_(tensor, alpha=part)
        target.add_(row_variances(tensor.reshape(1, -1)), alpha=part)
    rows = average.view(1, -1)
    factor, _ = respread_factors(rows, target, sum(part * part for part in parts))
    return respread(rows, factor).view_as(average).to(tensors[0].dtype)


def row_variances(rows: Tensor) -> Tensor:
    """(n,) float64, the variance of each row of (n, k) around its mean; 0 where k < 2."""
    if rows.shape[1] < 2:
        return torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).var(1, correction=0).double()


def respread_factors(rows: Tensor, targets: Tensor, squares: Tensor | float) -> tuple[Tensor, Tensor]:
    """By what to move the elements of averages away from their means, and what of the spread averaging has left.

    Args:
        rows: (n, k), averages.
        targets: (n,) float64, the variances to reach: of the tensors as they were before anything was written over.
        squares: Sum of the squared weights of each average. Uncorrelated tensors lose by its root, and no factor is
            larger: a target that is always a little too high would otherwise add up over the rounds.

    Returns:
        (n,) float64 factors of at least 1, and (n,) ratios of the variances before, 1 where a row has no spread.
    """
    left = row_variances(rows)
    means = rows.to(torch.promote_types(rows.dtype, torch.float32)).mean(1).double() if rows.shape[1] else left
    ratio = torch.where(left <= _FLAT * torch.maximum(means * means, targets), 1.0, left / targets)
    largest = torch.as_tensor(squares, dtype=torch.float64, device=rows.device).rsqrt()
    return ratio.rsqrt().clamp(min=1.0).minimum(largest), ratio


def respread(rows: Tensor, factors: Tensor) -> Tensor:
    """The rows with each element's distance from its row's mean multiplied by the row's factor; 1 changes no bit.

    Where all factors are 1 it is the rows themselves, and else a new tensor.
    """
    if not rows.shape[1] or bool((factors <= 1).all()):
        return rows
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    means = wide.mean(1, keepdim=True)
    by = factors.to(wide.dtype)[:, None]
    spread = (wide - means).mul_(by).add_(means)
    return (spread if bool((factors > 1).all()) else torch.where(by > 1, spread, wide)).to(rows.dtype)

"""Checks of settings, and of the small vectors that come with a round: one number for each client."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distopt.config import check_number
from distopt.errors import ConfigError


def float_vector(field: str, values: Sequence[float] | Tensor, *, remedy: str, positive: bool = False) -> Tensor:
    """The values as (m,) float64 on the CPU.

    Raises:
        ConfigError: They are no vector of finite numbers, or `positive` is asked for and one is not.
    """
    vector = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    if vector.dim() != 1:
        raise ConfigError(f"{field} must be a flat vector, got shape {tuple(vector.shape)}; {remedy}")
    wrong = ~vector.isfinite() | (vector <= 0) if positive else ~vector.isfinite()
    if wrong.any():
        rule = "finite and above 0" if positive else "finite"
        i = int(wrong.nonzero()[0])
        raise ConfigError(f"{field} must be {rule}, got {float(vector[i])} at {i}; {remedy}")
    return vector


def check_from_zero(field: str, value: object, *, high: float = math.inf, remedy: str) -> None:
    """Raises `ConfigError` unless value is a finite number in [0, high]."""
    valid = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= high and value < math.inf
    if not valid:
        rule = "a number of at least 0" if high == math.inf else f"a number in [0, {high:g}]"
        raise ConfigError(f"{field} must be {rule}, got {value!r}; {remedy}")


def check_above_zero(field: str, value: object, *, remedy: str) -> None:
    """Raises `ConfigError` unless value is a finite number above 0."""
    check_number(field, value, rule="a number above 0", remedy=remedy, low=0.0, high=math.inf)


def check_shares(field: str, vector: Tensor) -> None:
    """Raises `ConfigError` unless the vector holds shares of a whole: none below 0, their sum 1 but for rounding."""
    total = float(vector.sum())
    if (vector < 0).any() or abs(total - 1.0) > 1e-6:
        raise ConfigError(
            f"{field} must be at least 0 and sum to 1, got the minimum {float(vector.min()) if len(vector) else 0.0} "
            f"and the sum {total}; use uniform_weights or sample_weights"
        )

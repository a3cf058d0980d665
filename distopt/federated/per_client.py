"""Configuration values that are one number for all clients, or one for each."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distopt.config import check_number
from distopt.errors import ConfigError

PerClient = float | tuple[float, ...]


def checked(field: str, value: Any, *, rule: str, remedy: str, low: float, high: float) -> PerClient:
    """One number, or a tuple of one per client of a list, an array or a tensor; each in (low, high].

    Raises:
        ConfigError: A number breaks its rule, or there is none.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = tuple(value.tolist())
    if isinstance(value, list):
        value = tuple(value)
    if not isinstance(value, tuple):
        check_number(field, value, rule=f"{rule} or one per client", remedy=remedy, low=low, high=high)
        number: float = value
        return number
    try:
        array = np.array(value)
    except ValueError:
        array = np.array(None)
    if array.ndim != 1 or array.dtype.kind not in "fiu" or not array.size:
        raise ConfigError(f"{field} must be {rule} or one per client, got {value!r}; {remedy}")
    wrong = ~((array > low) & (array <= high) & np.isfinite(array))
    if wrong.any():
        place = int(wrong.argmax())
        raise ConfigError(f"{field}[{place}] must be {rule}, got {value[place]!r}; {remedy}")
    return value


def for_clients(field: str, value: PerClient, num_clients: int) -> NDArray[np.float64]:
    """(num_clients,) float64 of a checked value.

    Raises:
        ConfigError: There is another number of them.
    """
    if not isinstance(value, tuple):
        return np.full(num_clients, value, dtype=np.float64)
    if len(value) != num_clients:
        raise ConfigError(
            f"{field} must be one number or one per client, {num_clients}, got {len(value)}; give one for each client"
        )
    return np.array(value, dtype=np.float64)

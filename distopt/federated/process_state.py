"""The state of what goes on round by round: a header that says whose it is, then plain values and tensors.

`torch.load(weights_only=True)` reads it back. The header holds the number of clients, because clients may have joined
since the start: a state may have more clients than the process that takes it, and the first ones must be the same.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distopt.errors import StateMismatchError

_FORMAT = 1


def to_state(kind: str, name: str, num_clients: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """The header and the values, arrays as tensors that share no memory with them."""
    state: dict[str, Any] = {"format": _FORMAT, "kind": kind, "name": name, "num_clients": num_clients}
    for key, value in values.items():
        state[key] = torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
    return state


def from_state(
    kind: str, name: str, num_clients: int, keys: tuple[str, ...], state: Mapping[str, Any], *, may_grow: bool
) -> dict[str, Any]:
    """The values of a state, tensors as arrays, after a look at the header.

    Args:
        kind: Of the process that takes the state.
        name: Of its model.
        num_clients: How many it has.
        keys: Of the values that must be there.
        state: What `to_state` made.
        may_grow: Whether the state may have more clients.

    Raises:
        StateMismatchError: The state belongs to another process, or a value is missing.
    """
    for key, expected in (("format", _FORMAT), ("kind", kind), ("name", name)):
        if state.get(key) != expected:
            raise StateMismatchError(
                f"{key} of the state must be {expected!r}, got {state.get(key)!r}; load it into what saved it"
            )
    saved = state.get("num_clients")
    if not isinstance(saved, int) or saved < num_clients or (saved > num_clients and not may_grow):
        rule = f"at least {num_clients}" if may_grow else str(num_clients)
        raise StateMismatchError(
            f"num_clients of the state must be {rule}, got {saved!r}; begin with as many clients as the run did"
        )
    if missing := [key for key in keys if key not in state]:
        raise StateMismatchError(f"the state must have the key {missing[0]!r}, got {sorted(state)}; save again")
    return {
        key: state[key].detach().cpu().numpy().copy() if isinstance(state[key], torch.Tensor) else state[key]
        for key in ("num_clients", *keys)
    }


def check_saved(name: str, saved: object, own: object) -> None:
    """Raises `StateMismatchError` unless what was saved is the process's own value."""
    if saved != own:
        raise StateMismatchError(
            f"{name} of the state must be {own!r} as in the configuration, got {saved!r}; "
            "resume with the configuration of the run's start"
        )


def check_same_start(name: str, saved: NDArray[Any], own: NDArray[Any]) -> None:
    """Raises `StateMismatchError` unless what was saved begins with the process's own values."""
    if not np.array_equal(saved[: len(own)], own):
        raise StateMismatchError(
            f"{name} of the state must be that of the configuration, got others for its first {len(own)} clients; "
            "resume with the configuration of the run's start"
        )

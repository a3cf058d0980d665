"""The models of the last few versions, for servers that take replies to them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distopt.errors import StateMismatchError

_KEY = "models"


class RecentModels:
    """Models (d,) by version.

    Args:
        max_age: Of the oldest one that is kept, in versions.
    """

    def __init__(self, max_age: int) -> None:
        self._max_age = max_age
        self._models: dict[int, Tensor] = {}

    def add(self, version: int, model: Tensor) -> None:
        """The newest version. Versions may be left out at whose end the model stayed as it was."""
        self._models[version] = model
        self._models = {v: kept for v, kept in self._models.items() if v >= version - self._max_age}

    def get(self, version: int) -> Tensor:
        """(d,); of a version that was left out, the next one's, which is the same."""
        return self._models[min(v for v in self._models if v >= version)]

    def add_clients(self, count: int) -> None:
        """Clients that join change nothing."""

    def state_dict(self) -> dict[str, Any]:
        """The models by version."""
        return {_KEY: dict(self._models)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            StateMismatchError: It is something else.
        """
        if not isinstance(state.get(_KEY), dict):
            raise StateMismatchError(f"the state must have {_KEY!r}, got {sorted(state)}; it is damaged")
        self._models = dict(state[_KEY])

"""How many samples each client has, as far as a server has been told: every reply says its own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distopt.errors import StateMismatchError
from distopt.federated.messages import Reply

_UNKNOWN = -1
_KEY = "samples"


class SampleCounts:
    """Of each client the number in its latest reply.

    Args:
        num_clients: How many are registered.
    """

    def __init__(self, num_clients: int) -> None:
        self._counts = torch.full((num_clients,), _UNKNOWN, dtype=torch.int64)

    def note(self, replies: Sequence[Reply]) -> None:
        """Takes the numbers over from replies."""
        for reply in replies:
            self._counts[reply.client] = reply.num_samples

    @property
    def mean(self) -> float:
        """Of those who have replied so far: what the others are taken to have."""
        known = self._counts[self._counts != _UNKNOWN]
        return float(known.double().mean())

    def add_clients(self, count: int) -> None:
        """So many clients join, with numbers that are not known yet."""
        self._counts = torch.cat([self._counts, torch.full((count,), _UNKNOWN, dtype=torch.int64)])

    def state_dict(self) -> dict[str, Any]:
        """A copy."""
        return {_KEY: self._counts.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            StateMismatchError: It is of another number of clients, or damaged.
        """
        counts = state.get(_KEY)
        if not isinstance(counts, Tensor) or counts.dtype != torch.int64 or counts.shape != self._counts.shape:
            raise StateMismatchError(
                f"{_KEY!r} in the state must be ({len(self._counts)},) torch.int64; it is damaged, or of other clients"
            )
        self._counts = counts.clone()

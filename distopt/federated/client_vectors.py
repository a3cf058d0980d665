"""One vector for each client that has ever had one, of a million that may not.

Limits: a vector that is still zero takes no memory, and every other takes all of its own; with `folder`, those lie in a
memory-mapped file there, which grows by doubling and is deleted with the object.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distopt.errors import StateMismatchError

_FIRST_ROWS = 64


class ClientVectors:
    """Vectors (d,) by client, zeros where there is none.

    Args:
        length: d.
        dtype: Of all of them.
        folder: Where to keep them in a file; in memory if left out.
    """

    def __init__(self, length: int, dtype: torch.dtype, *, folder: str | os.PathLike[str] | None = None) -> None:
        self.length = length
        self.dtype = dtype
        self._folder = None if folder is None else Path(folder)
        self._row_of: dict[int, int] = {}
        self._rows = self._new_rows(0)

    def __len__(self) -> int:
        return len(self._row_of)

    def __contains__(self, client: int) -> bool:
        return client in self._row_of

    def __iter__(self) -> Iterator[int]:
        """The clients that have a vector, in the order in which they got one."""
        return iter(self._row_of)

    def get(self, client: int) -> Tensor:
        """(d,), a copy."""
        row = self._row_of.get(client)
        return torch.zeros(self.length, dtype=self.dtype) if row is None else self._rows[row].clone()

    def get_many(self, clients: Sequence[int]) -> Tensor:
        """(len(clients), d), a copy."""
        found = torch.zeros(len(clients), self.length, dtype=self.dtype)
        for vector, client in zip(found, clients, strict=True):
            if (row := self._row_of.get(client)) is not None:
                vector.copy_(self._rows[row])
        return found

    def set(self, client: int, vector: Tensor) -> None:
        """Keeps a copy."""
        row = self._row_of.setdefault(client, len(self._row_of))
        if row == len(self._rows):
            rows = self._new_rows(max(_FIRST_ROWS, 2 * row))
            rows[:row] = self._rows
            self._rows = rows
        self._rows[row] = vector

    def state_dict(self) -> dict[str, Any]:
        """The clients, int64 (m,), and their vectors, (m, d)."""
        count = len(self._row_of)
        return {"clients": torch.tensor(list(self._row_of), dtype=torch.int64), "rows": self._rows[:count].clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            StateMismatchError: Vectors of another length or dtype.
        """
        rows = state["rows"]
        if rows.dtype != self.dtype or rows.shape != (len(state["clients"]), self.length):
            raise StateMismatchError(
                f"the clients' vectors must be {self.dtype} of length {self.length}, got {rows.dtype} of shape "
                f"{tuple(rows.shape)}; the checkpoint belongs to another model"
            )
        self._row_of = {client: row for row, client in enumerate(state["clients"].tolist())}
        self._rows = self._new_rows(len(rows))
        self._rows[:] = rows

    def _new_rows(self, count: int) -> Tensor:
        if self._folder is None or not count:
            return torch.zeros(count, self.length, dtype=self.dtype)
        self._folder.mkdir(parents=True, exist_ok=True)
        item = torch.empty((), dtype=self.dtype).element_size()
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix="client-vectors-") as file:
            # The name goes at once, the file with the last who has it mapped; new parts of a file are zeros.
            mapped = np.memmap(file.name, dtype=np.uint8, mode="w+", shape=(count * self.length * item,))
        return torch.from_numpy(mapped).view(self.dtype).view(count, self.length)

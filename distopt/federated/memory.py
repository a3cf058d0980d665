"""What a server remembers between rounds besides the model."""

import os
from typing import Any

import torch
from torch import Tensor

from distopt.errors import StateMismatchError
from distopt.federated.client_vectors import ClientVectors


class ServerMemory:
    """Vectors of the trained elements, tables of one vector per client, and small counters that algorithms put there.

    A vector is replaced, never changed in place: a state or a broadcast that was handed out may still hold it.

    Args:
        num_trained: d.
        dtype: Of the vectors.
        num_clients: N, how many are registered.
        vectors: Names of vectors, zeros at first.
        tables: Names of tables, zeros at first.
        folder: Where tables lie in files; in memory if left out.

    Attributes:
        version: Of the model that the replies of this round are added to; `Server` keeps it.
        counters: What else an algorithm remembers: objects with `state_dict` and `load_state_dict`.
    """

    def __init__(
        self,
        num_trained: int,
        dtype: torch.dtype,
        num_clients: int,
        *,
        vectors: tuple[str, ...] = (),
        tables: tuple[str, ...] = (),
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.version = 0
        self.num_trained = num_trained
        self.dtype = dtype
        self.num_clients = num_clients
        self.vectors: dict[str, Tensor] = {name: torch.zeros(num_trained, dtype=dtype) for name in vectors}
        self.tables = {name: ClientVectors(num_trained, dtype, folder=folder) for name in tables}
        self.counters: dict[str, Any] = {}

    def remember(self, name: str, value: float = 0.0) -> None:
        """Adds a vector of this value, for what only some settings of an algorithm need."""
        self.vectors[name] = torch.full((self.num_trained,), value, dtype=self.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "num_clients": self.num_clients,
            "vectors": dict(self.vectors),
            "tables": {name: table.state_dict() for name, table in self.tables.items()},
            "counters": {name: counter.state_dict() for name, counter in self.counters.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            StateMismatchError: It has not what this memory has; nothing was changed.
        """
        for kind, have in (("vectors", self.vectors), ("tables", self.tables), ("counters", self.counters)):
            if set(state[kind]) != set(have):
                raise StateMismatchError(
                    f"the {kind} that a server remembers must be {sorted(have)}, got {sorted(state[kind])}; the "
                    "checkpoint belongs to another algorithm or to other settings of it"
                )
        for name, vector in state["vectors"].items():
            if vector.dtype != self.dtype or vector.shape != (self.num_trained,):
                raise StateMismatchError(
                    f"{name!r} must be {self.dtype} of length {self.num_trained}, got {vector.dtype} of shape "
                    f"{tuple(vector.shape)}; the checkpoint belongs to another model"
                )
        self.num_clients = int(state["num_clients"])
        self.vectors = dict(state["vectors"])
        for name, table in self.tables.items():
            table.load_state_dict(state["tables"][name])
        for name, counter in self.counters.items():
            counter.load_state_dict(state["counters"][name])

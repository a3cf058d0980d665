"""What a server remembers between rounds besides the model."""

from typing import Any

import torch
from torch import Tensor

from distopt.federated.client_vectors import ClientVectors


class ServerMemory:
    """Vectors of the trained elements, tables of one vector per client, and small counters that algorithms put there.

    Args:
        num_trained: d.
        dtype: Of the vectors.
        num_clients: N, how many are registered.
        vectors: Names of vectors, zeros at first.
        tables: Names of tables, zeros at first.
    """

    def __init__(
        self,
        num_trained: int,
        dtype: torch.dtype,
        num_clients: int,
        *,
        vectors: tuple[str, ...] = (),
        tables: tuple[str, ...] = (),
    ) -> None:
        self.num_trained = num_trained
        self.num_clients = num_clients
        self.vectors: dict[str, Tensor] = {name: torch.zeros(num_trained, dtype=dtype) for name in vectors}
        self.tables = {name: ClientVectors(num_trained, dtype) for name in tables}
        self.counters: dict[str, Any] = {}  # with state_dict and load_state_dict

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "num_clients": self.num_clients,
            "vectors": dict(self.vectors),
            "tables": {name: table.state_dict() for name, table in self.tables.items()},
            "counters": {name: counter.state_dict() for name, counter in self.counters.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.num_clients = int(state["num_clients"])
        self.vectors = dict(state["vectors"])
        for name, table in self.tables.items():
            table.load_state_dict(state["tables"][name])
        for name, counter in self.counters.items():
            counter.load_state_dict(state["counters"][name])

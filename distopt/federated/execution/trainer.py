"""What every way of computing the clients has in common: their data, their batches, and what they keep."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from distopt.federated.algorithm import FederatedAlgorithm
from distopt.federated.client import Client, kept_names
from distopt.federated.client_vectors import ClientVectors
from distopt.federated.data import ClientData
from distopt.federated.exchange import HERE, Exchange
from distopt.federated.functional import Batch, Loss
from distopt.federated.layout import Layout
from distopt.federated.local_training import LocalTraining
from distopt.federated.messages import Broadcast, Reply
from distopt.federated.randomness import stream_key
from distopt.federated.uplink import UplinkCompression


class Trainer(ABC):
    """The clients of a simulation.

    Args:
        model: Whose averaged part is overwritten.
        layout: Of the model.
        algorithm: The rule.
        local: What a client does in a round.
        data: The clients' own.
        loss: Mean loss of a batch.
        seed: Of batches and dropout.
        uplink: How the clients' vectors travel; None sends them as they are.
        folder: Where to keep what the clients keep, in files; in memory if left out.

    Attributes:
        mode: Its name.
        kept: What the clients keep, by name.
        exchange: With the other processes that compute the same round.
        why: Why it was chosen, if it was.
    """

    mode: ClassVar[str]
    exchange: Exchange = HERE
    why: str = "asked for by name"

    def __init__(
        self,
        *,
        model: nn.Module,
        layout: Layout,
        algorithm: FederatedAlgorithm,
        local: LocalTraining,
        data: ClientData,
        loss: Loss,
        seed: int,
        uplink: UplinkCompression | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.model, self.layout, self.algorithm = model, layout, algorithm
        self.local, self.data, self.loss, self.uplink = local, data, loss, uplink
        names = kept_names(algorithm, uplink)
        self.kept = {name: ClientVectors(layout.num_trained, layout.dtype, folder=folder) for name in names}
        self._batches_key = stream_key(seed, "batches")
        self._torch_key = stream_key(seed, "torch")

    @abstractmethod
    def train(self, broadcast: Broadcast, clients: Sequence[int]) -> list[Reply]:
        """One round of each of these clients, from the model that they were sent; keeps what they keep."""

    def client_side(self, version: int) -> Client:
        """What every client does in the round that answers this version."""
        return Client(
            algorithm=self.algorithm,
            loss=self.loss,
            optimizer=lambda parameters: self.local.make(parameters, version),
            max_norm=self.local.max_norm,
            weight_decay=self.local.weight_decay,
            uplink=self.uplink,
        )

    def indices(self, client: int, version: int) -> Iterator[NDArray[np.int64]]:
        """Which samples a client's local steps are on in the round that answers this version."""
        return self.local.batches(self.data.parts[client], self._batches_key, version, client)

    def samples(self, client: int) -> Iterator[Batch]:
        """All of a client's data once, in order."""
        part = self.data.parts[client]
        size = self.local.batch_size if self.algorithm.takes_steps else max(1, len(part))
        return (self.data.batch(part[start : start + size]) for start in range(0, len(part), size))

    def state_dict(self) -> dict[str, Any]:
        """What the clients keep."""
        return {name: table.state_dict() for name, table in self.kept.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        for name, table in self.kept.items():
            table.load_state_dict(state[name])

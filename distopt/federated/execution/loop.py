"""The clients of a round one after the other, on one model object: any model, any loss, any optimizer."""

from collections.abc import Sequence

import torch

from distopt.federated.client import Client
from distopt.federated.execution.trainer import Trainer
from distopt.federated.messages import Broadcast, Reply
from distopt.federated.randomness import stream


class LoopTrainer(Trainer):
    """See the module."""

    mode = "loop"

    def train(self, broadcast: Broadcast, clients: Sequence[int]) -> list[Reply]:
        """See `Trainer.train`."""
        how = self.client_side(broadcast.version)
        self.model.train()
        with torch.random.fork_rng(devices=[]):
            return [self._train_one(how, broadcast, client) for client in clients]

    def _train_one(self, how: Client, broadcast: Broadcast, client: int) -> Reply:
        seed = int(stream(self._torch_key, broadcast.version, client).integers(2**63))
        torch.manual_seed(seed)  # of dropout
        kept, reply = how.step(
            self.model,
            self.layout,
            {name: table.get(client) for name, table in self.kept.items()},
            broadcast,
            map(self.data.batch, self.indices(client, broadcast.version)),
            client=client,
            num_samples=self.data.num_samples(client),
            samples=lambda: self.samples(client),
        )
        for name, vector in kept.items():
            self.kept[name].set(client, vector)
        return reply

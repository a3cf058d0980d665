"""One client's side of a job, with no more data than its own, computed as the simulator computes that client."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from distopt.errors import ConfigError
from distopt.federated import Broadcast, ClientData, Layout, Reply
from distopt.federated.execution import LoopTrainer
from distopt.federated.execution.rehearsal import rehearse
from distopt.federated.functional import Loss
from distopt.federated.network.facts import facts_of
from distopt.integrations.flower.job import Job


class LocalSide:
    """A client between two messages: made for each, as nothing of it needs to outlive one.

    Args:
        job: Of all clients.
        client: Its number.
        model: Whose averaged part is overwritten.
        data: Its own samples: inputs, labels, whatever the loss takes, (num_samples, ...) each.
        loss: `loss(model, batch)`, the mean over a batch.

    Raises:
        ConfigError: The data are no tensors of one length, or the model and the job do not go together.
    """

    def __init__(self, job: Job, client: int, model: nn.Module, data: Sequence[Tensor], loss: Loss) -> None:
        if not isinstance(data, tuple | list) or not all(isinstance(tensor, Tensor) for tensor in data) or not data:
            raise ConfigError(
                f"a client's data must be a tuple of tensors, got {type(data).__name__}; return (inputs, labels), say"
            )
        own = np.arange(len(data[0]))
        others = [own[:0]] * client  # the simulator's place for clients whose data are elsewhere
        self.client = client
        self.model = model
        self.layout = Layout(model, job.exclude)
        self._trainer = LoopTrainer(
            model=model,
            layout=self.layout,
            algorithm=job.algorithm,
            local=job.local,
            data=ClientData(tuple(data), [*others, own]),
            loss=loss,
            seed=job.seed,
            uplink=job.uplink,
        )

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the vectors (d,) that it keeps from round to round."""
        return tuple(self._trainer.kept)

    @property
    def facts(self) -> dict[str, Any]:
        """How it is set up, for the server to compare."""
        return facts_of(model=self.model, layout=self.layout, settings={}, data=None, num_clients=None)

    def rehearse(self) -> None:
        """Raises `ConfigError` if its first round would fail: the loss, the optimizer, batches of one sample."""
        rehearse(self._trainer)

    def train(self, broadcast: Broadcast, kept: Mapping[str, Tensor]) -> tuple[Reply, dict[str, Tensor]]:
        """One round: its reply, and what it keeps then.

        Args:
            broadcast: Of the server.
            kept: From its last round, vectors (d,), and the model's own buffers by name; what is missing is as at
                the start.
        """
        buffers = self._own_buffers()
        for name, tensor in kept.items():
            if name in self._trainer.kept:
                self._trainer.kept[name].set(self.client, tensor)
            elif name in buffers:
                buffers[name].copy_(tensor)
        (reply,) = self._trainer.train(broadcast, [self.client])
        vectors = {name: table.get(self.client) for name, table in self._trainer.kept.items()}
        return reply, vectors | {name: tensor.clone() for name, tensor in self._own_buffers().items()}

    def _own_buffers(self) -> dict[str, Tensor]:
        """BatchNorm's counter, and what else is not averaged and changes without being trained."""
        names = {name for name, _ in self.model.named_buffers()}
        return {name: tensor for name, tensor in self.layout.others(self.model).items() if name in names}

"""A site of several ranks, which train each batch of a client together: its leader alone speaks with the server.

Every rank takes a share of each batch, gradients are summed with one all-reduce per gradient, and all ranks take the
same step from equal bits, as in data-parallel training. What clients keep is the leader's to say. The result is that of
a site of one rank up to rounding.

Limits: gloo, on the CPU. BatchNorm would have statistics of shares of a batch, so it is refused; dropout draws other
masks than one rank would. When a rank dies, so does its site.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from distopt.comm import all_reduce_sum, broadcast_from_first, end_quietly
from distopt.errors import CompatibilityError
from distopt.federated.client import Client
from distopt.federated.execution import LoopTrainer
from distopt.federated.functional import Batch
from distopt.federated.messages import Broadcast, Reply
from distopt.federated.network import letters
from distopt.federated.network.letters import SERVER, Letter, Task, Welcome


@dataclass(frozen=True, kw_only=True)
class SharingClient(Client):
    """A client whose batches are shared out.

    Attributes:
        group: The ranks.
    """

    group: dist.ProcessGroup

    def loss_gradients(self, model: nn.Module, parameters: list[nn.Parameter], batch: Batch) -> tuple[Tensor, ...]:
        """See `Client.loss_gradients`. Collective."""
        share = tuple(part.tensor_split(self.group.size())[self.group.rank()] for part in batch)
        total = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype)
        if len(share[0]):
            own = super().loss_gradients(model, parameters, share)
            torch.cat([g.reshape(-1) for g in own], out=total)
            total.mul_(len(share[0]) / len(batch[0]))
        all_reduce_sum(total, self.group).wait()
        parts = total.split([p.numel() for p in parameters])
        return tuple(part.view(p.shape) for part, p in zip(parts, parameters, strict=True))

    def clipped_gradients(
        self, model: nn.Module, parameters: list[nn.Parameter], batch: Batch, bound: float, previous: Tensor | None
    ) -> Tensor:
        """See `Client.clipped_gradients`. Collective."""
        share = tuple(part.tensor_split(self.group.size())[self.group.rank()] for part in batch)
        total = super().clipped_gradients(model, parameters, share, bound, previous)
        all_reduce_sum(total, self.group).wait()
        return total


class GroupTrainer(LoopTrainer):
    """The clients of a site of several ranks; on its leader.

    Args:
        group: The ranks.
        settings: Of `Trainer`.

    Raises:
        CompatibilityError: The model has BatchNorm layers.
    """

    def __init__(self, group: dist.ProcessGroup, **settings: Any) -> None:
        super().__init__(**settings)
        self._group = group
        end_quietly()
        for name, layer in self.model.named_modules():
            if isinstance(layer, _NormBase) and layer.running_mean is not None:
                raise CompatibilityError(
                    f"a site of several ranks needs a model without BatchNorm, got {name!r}, whose statistics would be "
                    "of a share of each batch; use GroupNorm, or ranks_per_site=1"
                )

    def client_side(self, version: int) -> Client:
        """See `Trainer.client_side`."""
        made = super().client_side(version)
        settings = {field.name: getattr(made, field.name) for field in fields(Client)}
        return SharingClient(**settings, group=self._group)

    def train(self, broadcast: Broadcast, clients: Sequence[int]) -> list[Reply]:
        """See `Trainer.train`. The other ranks are in `follow`."""
        task = Task(sender=SERVER, saved=0, overrules=False, clients=list(clients), broadcast=broadcast)
        _say(task, self._group)
        return self.train_together(broadcast, clients)

    def train_together(self, broadcast: Broadcast, clients: Sequence[int]) -> list[Reply]:
        """The same on every rank."""
        for table in self.kept.values():
            for client in clients:
                vector = table.get(client)
                broadcast_from_first(vector, self._group)
                table.set(client, vector)
        return super().train(broadcast, clients)


def follow(group: dist.ProcessGroup, build: Callable[[Mapping[str, Any]], LoopTrainer]) -> None:
    """What the ranks of a site do that do not lead it, until the leader says that it is over.

    Args:
        group: The ranks.
        build: Makes the trainer of the job's settings.
    """
    trainer: LoopTrainer | None = None
    while (letter := _heard(group)) is not None:
        match letter:
            case Welcome(settings=settings):
                trainer = build(settings)
            case Task(broadcast=broadcast, clients=clients):
                assert isinstance(trainer, GroupTrainer)
                trainer.train_together(broadcast, clients)


def say_settings(settings: dict[str, Any], group: dist.ProcessGroup) -> None:
    """The leader tells the other ranks what job it is."""
    _say(Welcome(sender=SERVER, version=0, settings=settings), group)


def say_end(group: dist.ProcessGroup) -> None:
    """The leader tells the other ranks that it is over."""
    broadcast_from_first(torch.zeros(1, dtype=torch.int64), group)


def _say(letter: Letter, group: dist.ProcessGroup) -> None:
    frame = letters.encode(letter)
    broadcast_from_first(torch.tensor([frame.numel()]), group)
    broadcast_from_first(frame, group)


def _heard(group: dist.ProcessGroup) -> Letter | None:
    length = torch.zeros(1, dtype=torch.int64)
    broadcast_from_first(length, group)
    if not length.item():
        return None
    frame = torch.empty(int(length.item()), dtype=torch.uint8)
    broadcast_from_first(frame, group)
    return letters.decode(frame)

"""The clients of a round all at once: their vectors are the rows of one tensor, and `torch.func.vmap` batches the rest.

Clients that take more steps come first, so that those at work are always the first rows; those that are done keep what
they have. A step's batches of one size are computed together, and those of a size that few have one by one, so that no
sample is made up. Clients are taken in groups: memory, beside the replies, is a few vectors and the activations of one
batch for each client of a group, which are as many as have `GROUP_BYTES` of one vector each, at least
`FEWEST_TOGETHER`; and so many of a model with convolutions, whose activations are what wants to be near.

Limits: those that `fitness` finds. Sums are rounded otherwise than one client after the other.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distopt.errors import ConfigError
from distopt.federated.algorithm import LocalRound, Vectors
from distopt.federated.client import Client, nothing
from distopt.federated.execution.counters import uncounted
from distopt.federated.execution.fitness import judge
from distopt.federated.execution.stacked_loss import StackedLoss
from distopt.federated.execution.stacked_optimizer import StackedOptimizer
from distopt.federated.execution.trainer import Trainer
from distopt.federated.functional import squared_gradients
from distopt.federated.layout import Layout
from distopt.federated.messages import REST, Broadcast, Reply
from distopt.ops import all_finite

GROUP_BYTES = 4 << 20  # they, their gradients and the optimizer's vectors are then near a processor's cache
FEWEST_TOGETHER = 4
ONE_BY_ONE = 2  # up to so many clients with batches of one size are faster without vmap

Indices = NDArray[np.int64]


class VmappedTrainer(Trainer):
    """See the module.

    Args:
        settings: Of `Trainer`.

    Raises:
        ConfigError: The job cannot be computed like this, see `fitness`.
    """

    mode = "vmapped"

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if reason := judge(self).impossible:
            raise ConfigError(f"mode must be one that this job allows, got 'vmapped': {reason}; use 'loop' or 'auto'")
        self._loss = StackedLoss(self.model, self.layout, self.loss)
        self._group_size = _group_size(self.model, self.layout)

    def train(self, broadcast: Broadcast, clients: Sequence[int]) -> list[Reply]:
        """See `Trainer.train`."""
        self.model.train()
        self._loss.begin_round()
        how = self.client_side(broadcast.version)
        work = {client: list(self.indices(client, broadcast.version)) for client in clients}
        busy = sorted((client for client in clients if work[client]), key=lambda client: -len(work[client]))
        replies = {client: self._idle(how, broadcast, client) for client in clients if not work[client]}
        with uncounted(self.model, lambda: self._loss.num_batches):
            for first in range(0, len(busy), self._group_size):
                group = busy[first : first + self._group_size]
                replies |= self._train_group(how, broadcast, group, [work[client] for client in group])
        return [replies[client] for client in clients]

    def _idle(self, how: Client, broadcast: Broadcast, client: int) -> Reply:
        head, rest = self._split(broadcast.model)
        sent = nothing(self.algorithm, head)
        if rest.numel():
            sent = {**sent, REST: rest.clone()}
        reply = Reply(client=client, version=broadcast.version, num_samples=0, num_steps=0, tensors=sent)
        return how.answer(reply, {}, {}, finite=True)[1]

    def _split(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        return vectors[..., : self.layout.num_trained], vectors[..., self.layout.num_trained :]

    def _train_group(
        self, how: Client, broadcast: Broadcast, clients: list[int], work: list[list[Indices]]
    ) -> dict[int, Reply]:
        start, rest_at_start = self._split(broadcast.model)
        trained, rest = start.repeat(len(clients), 1), rest_at_start.repeat(len(clients), 1)
        kept = {name: table.get_many(clients) for name, table in self.kept.items()}
        optimizer = StackedOptimizer(self.local, trained, broadcast.version)
        lr = optimizer.lr
        for batches in _steps(work):
            self._step(optimizer, start, trained, rest, kept, broadcast.extras, batches)
        counts = [len(batches) for batches in work]
        local = LocalRound(
            moved=trained - start,
            num_steps=counts[0] if counts[0] == counts[-1] else trained.new_tensor(counts)[:, None],
            lr=lr,
            kept=kept,
            extras=broadcast.extras,
            squared_gradients=lambda: self._squared_gradients(clients, trained, rest),
        )
        keeps, sent = self.algorithm.finish(local)
        if rest.numel():
            sent = {**sent, REST: rest}
        finite = _finite_rows([trained, *keeps.values(), *sent.values()])
        replies = {}
        for i, client in enumerate(clients):
            reply = Reply(
                client=client,
                version=broadcast.version,
                num_samples=self.data.num_samples(client),
                num_steps=counts[i],
                tensors=_row(sent, i),
            )
            kept_here, replies[client] = how.answer(reply, _row(kept, i), _row(keeps, i), finite=finite[i])
            for name, vector in kept_here.items():
                self.kept[name].set(client, vector)
        return replies

    def _step(
        self,
        optimizer: StackedOptimizer,
        start: Tensor,
        trained: Tensor,
        rest: Tensor,
        kept: Vectors,
        extras: Vectors,
        batches: list[Indices],
    ) -> None:
        """One local step of the first `len(batches)` clients."""
        count = len(batches)
        here, rest = trained[:count], rest[:count]
        by_size = [(rows, self.data.batch(np.stack([batches[i] for i in rows]))) for rows in _by_size(batches)]

        def gradient(displacement: Tensor | None) -> Tensor:
            points = here if displacement is None else here + displacement
            found = loss_gradient(points)
            return found.add(points, alpha=self.local.weight_decay) if self.local.weight_decay else found

        def loss_gradient(points: Tensor) -> Tensor:
            if len(by_size) == 1 and count > ONE_BY_ONE:
                return self._loss.gradient(points, rest, by_size[0][1])
            found = torch.empty_like(here)
            for rows, batch in by_size:
                if len(rows) > ONE_BY_ONE:
                    own = rest[rows]
                    found[rows] = self._loss.gradient(points[rows], own, batch)
                    rest[rows] = own
                else:
                    for i, *one in zip(rows, *batch, strict=True):
                        found[i] = self._loss.gradient_of_one(points[i], rest[i], tuple(one))
            return found

        if self.algorithm.corrects:
            kept = {name: rows[:count] for name, rows in kept.items()}
            direction = self.algorithm.direction(gradient, here - start, kept, extras)
        else:
            direction = gradient(None)
        if (bound := self.local.max_norm) is not None:
            direction = direction * (bound / direction.norm(dim=-1, keepdim=True).clamp_min(bound))
        optimizer.step(direction)

    def _squared_gradients(self, clients: list[int], trained: Tensor, rest: Tensor) -> Tensor:
        parameters = self.layout.trained(self.model)
        found = []
        for client, here in zip(clients, torch.cat([trained, rest], dim=1), strict=True):
            self.layout.write(self.model, here)
            found.append(squared_gradients(self.model, parameters, self.loss, self.samples(client)))
        return torch.stack(found)


def _group_size(model: nn.Module, layout: Layout) -> int:
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return FEWEST_TOGETHER
    return max(FEWEST_TOGETHER, GROUP_BYTES // layout.trained_bytes)


def _steps(work: list[list[Indices]]) -> Iterator[list[Indices]]:
    """The batches of each step, of the clients that take it; they have more steps first."""
    for number in range(len(work[0])):
        yield [batches[number] for batches in work if number < len(batches)]


def _by_size(batches: list[Indices]) -> list[list[int]]:
    """Which batches have one size, for each size."""
    found: dict[int, list[int]] = {}
    for i, batch in enumerate(batches):
        found.setdefault(len(batch), []).append(i)
    return list(found.values())


def _row(tensors: Vectors, i: int) -> Vectors:
    return {name: tensor[i] for name, tensor in tensors.items()}


def _finite_rows(tensors: list[Tensor]) -> list[bool]:
    """Whether everything in a row is finite, for each row."""
    tensors = [tensor.contiguous() for tensor in tensors]
    if all(all_finite(tensor.view(-1)) for tensor in tensors):
        return [True] * len(tensors[0])
    return [all(all_finite(tensor[i]) for tensor in tensors) for i in range(len(tensors[0]))]

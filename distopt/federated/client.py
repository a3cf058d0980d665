"""The client's side of a round, around any algorithm: local steps of any torch optimizer from the server's model.

The optimizer is made anew for each round, so its momentum does not outlive it: the next model is another one. What an
algorithm keeps from round to round are its `kept` vectors, and they are the client's alone.

Limits: one model object at a time; its excluded tensors (`Layout`) and integer buffers keep what they have.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distopt.federated.algorithm import FederatedAlgorithm, LocalRound
from distopt.federated.layout import Layout
from distopt.federated.messages import DELTA, Broadcast, Reply
from distopt.ops import all_finite

Batch = tuple[Tensor, ...]
Loss = Callable[[nn.Module, Batch], Tensor]
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class Client:
    """How every client of a job computes.

    Attributes:
        algorithm: The rule.
        loss: Mean loss of a batch.
        optimizer: Makes the local optimizer, whose first group's "lr" the algorithm is told.
        max_norm: Upper bound of the norm of the gradient and its correction together; None for none.
    """

    algorithm: FederatedAlgorithm
    loss: Loss
    optimizer: MakeOptimizer
    max_norm: float | None = None

    def step(
        self,
        model: nn.Module,
        layout: Layout,
        kept: Mapping[str, Tensor],
        broadcast: Broadcast,
        batches: Iterable[Batch],
        *,
        client: int,
        num_samples: int,
    ) -> tuple[Mapping[str, Tensor], Reply]:
        """One round: what the client keeps, and its reply.

        Args:
            model: Whose averaged part is overwritten; trained by its mode.
            layout: Of the model.
            kept: From its last round; what is missing is zeros.
            broadcast: Of the server.
            batches: One for each local step.
            client: Its number.
            num_samples: How many samples it has trained on.
        """
        layout.write(model, broadcast.model)
        start = broadcast.model[: layout.num_trained]
        kept = {name: kept.get(name, torch.zeros_like(start)) for name in self.algorithm.kept}
        parameters = layout.trained(model)
        optimizer = self.optimizer(parameters)
        rates: list[float] = []
        for batch in batches:
            self._local_step(model, parameters, start, kept, broadcast.extras, batch)
            rates.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
        delta = layout.read(model) - broadcast.model
        local = LocalRound(
            moved=delta[: layout.num_trained],
            num_steps=len(rates),
            lr=sum(rates) / len(rates) if rates else 0.0,
            kept=kept,
            extras=broadcast.extras,
        )
        keeps, sent = self.algorithm.finish(local) if rates else (kept, self._nothing(local))
        # The server refuses what is not finite; keeping it would spoil all later rounds of this client too.
        if all(all_finite(tensor) for tensor in (delta, *keeps.values(), *sent.values())):
            kept = keeps
        whole = torch.cat([sent[DELTA], delta[layout.num_trained :]])
        reply = Reply(
            client=client,
            version=broadcast.version,
            num_samples=num_samples if rates else 0,
            num_steps=len(rates),
            tensors={**sent, DELTA: whole},
        )
        return kept, reply

    def _local_step(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        start: Tensor,
        kept: Mapping[str, Tensor],
        extras: Mapping[str, Tensor],
        batch: Batch,
    ) -> None:
        here = _flat(parameters)

        def gradient(displacement: Tensor | None) -> Tensor:
            if displacement is not None:
                _set(parameters, here + displacement)
            gradients = torch.autograd.grad(self.loss(model, batch), parameters, allow_unused=True)
            if displacement is not None:
                _set(parameters, here)
            return torch.cat(
                [
                    torch.zeros_like(p).reshape(-1) if g is None else g.reshape(-1)
                    for p, g in zip(parameters, gradients, strict=True)
                ]
            )

        direction = self.algorithm.direction(gradient, here - start, kept, extras)
        if self.max_norm is not None:
            direction = direction * (self.max_norm / direction.norm().clamp_min(self.max_norm))
        parts = direction.split([p.numel() for p in parameters])
        for p, part in zip(parameters, parts, strict=True):
            p.grad = part.view(p.shape)

    def _nothing(self, local: LocalRound) -> Mapping[str, Tensor]:
        return {DELTA: local.moved, **{name: torch.zeros_like(local.moved) for name in self.algorithm.sends}}


def _flat(parameters: list[nn.Parameter]) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in parameters])


@torch.no_grad()
def _set(parameters: list[nn.Parameter], vector: Tensor) -> None:
    for p, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
        p.copy_(part.view(p.shape))

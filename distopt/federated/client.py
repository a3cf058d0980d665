"""The client's side of a round, around any algorithm: local steps of any torch optimizer from the server's model.

An algorithm whose clients take no steps looks at each sample's gradient instead, and keeps nothing.

The optimizer is made anew for each round, so its momentum does not outlive it: the next model is another one. What an
algorithm keeps from round to round are its `kept` vectors, and they are the client's alone.

Limits: one model object at a time; its excluded tensors (`Layout`) and integer buffers keep what they have.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distopt.errors import ConfigError
from distopt.federated.algorithm import FederatedAlgorithm, LocalRound, Look
from distopt.federated.functional import Batch, Loss, scalar, squared_gradients
from distopt.federated.layout import Layout
from distopt.federated.messages import DELTA, REST, Broadcast, Reply
from distopt.federated.privacy.per_sample import clipped_sum
from distopt.federated.uplink import UplinkCompression
from distopt.ops import all_finite

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class Client:
    """How every client of a job computes.

    Attributes:
        algorithm: The rule.
        loss: Mean loss of a batch.
        optimizer: Makes the local optimizer, whose first group's "lr" the algorithm is told.
        max_norm: Upper bound of the norm of the gradient and its correction together; None for none.
        weight_decay: Of the objective: every gradient gets this times the parameters it is taken at, before the
            algorithm's correction.
        uplink: How its vectors travel; None sends them as they are.
    """

    algorithm: FederatedAlgorithm
    loss: Loss
    optimizer: MakeOptimizer
    max_norm: float | None = None
    weight_decay: float = 0.0
    uplink: UplinkCompression | None = None

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the vectors (d,) that each client keeps."""
        return kept_names(self.algorithm, self.uplink)

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
        samples: Callable[[], Iterable[Batch]] = tuple,
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
            samples: Gives its data once, in batches, for algorithms that look at it as a whole.
        """
        layout.write(model, broadcast.model)
        if not self.algorithm.takes_steps:
            return {}, self._looked(model, layout, broadcast, client, num_samples, samples)
        start = broadcast.model[: layout.num_trained]
        kept = {name: kept.get(name, torch.zeros_like(start)) for name in self.kept}
        parameters = layout.trained(model)
        optimizer = self.optimizer(parameters)
        rates: list[float] = []
        for batch in batches:
            self._local_step(model, parameters, start, kept, broadcast.extras, batch)
            rates.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
        here = layout.read(model)
        moved, rest = here[: layout.num_trained] - start, here[layout.num_trained :]
        local = LocalRound(
            moved=moved,
            num_steps=len(rates),
            lr=sum(rates) / len(rates) if rates else 0.0,
            kept=kept,
            extras=broadcast.extras,
            squared_gradients=lambda: squared_gradients(model, parameters, self.loss, samples()),
        )
        keeps, sent = self.algorithm.finish(local) if rates else (kept, nothing(self.algorithm, moved))
        reply = Reply(
            client=client,
            version=broadcast.version,
            num_samples=num_samples if rates else 0,
            num_steps=len(rates),
            tensors={**sent, REST: rest} if rest.numel() else sent,
        )
        finite = all(all_finite(tensor) for tensor in (here, *keeps.values(), *sent.values()))
        return self.answer(reply, kept, keeps, finite=finite)

    def answer(
        self, reply: Reply, kept: Mapping[str, Tensor], keeps: Mapping[str, Tensor], *, finite: bool
    ) -> tuple[Mapping[str, Tensor], Reply]:
        """What a client keeps after its last step, and its reply as it leaves.

        Args:
            reply: As the algorithm makes it.
            kept: From its last round.
            keeps: What the algorithm says that it keeps now.
            finite: Whether its model, `keeps` and the reply are.
        """
        # The server refuses what is not finite; keeping it would spoil all later rounds of this client too.
        if finite:
            kept = {**kept, **keeps}
        if self.uplink is not None:
            reply, kept = self.uplink.compress(self.algorithm, reply, kept)
        return kept, reply

    def _looked(
        self,
        model: nn.Module,
        layout: Layout,
        broadcast: Broadcast,
        client: int,
        num_samples: int,
        samples: Callable[[], Iterable[Batch]],
    ) -> Reply:
        parameters = layout.trained(model)
        head, rest = broadcast.model[: layout.num_trained], broadcast.model[layout.num_trained :]

        def summed(bound: float, previous: Tensor | None) -> Tensor:
            total, count = torch.zeros(len(head), dtype=torch.float64, device=head.device), 0
            for batch in samples():
                total += self.clipped_gradients(model, parameters, batch, bound, previous)
                count += len(batch[0])
            if count != num_samples:
                raise ConfigError(
                    f"samples must give all {num_samples} samples of client {client} once, got {count}; give "
                    "Client.step the client's `samples`"
                )
            return total

        sent: Mapping[str, Tensor] = nothing(self.algorithm, head)
        if num_samples:
            look = Look(
                client=client,
                version=broadcast.version,
                num_samples=num_samples,
                model=head,
                extras=broadcast.extras,
                clipped_sum=summed,
            )
            sent = self.algorithm.look(look)
        return Reply(
            client=client,
            version=broadcast.version,
            num_samples=num_samples,
            num_steps=1 if num_samples else 0,
            tensors={**sent, REST: rest} if rest.numel() else sent,
        )

    def clipped_gradients(
        self, model: nn.Module, parameters: list[nn.Parameter], batch: Batch, bound: float, previous: Tensor | None
    ) -> Tensor:
        """(d,) float64, the sum over a batch's samples of each one's clipped gradient, see `per_sample.clipped_sum`."""
        return clipped_sum(model, parameters, self.loss, batch, bound, previous=previous)

    def _local_step(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        start: Tensor,
        kept: Mapping[str, Tensor],
        extras: Mapping[str, Tensor],
        batch: Batch,
    ) -> None:
        if not self.algorithm.corrects and self.max_norm is None:
            for p, g in zip(parameters, self._gradients(model, parameters, batch), strict=True):
                p.grad = g
            return
        here = _flat(parameters)

        def gradient(displacement: Tensor | None) -> Tensor:
            if displacement is not None:
                _set(parameters, here + displacement)
            gradients = self._gradients(model, parameters, batch)
            if displacement is not None:
                _set(parameters, here)
            return torch.cat([g.reshape(-1) for g in gradients])

        direction = self.algorithm.direction(gradient, here - start, kept, extras)
        if self.max_norm is not None:
            direction = direction * (self.max_norm / direction.norm().clamp_min(self.max_norm))
        parts = direction.split([p.numel() for p in parameters])
        for p, part in zip(parameters, parts, strict=True):
            p.grad = part.view(p.shape)

    def _gradients(self, model: nn.Module, parameters: list[nn.Parameter], batch: Batch) -> tuple[Tensor, ...]:
        """Of the objective, at the parameters as they are."""
        gradients = self.loss_gradients(model, parameters, batch)
        if not self.weight_decay:
            return gradients
        pairs = zip(gradients, parameters, strict=True)
        return tuple(g.add(p.detach(), alpha=self.weight_decay) for g, p in pairs)

    def loss_gradients(self, model: nn.Module, parameters: list[nn.Parameter], batch: Batch) -> tuple[Tensor, ...]:
        """Of the mean loss of a batch, at the parameters as they are."""
        loss = scalar(self.loss(model, batch))
        return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


def kept_names(algorithm: FederatedAlgorithm, uplink: UplinkCompression | None) -> tuple[str, ...]:
    """Of the vectors (d,) that each client keeps."""
    return (*algorithm.kept, *(() if uplink is None else uplink.kept(algorithm)))


def nothing(algorithm: FederatedAlgorithm, like: Tensor) -> Mapping[str, Tensor]:
    """What a client sends that has taken no step."""
    return {name: torch.zeros_like(like) for name in (DELTA, *algorithm.sends)}


def _flat(parameters: list[nn.Parameter]) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in parameters])


@torch.no_grad()
def _set(parameters: list[nn.Parameter], vector: Tensor) -> None:
    for p, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
        p.copy_(part.view(p.shape))

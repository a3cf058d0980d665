"""Gradients of many clients at once, each at its own point and on its own batch.

Memory is that of the clients' activations in one batch each, of the parameters and of their gradients.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from distopt.federated.execution.folded_layers import FoldedLayers
from distopt.federated.execution.recorded import Recorded
from distopt.federated.functional import Batch, Loss, LossModule
from distopt.federated.layout import Layout

Computed = tuple[Tensor, Tensor, list[Tensor]]


class StackedLoss:
    """A user's loss, of many clients at once.

    Args:
        model: Trained by its mode; what is not averaged of it is shared by all.
        layout: Of the model.
        loss: Mean loss of a batch.

    Attributes:
        num_batches: How many it has seen.
    """

    def __init__(self, model: nn.Module, layout: Layout, loss: Loss) -> None:
        self.num_batches = 0
        self._recorded = Recorded(self._of_many, self._first_loss)
        self._whole = LossModule(model, loss)
        self._shapes = layout.shapes
        self._names = [LossModule.PREFIX + name for name in layout.names]
        self._trained = self._names[: len(layout.trained_names)]
        self._buffers = self._names[len(layout.trained_names) :]

    def gradient(self, trained: Tensor, rest: Tensor, batch: Batch) -> Tensor:
        """(num_clients, d), of each client's mean loss.

        Args:
            trained: (num_clients, d).
            rest: (num_clients, r), the elements behind; the model's updates of them are made in place.
            batch: (num_clients, batch_size, ...) each.
        """
        self.num_batches += len(trained)
        gradient, _, buffers = self._recorded(trained, rest, *batch)
        self._put(rest, buffers)
        return gradient

    def begin_round(self) -> None:
        """Whatever the loss reads besides model and batch may have changed."""
        self._recorded.doubt()

    def gradient_of_one(self, trained: Tensor, rest: Tensor, batch: Batch) -> Tensor:
        """The same of one client, without the first dimension, and without `vmap`."""
        self.num_batches += 1
        gradient, _, buffers = self._computed(self._loss, trained, rest, batch)
        self._put(rest, buffers)
        return gradient

    def _of_many(self, trained: Tensor, rest: Tensor, *batch: Tensor) -> Computed:
        with FoldedLayers():
            return self._computed(vmap(self._loss, randomness="error"), trained, rest, batch)

    def _first_loss(self, trained: Tensor, rest: Tensor, *batch: Tensor) -> Tensor:
        parts = [part.clone() for part in _parts(torch.cat([trained[0], rest[0]]), self._shapes)]
        count = len(self._trained)
        return self._loss(parts[:count], parts[count:], tuple(part[0] for part in batch))

    def _computed(self, loss: Callable[..., Tensor], trained: Tensor, rest: Tensor, batch: Batch) -> Computed:
        """The gradients, the losses, and the buffers afterwards."""
        count = len(self._trained)
        points = [part.detach().requires_grad_() for part in _parts(trained, self._shapes[:count])]
        buffers = [part.clone() for part in _parts(rest, self._shapes[count:])]
        losses = loss(points, buffers, batch)
        gradients = torch.autograd.grad(losses.sum(), points, allow_unused=True, materialize_grads=True)
        flat = torch.cat([gradient.reshape(*trained.shape[:-1], -1) for gradient in gradients], dim=-1)
        return flat, losses.detach(), buffers

    def _put(self, rest: Tensor, buffers: Sequence[Tensor]) -> None:
        for part, buffer in zip(_parts(rest, self._shapes[len(self._trained) :]), buffers, strict=True):
            part.copy_(buffer)

    def _loss(self, points: Sequence[Tensor], buffers: Sequence[Tensor], batch: Batch) -> Tensor:
        given = dict(zip(self._names, (*points, *buffers), strict=True))
        loss: Tensor = functional_call(self._whole, given, (batch,))
        for name, buffer in zip(self._buffers, buffers, strict=True):
            if given[name] is not buffer:  # the model has put another tensor there
                buffer.copy_(given[name])
        return loss


def _parts(vectors: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    if not shapes:
        return []
    parts = vectors.split([shape.numel() for shape in shapes], dim=-1)
    return [part.view((*vectors.shape[:-1], *shape)) for part, shape in zip(parts, shapes, strict=True)]

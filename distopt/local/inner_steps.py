"""The inner steps of simulated workers: one worker after the other, or all of them at once."""

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from distopt.errors import in_a_line

_log = logging.getLogger("distopt")
Batch = tuple[Tensor, ...]
Loss = Callable[[nn.Module, Batch], Tensor]
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], Any]

_SMALL = 100_000  # parameters of a worker up to which calls cost more than arithmetic
_ELEMENTWISE = tuple(
    getattr(torch.optim, name)
    for name in ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD")
)


class InnerSteps(Protocol):
    """Workers of one model.

    Attributes:
        parameters: Of each worker: the trained ones, to read and to write.
        buffers: Of each worker.
    """

    parameters: list[list[Tensor]]
    buffers: list[list[Tensor]]

    def step_(self, present: Sequence[int], batch: Batch) -> list[float]:
        """A step of the workers that are there, on their rows of the batch; their losses."""


class OneByOne:
    """A model and an optimizer, any, for each worker."""

    def __init__(
        self, model: nn.Module, num_workers: int, optimizer: MakeOptimizer, scheduler: MakeScheduler | None, loss: Loss
    ) -> None:
        self._models = [copy.deepcopy(model) for _ in range(num_workers)]
        trained = [[each for each in model.parameters() if each.requires_grad] for model in self._models]
        self.parameters: list[list[Tensor]] = [list(each) for each in trained]
        self.buffers: list[list[Tensor]] = [list(model.buffers()) for model in self._models]
        self._optimizers = [optimizer(each) for each in trained]
        self._schedulers = [] if scheduler is None else [scheduler(each) for each in self._optimizers]
        self._loss = loss

    def step_(self, present: Sequence[int], batch: Batch) -> list[float]:
        """See `InnerSteps`."""
        losses = []
        for worker in present:
            self._optimizers[worker].zero_grad()
            loss = self._loss(self._models[worker], tuple(each[worker] for each in batch))
            loss.backward()
            self._optimizers[worker].step()
            if self._schedulers:
                self._schedulers[worker].step()
            losses.append(float(loss.detach()))
        return losses


class AtOnce:
    """One optimizer of tensors (n, ...) with a worker's parameters in each row; gradients by `torch.func.vmap`."""

    def __init__(
        self, model: nn.Module, num_workers: int, optimizer: MakeOptimizer, scheduler: MakeScheduler | None, loss: Loss
    ) -> None:
        self._whole = _WithLoss(copy.deepcopy(model), loss)
        self._stacked = {
            name: nn.Parameter(each.detach().expand(num_workers, *each.shape).clone())
            for name, each in self._whole.named_parameters()
            if each.requires_grad
        }
        self.parameters = [[each.detach()[worker] for each in self._stacked.values()] for worker in range(num_workers)]
        self.buffers: list[list[Tensor]] = [[] for _ in range(num_workers)]
        self._optimizer = optimizer(list(self._stacked.values()))
        self._scheduler = None if scheduler is None else scheduler(self._optimizer)
        self._gradients = vmap(grad_and_value(self._loss_at), randomness="different")

    @classmethod
    def suits(cls, model: nn.Module, optimizer: MakeOptimizer, loss: Loss, batch: Batch) -> bool:
        """Whether that is the same up to rounding, and pays: for small models that vmap can compute."""
        parameters = [nn.Parameter(torch.zeros_like(each)) for each in model.parameters() if each.requires_grad]
        small = sum(each.numel() for each in parameters) <= _SMALL
        if not small or list(model.buffers()) or type(optimizer(parameters)) not in _ELEMENTWISE:
            return False
        try:
            cls(model, 1, optimizer, None, loss).step_([0], tuple(each[:1] for each in batch))
        except Exception as error:  # whatever a model does that vmap cannot
            _log.info("workers step one after the other: %s", in_a_line(error))
            return False
        return True

    def step_(self, present: Sequence[int], batch: Batch) -> list[float]:
        """See `InnerSteps`; all are there."""
        tensors = {name: each.detach() for name, each in self._stacked.items()}
        gradients, losses = self._gradients(tensors, batch)
        for name, each in self._stacked.items():
            each.grad = gradients[name]
        self._optimizer.step()
        if self._scheduler is not None:
            self._scheduler.step()
        return [float(each) for each in losses]

    def _loss_at(self, tensors: dict[str, Tensor], batch: Batch) -> Tensor:
        value: Tensor = functional_call(self._whole, tensors, (batch,))
        return value


class _WithLoss(nn.Module):
    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Batch) -> Tensor:
        return self._loss(self.model, batch)

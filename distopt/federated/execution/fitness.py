"""Whether all clients of a job can be computed at once, found out before its first round."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from distopt.errors import in_a_line
from distopt.federated.execution.counters import uncounted
from distopt.federated.execution.stacked_loss import StackedLoss
from distopt.federated.execution.stacked_optimizer import ELEMENTWISE, is_elementwise
from distopt.federated.execution.trainer import Trainer
from distopt.federated.functional import Batch

MOST_BYTES = 1 << 20  # of a client's vector; larger ones fill the caches by themselves
_LOOPS = "performance drop"  # what vmap's warning says
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}  # of a norm; 5e-2 in 16 bits


@dataclass(frozen=True, kw_only=True)
class Fitness:
    """Of a job, to have all clients of a round computed at once.

    Attributes:
        impossible: What keeps `VmappedTrainer` from computing what `LoopTrainer` does, in words; None for nothing.
        slower: Why it would be the slower of the two; None if it is not known to be.
    """

    impossible: str | None = None
    slower: str | None = None


def judge(trainer: Trainer) -> Fitness:
    """What this job is fit for.

    The optimizer must be known to treat each element by itself. The rest is tried out on two batches of the client with
    the most samples: vmap must be able to compute the loss, which rules out control flow that depends on the data;
    gradients and averaged buffers must be each client's own; nothing may be random; and the model may change nothing
    that is not averaged, but for BatchNorm's counter.

    Slower are models of more than `MOST_BYTES`, and those with an operation that vmap itself computes in a loop.
    """
    if reason := _why_not_by_name(trainer):
        return Fitness(impossible=reason)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        reason = _tried(trainer)
    slower = next((str(each.message) for each in warned if _LOOPS in str(each.message)), None)
    if slower is not None:
        slower = f"vmap computes {slower.partition('aten::')[2].partition('. ')[0]} in a loop"
    elif (size := trainer.layout.trained_bytes) > MOST_BYTES:
        slower = f"the trained parameters take {size} bytes, and above {MOST_BYTES} one client at a time is faster"
    return Fitness(impossible=reason, slower=slower)


def _why_not_by_name(trainer: Trainer) -> str | None:
    if not trainer.algorithm.takes_steps:
        return f"the clients of {trainer.algorithm.name!r} look at their samples one by one and take no steps together"
    if not is_elementwise(trainer.local.optimizer):
        known = ", ".join(optimizer.__name__ for optimizer in ELEMENTWISE)
        return f"the optimizer {trainer.local.optimizer!r} is not known to treat each element by itself, as {known} do"
    for name, layer in trainer.model.named_modules():
        if isinstance(layer, torch.nn.Embedding) and layer.padding_idx is not None:
            return f"{name!r} has a padding_idx, which vmap minds for the first client only"
        if isinstance(layer, _NormBase) and layer.running_mean is not None and layer.momentum is None:
            return f"{name!r} has momentum=None, so its running mean depends on how many batches the object has seen"
    return None


def _tried(trainer: Trainer) -> str | None:
    batch = _two_batches(trainer)
    if batch is None:
        return "no client has samples to try it on"
    own = trainer.layout.others(trainer.model)
    before = {name: tensor.clone() for name, tensor in own.items()}
    mode = trainer.model.training
    trainer.model.train()
    try:
        with torch.random.fork_rng(devices=[]), uncounted(trainer.model, lambda: 0):
            return _differs(trainer, batch, lambda: _changed(own, before))
    finally:
        trainer.model.train(mode)
        for name, tensor in own.items():
            tensor.copy_(before[name])


def _two_batches(trainer: Trainer) -> Batch | None:
    part = max(trainer.data.parts, key=len)
    size = min(trainer.local.batch_size, len(part))
    return trainer.data.batch(np.stack([part[:size], part[-size:]])) if size else None


def _changed(own: dict[str, Tensor], before: dict[str, Tensor]) -> str | None:
    for name, tensor in own.items():
        if not torch.equal(tensor, before[name]):
            return f"the model changes {name!r}, which is not averaged, so one client would see another's"
    return None


def _differs(trainer: Trainer, batch: Batch, changed: Callable[[], str | None]) -> str | None:
    model, layout = trainer.model, trainer.layout
    loss, start = StackedLoss(model, layout, trainer.loss), layout.read(model)
    noise = 0.01 * torch.randn(len(start), generator=torch.Generator().manual_seed(0)).to(start)
    noise[layout.num_trained :] = 0.0  # a variance must stay above 0
    vectors = torch.stack([start, start + noise])
    trained, rest = vectors.split([layout.num_trained, layout.num_elements - layout.num_trained], dim=1)
    rest_of_each, random_before = rest.clone(), torch.random.get_rng_state()
    try:
        of_each = [
            loss.gradient_of_one(trained[i], rest_of_each[i], tuple(part[i] for part in batch)) for i in range(2)
        ]
        really = _gradient_in_the_loop(trainer, tuple(part[0] for part in batch))
    except Exception as error:
        return f"the loss of a batch cannot be computed ({in_a_line(error)})"
    if not torch.equal(torch.random.get_rng_state(), random_before):
        return "the loss draws random numbers, as dropout does, and each client has its own"
    if reason := changed():
        return reason
    try:
        together = loss.gradient(trained, rest, batch)
    except Exception as error:
        return f"torch.func.vmap cannot compute the loss ({in_a_line(error)})"
    tolerance = _TOLERANCE.get(layout.dtype, 5e-2)
    if not (of_each[0] - really).norm() <= tolerance * really.norm():
        return "model or loss hold references to parameters, which do not see those of each client"
    for found, expected in zip((*together, *rest), (*of_each, *rest_of_each), strict=True):
        if not (found - expected).norm() <= tolerance * expected.norm():
            return "torch.func.vmap computes another gradient or buffer than one client alone has"
    return None


def _gradient_in_the_loop(trainer: Trainer, batch: Batch) -> Tensor:
    """(d,), what the model object itself gives at its own parameters."""
    model, parameters = copy.deepcopy(trainer.model), trainer.layout.trained(trainer.model)
    try:
        loss = trainer.loss(trainer.model, batch)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    finally:
        trainer.layout.write(trainer.model, trainer.layout.read(model))
    return torch.cat([gradient.reshape(-1) for gradient in gradients])

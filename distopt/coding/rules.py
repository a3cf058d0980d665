"""What a model and its loss must keep to for the parts' gradients to add up to the batch's, checked before the first.

- The loss of a part is the sum over its samples: halves must add up to the whole.
- A part's gradient is the same whoever computes it, and whenever: twice the same.
- No layer mixes the samples of a batch, or keeps statistics of those that this worker happens to see: BatchNorm, and
  whatever changes a buffer.

Limits: sums can be checked only where `attach` was given `batches`; what differs between workers, not within one, is
found by the master, which compares what they send (`distopt.coding.parity`).
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distopt.coding.computing import Computation, PartLoss
from distopt.coding.data_parts import DataPart
from distopt.coding.flat import FlatModel
from distopt.coding.scheme import Task
from distopt.errors import CompatibilityError

_SUM_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_REPEAT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_COARSE = 0.05  # for 16-bit parameters


def check(computation: Computation, task: Task, loss: PartLoss) -> None:
    """All of it, before the first gradient, by the first part of the task, whose job's parameters the model holds.

    Raises:
        CompatibilityError: A rule is broken; says what to change.
    """
    for flat in computation.models:
        check_batch_norm(flat.model)
    check_loss(computation, computation.part(task.job, task.row[0][0]), loss)


def check_batch_norm(model: nn.Module) -> None:
    """Raises `CompatibilityError` if a BatchNorm layer is in training mode."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise CompatibilityError(
                f"{name} is a {type(module).__name__} in training mode: it mixes the samples of a part, so parts do "
                "not add up to the batch, and its statistics would depend on the worker; use GroupNorm or LayerNorm, "
                f"or call model.{name}.eval() after model.train()"
            )


def check_loss(computation: Computation, part: DataPart, loss: PartLoss) -> None:
    """Checks the loss by one part: it is a sum, its gradient comes out the same twice, and it changes no buffer.

    The model holds the part's parameters; its gradients are cleared.

    Raises:
        CompatibilityError: It is not; says what to change.
    """
    flat = computation.models[part.model]
    buffers = flat.buffers()
    if part.samples is not None and len(part.samples) >= 2:
        _check_sum(computation, part, loss, max(_SUM_TOLERANCE.get(spec.dtype, _COARSE) for spec in flat.specs))
    vectors = []
    for _ in range(2):
        flat.clear_gradients()
        computation.backward(part, loss)
        vectors.append(flat.read_gradients()[0])
    flat.clear_gradients()
    _check_buffers(flat, buffers)
    tolerance = max(_REPEAT_TOLERANCE.get(spec.dtype, _COARSE) for spec in flat.specs)
    for first, second in zip(*vectors, strict=True):
        difference = (first.double() - second.double()).norm() / max(first.double().norm().item(), 1e-300)
        if difference > tolerance:
            raise CompatibilityError(
                f"the gradient of one part must be the same each time, but it differed by {difference:.2g} of its "
                "size: the loss depends on something other than the part, such as a data loader that moves on or a "
                "generator of its own; take the samples from part.samples, and random numbers from torch, numpy or "
                "random's own generators, which are seeded for each part"
            )


def _check_buffers(flat: FlatModel, before: Mapping[str, str]) -> None:
    changed = [name for name, digest in flat.buffers().items() if before.get(name) != digest]
    if changed:
        raise CompatibilityError(
            f"the loss must leave the model's buffers as they are, but it changed {', '.join(changed[:5])}: no message "
            "carries them, so they would depend on what this worker computes, and rank 0's would stay behind; call "
            "eval() on the layers that keep statistics, or give check_rules=False if nothing depends on them"
        )


def _check_sum(computation: Computation, part: DataPart, loss: PartLoss, tolerance: float) -> None:
    assert part.samples is not None
    half = len(part.samples) // 2
    pieces = (part.samples, part.samples[:half], part.samples[half:])
    model = computation.models[part.model].model
    with _evaluating(model), torch.no_grad():
        values = []
        for samples in pieces:
            piece = dataclasses.replace(part, samples=samples)
            with computation.seeded(piece):
                values.append(computation.loss_of(piece, loss)[0].double().item())
    whole, *halves = values
    if abs(whole - sum(halves)) > tolerance * max(abs(whole), sum(map(abs, halves))):
        raise CompatibilityError(
            f"the loss of a part must be the sum over its samples, but {len(part.samples)} samples have {whole:.6g} "
            f"and their two halves {halves[0]:.6g} and {halves[1]:.6g}; use reduction='sum' (the gradient is divided "
            "by the number of samples once, after decoding), or give check_rules=False if the loss is not a plain sum"
        )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in eval mode, so that dropout does not tell the halves from the whole."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

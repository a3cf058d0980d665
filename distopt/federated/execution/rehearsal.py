"""What would fail in the first round of a job, found out before it: the local optimizer, the loss, batches of one.

Everything is tried on a copy of the model, at most one forward pass and one step each.
"""

import copy
import logging

import numpy as np
import torch
from torch import Tensor

from distopt.errors import ConfigError, in_a_line
from distopt.federated.execution.trainer import Trainer
from distopt.federated.functional import scalar
from distopt.federated.privacy.per_sample import check_per_sample, clipped_sum

_log = logging.getLogger("distopt")


def rehearse(trainer: Trainer) -> None:
    """Raises `ConfigError` if the model, the optimizer, the loss or a batch of one sample would not do.

    Warns where the algorithm's equations assume another optimizer.
    """
    if trainer.algorithm.assumes_plain_sgd and not trainer.local.is_plain_sgd:
        _log.warning(
            "%s assumes that clients take steps of plain SGD, and they take those of %s with options %r; its weights "
            "or corrections are off by a factor then, use SGD without momentum", trainer.algorithm.name,
            trainer.local.optimizer, dict(trainer.local.options),
        )  # fmt: skip
    _check_finite(trainer)
    if trainer.algorithm.takes_steps:
        _check_optimizer(trainer)
    sizes = np.array([len(part) for part in trainer.data.parts])
    if not sizes.any():
        return  # nobody will train
    with torch.random.fork_rng(devices=[]):
        _check_loss(trainer, int(sizes.argmax()))
        if trainer.algorithm.takes_steps:
            _check_batches_of_one(trainer, sizes)
        else:
            _check_per_sample(trainer, int(sizes.argmax()))


def _check_finite(trainer: Trainer) -> None:
    for name, tensor in trainer.layout.split(trainer.layout.read(trainer.model)).items():
        if not tensor.isfinite().all():
            raise ConfigError(
                f"what is averaged must be finite, got {name!r} that is not; initialise it, or leave it out with "
                f"exclude=({name!r},)"
            )


def _check_optimizer(trainer: Trainer) -> None:
    parameters = [torch.nn.Parameter(p.detach().clone()) for p in trainer.layout.trained(trainer.model)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    try:
        trainer.local.make(parameters, 0).step()
    except Exception as error:  # whatever an optimizer raises
        raise ConfigError(
            f"the optimizer must take steps with its gradients alone, got {in_a_line(error)} from "
            f"{trainer.local.optimizer!r} with options {dict(trainer.local.options)!r}; change one of them"
        ) from error


def _check_loss(trainer: Trainer, client: int) -> None:
    indices = trainer.data.parts[client][: trainer.local.batch_size]
    try:
        loss = _loss(trainer, indices)
    except ConfigError:
        raise
    except Exception as error:  # whatever the user's code raises
        if len(indices) == 1:
            return  # `_check_batches_of_one` knows more
        raise ConfigError(
            f"loss(model, batch) must be computable, got {in_a_line(error)} with a batch of client {client}; check the "
            "model, the data and the loss, which is cross-entropy of (inputs, labels) where it is left out"
        ) from error
    if not loss.requires_grad:
        raise ConfigError("loss(model, batch) must depend on the trained parameters, got one that does not")


def _check_batches_of_one(trainer: Trainer, sizes: np.ndarray) -> None:
    local = trainer.local
    meets = {size: 1 in local.batch_sizes(size)[: local.num_steps(size)] for size in np.unique(sizes).tolist()}
    alone = np.flatnonzero([meets[size] for size in sizes.tolist()])
    if not len(alone):
        return
    try:
        _loss(trainer, trainer.data.parts[alone[0]][:1])
    except ValueError as error:
        raise ConfigError(
            f"batches must have more than one sample for this model ({error}), got a batch of one of {len(alone)} "
            f"clients, {alone[0]} first; use drop_last=True in LocalTraining and give each client at least 2 samples, "
            "or take another normalisation"
        ) from error


def _check_per_sample(trainer: Trainer, client: int) -> None:
    model, indices = copy.deepcopy(trainer.model).train(), trainer.data.parts[client][:2]
    check_per_sample(model)
    try:
        clipped_sum(model, trainer.layout.trained(model), trainer.loss, trainer.data.batch(indices), 1.0)
    except Exception as error:  # whatever the user's code raises under vmap
        raise ConfigError(
            f"torch.func.vmap must be able to compute loss(model, batch) for {trainer.algorithm.name!r}, which looks "
            f"at samples one by one, got {in_a_line(error)}; leave out what is random, and control flow that depends "
            "on the data"
        ) from error


def _loss(trainer: Trainer, indices: np.ndarray) -> Tensor:
    return scalar(trainer.loss(copy.deepcopy(trainer.model).train(), trainer.data.batch(indices)))

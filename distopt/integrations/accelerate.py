"""Hugging Face Accelerate: after `prepare()` one call puts an algorithm under the prepared model.

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    attached = distopt.integrations.accelerate.attach(accelerator, model, optimizer, {"algorithm": "dgc"})

`accelerator.save_state` and `load_state` then carry what each rank holds back: one file per rank in the folder
`distopt` of the checkpoint, which every rank must be able to read.

Limits: `DistributedDataParallel` only; `accelerator.clip_grad_norm_` clips what the optimizer gets, which with DGC is
the update with momentum in it, so use the algorithm's `clip`.
"""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distopt import checkpoint
from distopt.ddp import Attachment
from distopt.errors import CompatibilityError, StateMismatchError
from distopt.integrations.attached import Attached, algorithm_of
from distopt.job import Job, JobSource

try:
    importlib.import_module("accelerate")
except ModuleNotFoundError as error:
    raise CompatibilityError(
        f"distopt.integrations.accelerate needs Accelerate 1.10 or newer, which is not installed ({error}); "
        "pip install torch-distopt[accelerate]"
    ) from error

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

_FOLDER = "distopt"

_REMEDIES = {
    "NO": "start several processes: torchrun --nproc-per-node 2, or accelerate launch --num_processes 2",
    "DEEPSPEED": "use distopt.integrations.deepspeed",
    "FSDP": "leave the FSDP plugin out, so that the model is replicated, or use distopt.integrations.fsdp",
}


def attach(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, job: JobSource) -> Attached:
    """Attaches a job's algorithm to what `accelerator.prepare` returned. Collective.

    Gradient accumulation with `accelerator.accumulate`, mixed precision and the scaler of fp16 are Accelerate's as
    before. Call it before `accelerator.load_state`.

    Args:
        accelerator: That prepared them.
        model: As prepared.
        optimizer: As prepared.
        job: An algorithm, its mapping, or the path of a `distopt.toml`.

    Raises:
        ConfigError: The job cannot be read, or a value in it breaks its rule.
        CompatibilityError: The model, the optimizer or the way that Accelerate distributes cannot be combined with it.
        DesyncError: The ranks have different versions, configurations or models; names both.
    """
    described = Job.load(job)
    algorithm = algorithm_of(
        described,
        host="Accelerate",
        keeps_checkpoints='call accelerator.save_state("{0.folder}") every {0.every} steps, with '
        "ProjectConfiguration(total_limit={0.keep}) for automatic names",
    )
    ddp = _prepared_model(accelerator, model)
    inner = _prepared_optimizer(accelerator, optimizer)
    if accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        raise CompatibilityError(
            "gradients must be synchronised once per step, got sync_each_batch=True in Accelerate's "
            "GradientAccumulationPlugin, which sends every part of them; leave it out"
        )
    attached = Attached(algorithm, ddp, inner, scaler=accelerator.scaler, log=described.log)
    carried = _Carried(attached.attachment)
    accelerator.register_for_checkpointing(carried)
    handles = [
        accelerator.register_save_state_pre_hook(carried.save),
        accelerator.register_load_state_pre_hook(carried.load),
    ]
    for handle in handles:
        attached.at_end(handle.remove)
    attached.at_end(lambda: accelerator._custom_objects.remove(carried))  # Accelerate has no call for it
    return attached


class _Carried:
    """Has `save_state` and `load_state` carry an attachment.

    The hooks know the folder, and run on every rank. What is registered as an object to save makes Accelerate itself
    refuse a checkpoint with the state of an attachment where none is attached.
    """

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment

    def save(self, models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        checkpoint.save(self._attachment, Path(folder) / _FOLDER)

    def load(self, models: list[nn.Module], folder: str) -> None:
        problem = None
        if not (Path(folder) / _FOLDER).is_dir():
            problem = StateMismatchError(
                f"a checkpoint must hold the state of what is attached, got no folder {_FOLDER!r} in {folder}; load "
                "a checkpoint that was made without it before attach"
            )
        self._attachment.raise_together(problem)
        checkpoint.load(self._attachment, Path(folder) / _FOLDER)

    def state_dict(self) -> dict[str, Any]:
        return {"algorithm": self._attachment.algorithm.name, "folder": _FOLDER}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing is left to do: the hook comes before this."""


def _prepared_model(accelerator: Accelerator, model: nn.Module) -> DistributedDataParallel:
    ddp = getattr(model, "_orig_mod", model)
    if isinstance(ddp, DistributedDataParallel):
        return ddp
    kind = getattr(accelerator.distributed_type, "name", str(accelerator.distributed_type))
    remedy = _REMEDIES.get(kind, "pass what accelerator.prepare(model, optimizer, ...) returned")
    raise CompatibilityError(
        f"attach needs the DistributedDataParallel model that accelerator.prepare returns, got {type(ddp).__name__} "
        f"with the distributed type {kind}; {remedy}"
    )


def _prepared_optimizer(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside, whose step Accelerate calls when gradients are whole."""
    if not any(optimizer is prepared for prepared in accelerator._optimizers):
        raise CompatibilityError(
            f"attach needs the optimizer that accelerator.prepare returns, got {type(optimizer).__name__}; call attach "
            "after model, optimizer, ... = accelerator.prepare(model, optimizer, ...), with those"
        )
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer

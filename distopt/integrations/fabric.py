"""Lightning Fabric: after `setup()` one call puts an algorithm under the wrapped model.

    model, optimizer = fabric.setup(model, optimizer)
    attached = distopt.integrations.fabric.attach(fabric, model, optimizer, {"algorithm": "dgc"})
    fabric.save("checkpoint.pt", {"model": model, "optimizer": optimizer, "distopt": attached})

`fabric.save` writes one file on rank 0. What `attach` returns brings the state of all ranks there, and takes the own
part back in `fabric.load`, also on another number of ranks.

Limits: `DDPStrategy` only; `fabric.clip_gradients` clips what the optimizer gets, which with DGC is the update with
momentum in it, so use the algorithm's `clip`. Rank 0 holds the state of all ranks while it saves.
"""

import importlib

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distopt.errors import CompatibilityError
from distopt.integrations.attached import Attached, algorithm_of
from distopt.job import Job, JobSource

try:
    importlib.import_module("lightning.fabric")
except ModuleNotFoundError as error:
    raise CompatibilityError(
        f"distopt.integrations.fabric needs Lightning 2.5 or newer, which is not installed ({error}); "
        "pip install torch-distopt[lightning]"
    ) from error

from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricModule, _FabricOptimizer


def attach(fabric: Fabric, model: nn.Module, optimizer: torch.optim.Optimizer, job: JobSource) -> Attached:
    """Attaches a job's algorithm to what `fabric.setup` returned. Collective.

    Gradient accumulation with `fabric.no_backward_sync` and mixed precision are Fabric's as before. Call it before
    `fabric.load`, and give what it returns to `fabric.save` and `fabric.load` beside model and optimizer.

    Args:
        fabric: That set them up.
        model: As set up.
        optimizer: As set up.
        job: An algorithm, its mapping, or the path of a `distopt.toml`.

    Raises:
        ConfigError: The job cannot be read, or a value in it breaks its rule.
        CompatibilityError: The model, the optimizer or Fabric's strategy cannot be combined with it.
        DesyncError: The ranks have different versions, configurations or models; names both.
    """
    described = Job.load(job)
    algorithm = algorithm_of(
        described,
        host="Fabric",
        keeps_checkpoints='call fabric.save("{0.folder}/...", {{..., "distopt": attached}}) every {0.every} steps',
    )
    ddp, inner = _forward_module(fabric, model), _inner(optimizer)
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    return Attached(algorithm, ddp, inner, scaler=scaler, log=described.log)


def _forward_module(fabric: Fabric, model: nn.Module) -> DistributedDataParallel:
    wrapped = getattr(model, "_orig_mod", model)
    if not isinstance(wrapped, _FabricModule):
        raise CompatibilityError(
            f"attach needs the model that fabric.setup returns, got {type(wrapped).__name__}; call attach after "
            "model, optimizer = fabric.setup(model, optimizer), with those"
        )
    ddp = getattr(wrapped._forward_module, "_orig_mod", wrapped._forward_module)
    if not isinstance(ddp, DistributedDataParallel):
        raise CompatibilityError(
            f"attach needs a model that Fabric wraps in DistributedDataParallel, got {type(ddp).__name__} of "
            f'{type(fabric.strategy).__name__}; use Fabric(strategy="ddp", devices=...) with two devices or more'
        )
    return ddp


def _inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    if not isinstance(optimizer, _FabricOptimizer):
        raise CompatibilityError(
            f"attach needs the optimizer that fabric.setup returns, got {type(optimizer).__name__}; call attach after "
            "model, optimizer = fabric.setup(model, optimizer), with those"
        )
    inner: torch.optim.Optimizer = optimizer.optimizer
    return inner

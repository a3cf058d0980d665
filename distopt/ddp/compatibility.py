"""What can be checked at attach: whether this model, host and set of ranks can carry the algorithm at all."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distopt.errors import CompatibilityError
from distopt.version import __version__


def unwrap_ddp(model: nn.Module) -> DistributedDataParallel:
    """The DDP object in `model`, which may be compiled.

    Raises:
        CompatibilityError: There is none, or no process group.
    """
    ddp = getattr(model, "_orig_mod", model)
    if not isinstance(ddp, DistributedDataParallel):
        raise CompatibilityError(
            f"attach needs a DistributedDataParallel model, got {type(ddp).__name__}; call "
            "torch.distributed.init_process_group and wrap it first: DistributedDataParallel(model)"
        )
    if not dist.is_initialized():
        raise CompatibilityError(
            "attach needs a process group, got none; call torch.distributed.init_process_group first, under torchrun"
        )
    return ddp


def synchronised_parameters(ddp: DistributedDataParallel) -> dict[str, Tensor]:
    """The parameters whose gradients DDP synchronises, by their name in the wrapped module (each once if tied).

    Raises:
        CompatibilityError: A gradient would be sparse or complex, or the host does not call hooks properly.
    """
    if getattr(ddp, "_use_python_reducer", False):
        raise CompatibilityError(
            'a communication hook needs DDP\'s own reducer, got torch._dynamo.config.optimize_ddp = "python_reducer", '
            "which ignores what hooks return; set it to True (the default) before wrapping the model"
        )
    check_embeddings(ddp.module)
    parameters = {
        name.replace("_orig_mod.", ""): parameter
        for name, parameter in ddp.module.named_parameters()
        if name not in ddp.parameters_to_ignore
    }
    if not all(parameter.requires_grad for parameter in parameters.values()):
        # Those frozen before DDP was made are in no bucket; those frozen since are. Only the buckets tell.
        buckets = ddp.reducer._get_zeros_like_grad_buckets()
        synchronised = {id(parameter) for bucket in buckets for parameter in bucket.parameters()}
        parameters = {name: parameter for name, parameter in parameters.items() if id(parameter) in synchronised}
    check_floating(parameters)
    return parameters


def check_floating(parameters: Mapping[str, Tensor]) -> None:
    """Raises `CompatibilityError` unless all of these parameters are floating point."""
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            raise CompatibilityError(
                f"parameters must be floating point, got {parameter.dtype} for {name!r}; freeze it or keep real and "
                "imaginary parts apart"
            )


def check_embeddings(module: nn.Module) -> None:
    """Raises `CompatibilityError` if the gradient of an embedding would be a sparse tensor."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse:
            raise CompatibilityError(
                f"gradients must be dense, got sparse=True in the embedding {name!r}; set sparse=False (top-k "
                "compression already sends few of its entries)"
            )


def fingerprint(
    config: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
    optimized: Mapping[str, object],
    *,
    taken_over: str,
    host: Mapping[str, bool],
) -> dict[str, Any]:
    """What must be the same on every rank, in words that an error can quote.

    Args:
        config: The algorithm, as a mapping.
        parameters: Those that are synchronised.
        optimized: Name of each that is in the optimizer, with the settings that were taken over for it.
        taken_over: The same for a reader.
        host: Options of the training script on which the number of collectives depends.
    """
    shapes = [(name, tuple(p.shape), str(p.dtype), tuple(p.stride())) for name, p in parameters.items()]
    return {
        "distopt version": __version__,
        "configuration": dict(config),
        "model": f"{len(parameters)} parameters, digest {_digest(shapes)}",
        "optimizer settings": {
            "taken over": taken_over,
            "parameters": f"{len(optimized)} optimized, digest {_digest(optimized)}",
        },
        "training options": dict(host),
    }


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]

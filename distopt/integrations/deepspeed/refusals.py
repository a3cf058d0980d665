"""What of DeepSpeed cannot be combined with compressed gradients, each with what to do instead.

A ds_config can be checked before DeepSpeed has seen it; an engine is checked by the ds_config that it was made with,
and by what it has become.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distopt.ddp.algorithm import DDPAlgorithm
from distopt.errors import CompatibilityError

_REMOVED = {
    "onebitadam": '{"type": "Adam", "params": {"torch_adam": true}}',
    "onebitlamb": '{"type": "Adam", "params": {"torch_adam": true}}',
    "zerooneadam": '{"type": "Adam", "params": {"torch_adam": true}}',
}
_HALF = ("torch.float16", "fp16", "float16", "half")
_WHOLE_GRADIENTS = "leave it out: distopt averages whole gradients over all ranks"
_COMMUNICATION = "values of the block decides what travels: leave communication_data_type out"


def _stage(value: Any) -> bool:
    return value not in (0, 1, None, "auto")


def _off(value: Any) -> bool:
    return value is False


def _on(value: Any) -> bool:
    return value is True


def _more_than_one(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 1


# Where it stands, when it is refused, and what to do.
_RULES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        ("zero_optimization", "stage"),
        _stage,
        "set stage to 0, or to 1 with an algorithm that leaves momentum to the optimizer (from stage 2 on no rank ever "
        "has the whole gradient)",
    ),
    (("fp16", "enabled"), _on, 'use "bf16": {"enabled": true} (fp16 gradients are still multiplied by the loss scale)'),
    (
        ("amp", "enabled"),
        _on,
        'use "bf16": {"enabled": true} (apex scales the loss, and steps the optimizer its own way)',
    ),
    (
        ("prescale_gradients",),
        _on,
        "set it to false (the average is distopt's, which divides by the number of ranks itself)",
    ),
    (
        ("gradient_predivide_factor",),
        lambda value: isinstance(value, int | float) and value != 1,
        "set it to 1.0 (the average is distopt's, which divides by the number of ranks itself)",
    ),
    (
        ("gradient_allreduce_op",),
        lambda value: isinstance(value, str) and value.lower() != "mean",
        'set it to "mean", with a learning rate that is larger by the number of ranks',
    ),
    (
        ("compile", "deepcompile"),
        _on,
        "set it to false (DeepCompile reduces gradients in its own graph); engine.compile() works",
    ),
    (
        ("tensor_parallel", "autotp_size"),
        _more_than_one,
        "set it to 0: distopt averages whole gradients over all ranks",
    ),
    (("tensor_parallel", "tp_size"), _more_than_one, "set it to 1: distopt averages whole gradients over all ranks"),
    (
        ("tensor_parallel", "tp", "tp_size"),
        _more_than_one,
        "set it to 1: distopt averages whole gradients over all ranks",
    ),
    (("sequence_parallel_size",), _more_than_one, "set it to 1: distopt averages over all ranks alike"),
    (("expert_parallel", "enabled"), _on, "set it to false: experts are averaged over groups of their own"),
    (("hybrid_engine", "enabled"), _on, "set it to false: it has not been tried with distopt"),
    (("sparse_gradients",), _on, "set it to false: top-k compression already sends few entries of an embedding"),
    (("communication_data_type",), lambda value: value not in (None, "auto"), _COMMUNICATION),
    (
        ("checkpoint", "use_node_local_storage"),
        _on,
        "set it to false: every rank must be able to read the others' files where their number changes",
    ),
)


# The same at ZeRO stage 1, where only one of DeepSpeed's ways to reduce gradients is known to be exact.
_RULES_OF_STAGE_1: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("zero_optimization", "overlap_comm"), _on, "set it to false"),
    (("zero_optimization", "contiguous_gradients"), _off, "set it to true"),
    (("zero_optimization", "reduce_scatter"), _off, "set it to true"),
    (("zero_optimization", "zenflow"), lambda value: value is not None, "leave it out"),
    (
        ("zero_optimization", "offload_optimizer", "device"),
        lambda value: value not in (None, "none"),
        'set it to "none", or use stage 0 without offload',
    ),
)


def check_config(config: Mapping[str, Any], *, overlap: bool) -> None:
    """Refuses what a ds_config asks for and compressed gradients cannot do.

    Raises:
        CompatibilityError: Names the key, its value and the remedy.
    """
    stage = _stage_of(config)
    for path, refused, remedy in _RULES + (_RULES_OF_STAGE_1 if stage == 1 else ()):
        value = _at(config, path)
        if refused(value):
            raise CompatibilityError(f"distopt cannot work with {'.'.join(path)}, got {value!r}; {remedy}")
    if stage == 1 and overlap:
        raise CompatibilityError(
            "overlap needs ZeRO stage 0, got zero_optimization.stage 1 (reduced at the boundary); leave overlap out"
        )
    autocast = config.get("torch_autocast")
    if isinstance(autocast, Mapping) and _on(autocast.get("enabled")):
        dtype = str(autocast.get("dtype"))
        if dtype in _HALF:
            raise CompatibilityError(
                f'distopt cannot work with torch_autocast.dtype, got {dtype!r}; use "bfloat16" (float16 gradients are '
                "still multiplied by the loss scale)"
            )
    kind = _at(config, ("optimizer", "type"))
    if isinstance(kind, str) and kind.lower() in _REMOVED:
        raise CompatibilityError(
            f"optimizer.type must be one that DeepSpeed has, got {kind!r}, which was removed in 0.19.7; use "
            f'"optimizer": {_REMOVED[kind.lower()]} with {{"algorithm": "topk", "density": 0.01}} in the block '
            "(docs/deepspeed.md, key by key)"
        )
    if overlap and config.get("managed_gradient_accumulation") is False:
        raise CompatibilityError(
            "overlap needs to know the boundary of gradient accumulation before the backward pass, got "
            "managed_gradient_accumulation=False; leave overlap out"
        )


def check_optimizer(config: Mapping[str, Any], optimizer: object, algorithm: DDPAlgorithm) -> None:
    """Refuses another optimizer than SGD where the algorithm needs SGD's momentum, as far as can be seen beforehand.

    Raises:
        CompatibilityError: Names the optimizer and the remedy.
    """
    if not algorithm.corrects_momentum:
        return
    if _stage_of(config) == 1:
        raise CompatibilityError(
            f"momentum correction needs the momentum of every parameter on every rank, got {algorithm.name!r} with "
            'zero_optimization.stage 1, where each rank has a part of it; use {"algorithm": "topk", "density": 0.01}, '
            "or stage 0"
        )
    kind = _at(config, ("optimizer", "type"))
    name = None
    if isinstance(optimizer, torch.optim.Optimizer):
        name = None if isinstance(optimizer, torch.optim.SGD) else type(optimizer).__name__
    elif optimizer is None and isinstance(kind, str):
        name = None if kind.lower() == "sgd" else kind
    if name is not None:
        raise CompatibilityError(
            f"momentum correction is defined for torch.optim.SGD, got {name}; use "
            '{"algorithm": "topk", "density": 0.01} in the block: plain error feedback, for every optimizer'
        )


def check_model(model: nn.Module, mpu: Any = None) -> None:
    """Refuses models whose gradients are not averaged as a whole over all ranks.

    Raises:
        CompatibilityError: A pipeline, experts, model parallelism, or a model that is wrapped already.
    """
    if _is_of(model, "deepspeed.runtime.pipe", "PipelineModule"):
        raise CompatibilityError(
            "distopt cannot work with a PipelineModule, whose stages average over groups of their own; pass the model "
            "as a plain module"
        )
    for name, part in model.named_modules():
        if _is_of(part, "deepspeed.moe", "MoE") or _is_of(part, "deepspeed.module_inject", "AutoEPMoELayer"):
            raise CompatibilityError(
                f"distopt cannot work with experts (MoE), got {type(part).__name__} as {name!r}: they are averaged "
                "over groups of their own; use a dense layer"
            )
    for name, parameter in model.named_parameters():
        if getattr(parameter, "allreduce", True) is False:
            raise CompatibilityError(
                f"distopt averages every parameter over all ranks, got allreduce=False for {name!r} (MoE); use a dense "
                "layer"
            )
        if hasattr(parameter, "ds_id"):
            raise CompatibilityError(
                f"distopt needs whole parameters, got {name!r} partitioned by zero.Init; make the model without it"
            )
    for method in ("get_model_parallel_world_size", "get_tensor_model_parallel_world_size"):
        size = getattr(mpu, method)() if hasattr(mpu, method) else 1
        if size > 1:
            raise CompatibilityError(
                f"distopt cannot work with tensor parallelism, got an mpu whose {method}() is {size}; leave mpu out"
            )


def check_not_wrapped(model: nn.Module) -> None:
    """Raises `CompatibilityError` if the model is one of DistributedDataParallel."""
    if isinstance(model, DistributedDataParallel):
        raise CompatibilityError(
            "initialize needs the bare model, got DistributedDataParallel, and DeepSpeed would average a second time; "
            'pass the module in it, with "overlap": true in the block'
        )


def check_is_engine(engine: Any) -> None:
    """Raises `CompatibilityError` for anything but an engine of DeepSpeed."""
    for method in ("backward", "step", "buffered_allreduce_fallback", "is_gradient_accumulation_boundary"):
        if not hasattr(engine, method):
            raise CompatibilityError(
                f"attach needs a DeepSpeed engine, got {type(engine).__name__}; pass the first that "
                "deepspeed.initialize returns"
            )


def check_engine(engine: Any, algorithm: DDPAlgorithm, *, overlap: bool) -> None:
    """Refuses an engine as `check_config` and `check_model` do, and by what it has become.

    Raises:
        CompatibilityError: Names what is wrong and the remedy.
    """
    if isinstance(engine.module, DistributedDataParallel) and not overlap:
        raise CompatibilityError(
            "DistributedDataParallel inside the engine averages gradients itself, got overlap=False; leave overlap "
            "out, or give deepspeed.initialize the bare model"
        )
    check_config(engine._config._param_dict, overlap=overlap)
    check_model(engine.module, engine.mpu)
    check_optimizer(engine._config._param_dict, engine.basic_optimizer, algorithm)
    found = {
        "zero_optimization.stage": (max(1, int(engine.zero_optimization_stage())), 1),
        "fp16.enabled": (engine.fp16_enabled(), False),
        "a loss scale": (getattr(engine, "torch_autocast_z0_gradscaler", None) is not None, False),
        "a pipeline": (bool(engine.pipeline_parallelism), False),
        "experts (MoE)": (bool(engine.has_moe_layers), False),
        "tensor parallelism": (engine.mp_world_size, 1),
        "sequence_parallel_size": (engine.sequence_parallel_size, 1),
    }
    for what, (value, needed) in found.items():
        if value != needed:
            raise CompatibilityError(f"distopt cannot work with {what}, got {value}; make the engine with {needed}")
    if not isinstance(getattr(engine, "basic_optimizer", None), torch.optim.Optimizer):
        raise CompatibilityError(
            f"attach needs an engine with a torch optimizer, got {type(engine.basic_optimizer).__name__}; give "
            "deepspeed.initialize an optimizer, or name one in ds_config"
        )
    if engine.zero_optimization_stage() == 1:
        _check_zero_one(engine.optimizer)


def _check_zero_one(optimizer: Any) -> None:
    """Refuses what a ZeRO optimizer has become, beyond what its ds_config says."""
    found = {"overlap_comm": False, "contiguous_gradients": True, "reduce_scatter": True, "cpu_offload": False}
    found["use_grad_accum_attribute"] = False
    for name, needed in found.items():
        value = getattr(optimizer, name, None)
        if value is not needed:
            raise CompatibilityError(
                f"at ZeRO stage 1 {name} must be {needed}, got {value!r} in {type(optimizer).__name__}; set it so in "
                "ds_config, or use stage 0"
            )


def _stage_of(config: Mapping[str, Any]) -> int:
    """The stage of ZeRO that a ds_config asks for; it may be switched on by `true` alone."""
    given = config.get("zero_optimization")
    stage = int(given) if isinstance(given, bool) else _at(config, ("zero_optimization", "stage"))
    return stage if isinstance(stage, int) else 0


def _at(config: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = config
    for key in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def _is_of(module: nn.Module, package: str, name: str) -> bool:
    """Whether the class is DeepSpeed's, by name: a model that is not DeepSpeed's need not import it."""
    return any(kind.__name__ == name and kind.__module__.startswith(package) for kind in type(module).__mro__)

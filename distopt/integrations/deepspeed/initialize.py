"""`initialize`, as DeepSpeed's, and `attach` for an engine that is there already."""

import copy
import logging
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distopt.comm import agree, raise_together
from distopt.ddp.attachment import Attachment
from distopt.errors import ConfigError, DistoptError
from distopt.integrations.deepspeed.block import Block, host_module, read_config, take_block
from distopt.integrations.deepspeed.checkpoints import follow_checkpoints, save_every
from distopt.integrations.deepspeed.hosts import EngineHost, OverlapHost, ZeroOneHost, group_of
from distopt.integrations.deepspeed.refusals import (
    check_config,
    check_engine,
    check_is_engine,
    check_model,
    check_not_wrapped,
    check_optimizer,
)
from distopt.job import JobSource, LogSettings
from distopt.observe import record

_log = logging.getLogger("distopt")
_ARGUMENTS = ("deepspeed_config", "deepscale_config")


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int | None = None,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize` with a block "distopt" in the config. Collective.

    All arguments are DeepSpeed's. The config may be a mapping, or the path of a ds_config, also that of
    `args.deepspeed_config`. Its block "distopt" holds what `distopt.Job.load` takes (the keys of an algorithm of the
    ddp family with the tables `log` and `checkpoint`, or the path of a file with them) and beside it `overlap` and
    `bucket_cap_mb`. The block is taken out before DeepSpeed sees the config; the caller's mapping is left as it is.

    Returns:
        The engine, optimizer, loader and scheduler that DeepSpeed returns. `engine.distopt` is the attachment.

    Raises:
        ConfigError: There is no block, a key of it is unknown, or a value breaks its rule.
        CompatibilityError: DeepSpeed is not installed, or the config, model or optimizer cannot be combined with it;
            before DeepSpeed is called, where it can be seen there.
    """
    config, args = _config_of(args, config if config is not None else config_params)
    block, ds_config = take_block(read_config(config))
    check_config(ds_config, overlap=block.overlap)
    if model is None:
        raise ConfigError("initialize needs a model, got None; pass model=")
    check_not_wrapped(model)
    check_model(model, mpu)
    check_optimizer(ds_config, optimizer, block.algorithm)
    deepspeed = host_module("deepspeed")
    given = {
        "args": args,
        "optimizer": optimizer,
        "model_parameters": model_parameters,
        "training_data": training_data,
        "lr_scheduler": lr_scheduler,
        "distributed_port": distributed_port,
        "mpu": mpu,
        "dist_init_required": dist_init_required,
        "collate_fn": collate_fn,
        "mesh_param": mesh_param,
    }
    given = {name: value for name, value in given.items() if value is not None}  # the rest is as DeepSpeed has it
    engine, its_optimizer, loader, scheduler = deepspeed.initialize(
        model=model, config=copy.deepcopy(ds_config), **given
    )
    _attach(engine, block)
    return engine, its_optimizer, loader, scheduler


def attach(engine: Any, source: JobSource, *, overlap: bool | None = None) -> Attachment:
    """Puts an algorithm into an engine that `deepspeed.initialize` has made. Collective.

    Args:
        engine: At ZeRO stage 0, before or between its training steps.
        source: `distopt.DGC(...)`, or what else `distopt.Job.load` or the block takes.
        overlap: Whether DistributedDataParallel inside the engine sends gradients behind the backward pass. By default
            as the block says, and true where the engine's module is DDP already.

    Returns:
        The attachment, also as `engine.distopt`. `detach()` restores the engine.

    Raises:
        ConfigError: A key is unknown, or a value breaks its rule.
        CompatibilityError: The engine cannot be combined with the algorithm.
        DesyncError: The ranks have different versions, configurations or models; names both.
    """
    block = Block.load(source)
    if overlap is None:
        overlap = block.overlap or _is_wrapped(engine)
    return _attach(engine, Block(job=block.job, overlap=overlap, bucket_cap_mb=block.bucket_cap_mb))


def _attach(engine: Any, block: Block) -> Attachment:
    check_is_engine(engine)
    _agree(engine, block)
    kind = OverlapHost if block.overlap else ZeroOneHost if engine.zero_optimization_stage() == 1 else EngineHost
    host = kind(engine, bucket_cap_mb=block.bucket_cap_mb)
    attachment = block.algorithm.attach_to(host, engine.basic_optimizer)
    _raise_before_step(engine, host, attachment)
    follow_checkpoints(engine, host, attachment)
    if block.job.checkpoint is not None:
        save_every(engine, host, block.job.checkpoint)
    engine.distopt = attachment
    host.patches.afterwards(lambda: delattr(engine, "distopt"))
    if block.job.log is not None:
        _record(engine, host, attachment, block.job.log)
    _warn_of_clipping(engine, attachment)
    return attachment


def _agree(engine: Any, block: Block) -> None:
    """Checks the engine, and what of the block no attachment knows: ranks that differ would wait for each other."""
    problem = None
    try:
        check_engine(engine, block.algorithm, overlap=block.overlap)
    except DistoptError as error:
        problem = error
    checkpoint = block.job.checkpoint
    own = {
        "overlap": block.overlap,
        "bucket_cap_mb": block.bucket_cap_mb,
        "table checkpoint": checkpoint and checkpoint.to_dict(),
    }
    agree(own, problem, group_of(engine), engine.device)


def _raise_before_step(engine: Any, host: EngineHost | OverlapHost, attachment: Attachment) -> None:
    """Raises errors of the exchange before DeepSpeed clips: that is a collective, which would wait for a lost rank."""
    step = engine.step

    def step_if_well(*args: Any, **kwargs: Any) -> Any:
        attachment.raise_failure()
        return step(*args, **kwargs)

    host.patches.replace(engine, "step", step_if_well)


def _record(engine: Any, host: EngineHost | OverlapHost, attachment: Attachment, settings: LogSettings) -> None:
    """Begins the log; where one rank cannot write it, gives the engine back on all of them."""
    problem = None
    try:
        engine.distopt_recorder = recorder = record(attachment, engine.basic_optimizer, settings)
        host.patches.afterwards(lambda: delattr(engine, "distopt_recorder"))
        host.patches.afterwards(recorder.close)
    except DistoptError as error:
        problem = error
    try:
        raise_together(problem, attachment.process_group, attachment.device, what="cannot write the log")
    except DistoptError:
        attachment.detach()
        raise


def _warn_of_clipping(engine: Any, attachment: Attachment) -> None:
    """Says so where DeepSpeed's clipping meets updates that contain momentum, and not gradients."""
    if engine.gradient_clipping() > 0 and attachment.sends_momentum and attachment.process_group.rank() == 0:
        _log.warning(
            "gradient_clipping=%g clips the update, momentum included, not the gradient; to clip gradients set it to 0 "
            "and clip=%g in the block, which acts on each rank before accumulation",
            engine.gradient_clipping(),
            engine.gradient_clipping(),
        )


def _is_wrapped(engine: Any) -> bool:
    return isinstance(getattr(engine, "module", None), DistributedDataParallel)


def _config_of(args: Any, config: Any) -> tuple[Any, Any]:
    """The config, and the arguments without the path of one: DeepSpeed takes it from one place only."""
    given = {name: getattr(args, name) for name in _ARGUMENTS if getattr(args, name, None) is not None}
    sources = [config, *given.values()]
    if len(sources) - (config is None) != 1:
        raise ConfigError(
            f"initialize needs one ds_config, got {[source for source in sources if source is not None]}; pass "
            "config=, or args with deepspeed_config"
        )
    if given:
        args = copy.copy(args)
        for name in given:
            setattr(args, name, None)
        (config,) = given.values()
    return config, args

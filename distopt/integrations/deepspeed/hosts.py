"""A DeepSpeed engine as a host: its own average replaced, at ZeRO stage 0 or 1, or DistributedDataParallel inside."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distopt.ddp.compatibility import check_embeddings
from distopt.ddp.hook import CommHook
from distopt.ddp.host import DDPHost, FeedHost, Host
from distopt.ddp.parameters import TrackedParameter
from distopt.errors import CompatibilityError
from distopt.integrations.deepspeed.patches import Patches, check_untouched

_SEAM = "buffered_allreduce_fallback"


class EngineHost(FeedHost):
    """The gradients at the boundary of accumulation, before clipping and the step.

    Args:
        engine: At ZeRO stage 0.
        bucket_cap_mb: Size of a bucket in MiB.
    """

    changes_updates = True

    def __init__(self, engine: Any, *, bucket_cap_mb: float = 25.0) -> None:
        check_embeddings(engine.module)
        super().__init__(
            _trained(engine.module),
            group_of(engine),
            stands_for=master_weights(engine),
            bucket_cap_mb=bucket_cap_mb,
        )
        self.patches = Patches()
        self._engine = engine
        self._one_backward = _OneBackward(engine)

    def claim(self) -> None:
        """See `Host.claim`."""
        super().claim()
        check_untouched(self._engine, _SEAM)

    def connect(self, hook: CommHook | None) -> None:
        """See `Host.connect`."""
        super().connect(hook)
        if hook is None:
            self.patches.undo()
        else:
            self.patches.replace(self._engine, _SEAM, self._exchange)

    def loaded(self) -> None:
        """To be called after the engine has loaded a checkpoint: it may count its micro-batches anew."""
        self._one_backward.forget()

    def bare(self) -> contextlib.AbstractContextManager[None]:
        """See `OverlapHost.bare`: the engine's module is the bare one all the time."""
        return contextlib.nullcontext()

    def _exchange(self, grads: Any = None, elements_per_buffer: int = 0) -> None:
        """Takes the place of DeepSpeed's method, which averages the gradients of the module."""
        self._exchange_gradients()

    def _exchange_gradients(self) -> None:
        assert self._hook is not None
        self._one_backward.check(self._hook)
        parameters = list(_trained(self._engine.module).values())
        for parameter in parameters:
            if parameter.grad is None:  # took no part here, but perhaps on another rank
                parameter.grad = torch.zeros_like(parameter)
        self.exchange(parameters, [parameter.grad for parameter in parameters if parameter.grad is not None])


class _OneBackward:
    """Refuses a second exchange before the engine's step, which would take updates for gradients.

    Args:
        engine: Counts its micro-batches.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._micro_steps = self._step = -1

    def forget(self) -> None:
        """The engine counts anew."""
        self._micro_steps = -1

    def check(self, hook: CommHook) -> None:
        """Before an exchange. One that failed does not count: the hook has made no step, and the user may go on.

        Raises:
            CompatibilityError: There has been one in this step of the engine.
        """
        if self._micro_steps == self._engine.micro_steps and hook.step != self._step:
            raise CompatibilityError(
                "with distopt one backward pass ends a step, got a second one at the boundary of gradient accumulation "
                "before engine.step(): the gradients are updates already; add the losses up, or raise "
                "gradient_accumulation_steps"
            )
        self._micro_steps, self._step = self._engine.micro_steps, hook.step


class ZeroOneHost(EngineHost):
    """An engine at ZeRO stage 1: every rank has the whole gradient at the boundary, and keeps its part of the average.

    The gradients are exchanged before DeepSpeed takes its parts, and its own reduction of them does nothing. What each
    rank has stepped, DeepSpeed still sends whole: half of a plain step's bytes remain, in no count of ours.
    """

    def claim(self) -> None:
        """See `Host.claim`."""
        super().claim()
        for name in ("reduce_gradients", "average_tensor"):
            check_untouched(self._engine.optimizer, name)

    def connect(self, hook: CommHook | None) -> None:
        """See `Host.connect`."""
        FeedHost.connect(self, hook)
        if hook is None:
            self.patches.undo()
            return
        optimizer = self._engine.optimizer
        take_parts = optimizer.reduce_gradients

        def reduce_gradients(*args: Any, **kwargs: Any) -> None:
            self._exchange_gradients()
            take_parts(*args, **kwargs)

        self.patches.replace(optimizer, "reduce_gradients", reduce_gradients)
        self.patches.replace(optimizer, "average_tensor", lambda tensor, communication_data_type: None)
        if hasattr(self._engine, "coalesce_grad_reduction"):
            self.patches.replace(self._engine, "coalesce_grad_reduction", _refuse_coalescing)


class OverlapHost(Host):
    """DistributedDataParallel inside the engine: gradients travel behind the backward pass.

    The engine's own average is switched off. DDP stays quiet until the boundary of gradient accumulation. Checkpoints
    are those of the bare module.

    Args:
        engine: At ZeRO stage 0. If its module is DDP already, that one is used.
        bucket_cap_mb: Size of DDP's buckets in MiB.
    """

    changes_updates = True

    def __init__(self, engine: Any, *, bucket_cap_mb: float = 25.0) -> None:
        check_embeddings(engine.module)
        check_untouched(engine, _SEAM)
        self.patches = Patches()
        self._engine = engine
        self._one_backward = _OneBackward(engine)
        self._bare: nn.Module | None = None
        module = engine.module
        if not isinstance(module, DistributedDataParallel):
            self._bare = module
            module = _wrapped(module, group_of(engine), bucket_cap_mb)
        self._ddp: DistributedDataParallel | None = module
        self._inner = DDPHost(module)
        self._masters = master_weights(engine)
        self.process_group = self._inner.process_group
        self.device = self._inner.device
        self.tracks_usage = self._inner.tracks_usage

    def parameters(self) -> dict[str, Tensor]:
        """See `Host.parameters`."""
        return self._inner.parameters()

    def stands_for(self) -> Mapping[int, Sequence[Tensor]]:
        """See `Host.stands_for`."""
        return self._masters

    def claim(self) -> None:
        """See `Host.claim`."""
        self._inner.claim()

    def connect(self, hook: CommHook | None) -> None:
        """See `Host.connect`."""
        self._inner.connect(hook)
        engine, ddp, bare = self._engine, self._ddp, self._bare
        if hook is None:
            self.patches.undo()
            self._ddp = None
            return
        assert ddp is not None
        reduces = engine.enable_backward_allreduce
        engine.enable_backward_allreduce = False
        self.patches.afterwards(lambda: setattr(engine, "enable_backward_allreduce", reduces))
        if bare is not None:
            engine._set_client_model(ddp)
            self.patches.afterwards(lambda: engine._set_client_model(bare))

        def at_the_boundary_only(module: nn.Module, args: Any) -> None:
            ends_step = engine.is_gradient_accumulation_boundary() and not engine.inside_no_sync_ctxt
            ddp.require_backward_grad_sync = ends_step  # what DDP.no_sync sets
            if ends_step and torch.is_grad_enabled():
                self._one_backward.check(hook)

        self.patches.afterwards(ddp.register_forward_pre_hook(at_the_boundary_only).remove)
        self.patches.afterwards(lambda: setattr(ddp, "require_backward_grad_sync", True))
        for name in ("save_16bit_model", "module_state_dict"):
            self.patches.replace(engine, name, self._with_bare(getattr(engine, name)))

    def keep_in_step(self, group: dist.ProcessGroup, tracked: Sequence[TrackedParameter]) -> Callable[[], None]:
        """See `Host.keep_in_step`."""
        return self._inner.keep_in_step(group, tracked)

    def loaded(self) -> None:
        """See `EngineHost.loaded`."""
        self._one_backward.forget()

    @contextlib.contextmanager
    def bare(self) -> Iterator[None]:
        """While the engine saves or loads: its module is the bare one, so that names have no `module.` in front."""
        if self._bare is None or self._engine.module is self._bare:
            yield
            return
        ddp = self._engine.module
        self._engine._set_client_model(self._bare)
        try:
            yield
        finally:
            self._engine._set_client_model(ddp)

    def _with_bare(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.bare():
                return method(*args, **kwargs)

        return call


def master_weights(engine: Any) -> dict[int, list[Tensor]]:
    """By the id of a tensor in the engine's optimizer: the parameters of the module that it stands for (with bf16)."""
    wrapper = engine.optimizer
    if wrapper is engine.basic_optimizer:
        return {}
    if hasattr(wrapper, "single_partition_of_fp32_groups"):  # ZeRO: this rank's part of each group, flat
        masters = zip(wrapper.single_partition_of_fp32_groups, wrapper.bit16_groups, strict=True)
        return {id(flat): list(parameters) for flat, parameters in masters}
    if hasattr(wrapper, "fp32_groups_flat"):
        masters = zip(wrapper.fp32_groups_flat, wrapper.fp16_groups, strict=True)
        return {id(flat): list(parameters) for flat, parameters in masters}
    if hasattr(wrapper, "fp32_groups"):
        return {
            id(master): [parameter]
            for own, parameters in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True)
            for master, parameter in zip(own, parameters, strict=True)
        }
    raise CompatibilityError(
        f"distopt does not know which parameters DeepSpeed's {type(wrapper).__name__} steps; use fp32, bf16 or "
        "torch_autocast, with gradients accumulated in the same dtype"
    )


def _wrapped(module: nn.Module, group: dist.ProcessGroup, bucket_cap_mb: float) -> DistributedDataParallel:
    """DDP that leaves buffers alone, as DeepSpeed does."""
    with warnings.catch_warnings():  # torch 2.13 has another name for it, which older ones do not know
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            module, process_group=group, broadcast_buffers=False, bucket_cap_mb=bucket_cap_mb
        )


def _refuse_coalescing() -> None:
    raise CompatibilityError(
        "engine.coalesce_grad_reduction() reduces gradients past distopt, got a call while it is attached; use "
        "gradient_accumulation_steps, or call detach() before"
    )


def _trained(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that DeepSpeed averages, by name, in its order."""
    return {
        name.replace("_orig_mod.", ""): parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and parameter.numel()
    }


def group_of(engine: Any) -> dist.ProcessGroup:
    """The ranks that the engine averages over."""
    group: dist.ProcessGroup = engine.seq_data_parallel_group
    return group

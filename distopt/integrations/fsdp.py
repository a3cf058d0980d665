"""HSDP: dense inside the group of ranks that share a model's shards, compressed between the replicas.

FSDP2 shards the model over one dimension of a mesh; the hook that it calls after each reduce-scatter exchanges the
shard's gradient with the same shard of the other replicas::

    mesh = init_device_mesh("cuda", (replicas, shards), mesh_dim_names=("replicate", "shard"))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    attachment = distopt.integrations.fsdp.attach(model, optimizer, DGC(density=1e-3), mesh=mesh)

Limits: the hook must be done when it returns, so the exchange of one group of parameters ends before the backward pass
goes on. Gradients are reduced in float32. Tested on CPU ranks with gloo.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor

from distopt import observe
from distopt.comm import agree, raise_together
from distopt.ddp.algorithm import DDPAlgorithm
from distopt.ddp.attachment import Attachment
from distopt.ddp.bucket import FlatBucket
from distopt.ddp.compatibility import check_embeddings
from distopt.ddp.hook import CommHook
from distopt.ddp.host import FeedHost
from distopt.errors import CompatibilityError, DistoptError
from distopt.job import Job, JobSource


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, job: JobSource, *, mesh: DeviceMesh) -> Attachment:
    """Puts an algorithm of the ddp family between the replicas of a sharded model. Collective.

    While attached, `p.grad` holds the update (what the replicas agreed on), not the gradient. After `detach` replicas
    average densely, as those of FSDP2's own HSDP do.

    Args:
        model: Sharded by `fully_shard` over `mesh["shard"]`, the second dimension only, with equal parameters on all
            replicas.
        optimizer: Its optimizer, made after `fully_shard`.
        job: The algorithm, or what describes it: "distopt.toml", a mapping, a `distopt.Job`. With a table `log` the
            numbers are written down.
        mesh: Of two dimensions: replicas, then the ranks that share the shards of one.

    Raises:
        CompatibilityError: The model, the mesh, the optimizer or the job does not fit; says what to change.
        ConfigError: The job is no valid description.
        DesyncError: The ranks have different versions, configurations or models; names both.
    """
    loaded = Job.load(job)
    algorithm = loaded.algorithm
    if not isinstance(algorithm, DDPAlgorithm):
        raise CompatibilityError(
            f"between replicas only dgc, topk and dense can work, got {algorithm.name!r}; use one of these"
        )
    if loaded.checkpoint is not None:
        raise CompatibilityError(
            "checkpoints of a sharded model are torch.distributed.checkpoint's, got a table checkpoint; leave it out, "
            "and save attachment.state_dict() of every rank beside the model's"
        )
    policy = algorithm.step_policy(tracks_usage=False)
    if policy.clip is not None or policy.nonfinite == "skip":
        raise CompatibilityError(
            "FSDP hands over one group of parameters at a time, got an algorithm that must see the whole gradient "
            "first; leave out clip and nonfinite='skip'"
        )
    _check_mesh(mesh)
    host, attachment, recorder, problem = None, None, None, None
    try:
        host = ShardedHost(model, mesh, one_backward=algorithm.corrects_momentum)
    except DistoptError as error:
        problem = error
    _raise_on_all(problem, mesh)
    assert host is not None
    try:
        host.check_replicas()
        attachment = algorithm.attach_to(host, optimizer)
        if loaded.log is not None:
            recorder = observe.record(attachment, optimizer, loaded.log)
    except DistoptError as error:
        problem = error
    try:
        _raise_on_all(problem, mesh)
    except DistoptError:
        if recorder is not None:
            recorder.close()
        if attachment is not None:  # then also on the other ranks with this shard
            attachment.detach()
        raise
    assert attachment is not None
    return attachment


def _raise_on_all(problem: DistoptError | None, mesh: DeviceMesh) -> None:
    """Raises on every rank of the mesh if any has a problem: those with other shards would wait in FSDP. Collective."""
    for dimension, whose in enumerate(("with its shard", "of its replica")):
        try:
            what = f"of those {whose} cannot attach"
            raise_together(problem, mesh.get_group(dimension), torch.device(mesh.device_type), what=what)
        except DistoptError as error:
            problem = error
    if problem is not None:
        raise problem


class ShardedHost(FeedHost):
    """The shards of this rank, and the ranks that have the same ones in the other replicas.

    Args:
        model: See `attach`.
        mesh: See `attach`.
        one_backward: Whether each step must have one backward pass, since each adds momentum.

    Raises:
        CompatibilityError: They do not fit.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh, *, one_backward: bool) -> None:
        check_embeddings(model)
        self._groups = list(_groups_of(model))
        shard_ranks = dist.get_process_group_ranks(mesh.get_group(1))
        for group in self._groups:
            group.check(shard_ranks)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        locals_: dict[str, Tensor] = {}
        stands_for: dict[int, list[Tensor]] = {}
        for group in self._groups:
            for shard in group.shards:
                stands_for[id(shard.parameter)] = [shard.local] if shard.local.numel() else []
                if shard.local.numel():  # else there are fewer rows than ranks, and the others have them
                    locals_[names[id(shard.parameter)]] = shard.local
        super().__init__(locals_, mesh.get_group(0), stands_for=stands_for)
        self.shard = f"{mesh.get_local_rank(1)} of {len(shard_ranks)}"
        # Where there are fewer rows than ranks, this one may have nothing of a group.
        self._filled = [group for group in self._groups if any(shard.local.numel() for shard in group.shards)]
        self._seen: set[int] = set()  # of these, in the backward pass under way
        self._one_backward = one_backward

    def check_replicas(self) -> None:
        """Raises `DesyncError` unless this shard is equal on all replicas. Collective."""
        digest = hashlib.blake2b(digest_size=8)
        for parameter in self.parameters().values():
            digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        what = f"parameters of shard {self.shard} (seed all replicas alike, or load one checkpoint on all)"
        agree({what: digest.hexdigest()}, None, self.process_group, self.device)

    def claim(self) -> None:
        """See `Host.claim`."""
        super().claim()
        for group in self._groups:
            if isinstance(group.hook, _Hook):
                FeedHost.claim(group.hook.host)  # an earlier one, which must be detached
            elif group.hook is not None:
                raise CompatibilityError(
                    f"the all-reduce hook of FSDP must be free, got {group.hook!r} on {group.name!r}; do not call "
                    "set_all_reduce_hook on a model that distopt is attached to"
                )
        for group in self._groups:
            group.module.set_all_reduce_hook(_Hook(self, group))

    def connect(self, hook: CommHook | None) -> None:
        """See `Host.connect`."""
        super().connect(hook)
        self._seen.clear()

    @torch.no_grad()
    def reduce(self, group: "_Group", reduced: Tensor) -> None:
        """Makes the update of a reduce-scatter's output, in place: (padded elements of the shards,), float32."""
        if self._one_backward and self._hook is not None and any(s.parameter.grad is not None for s in group.shards):
            raise CompatibilityError(
                f"each step must have one backward pass that is reduced, got another one with gradients of "
                f"{group.name!r} there; accumulate under set_requires_gradient_sync(False), and call zero_grad() after "
                "each step with set_to_none=True"
            )
        shards = group.laid_out(reduced)
        if not shards:
            return
        if group.number in self._seen:
            missing = next(each for each in self._filled if each.number not in self._seen)
            self._seen.clear()
            raise CompatibilityError(
                f"each group of parameters must take part in each backward pass once, got {group.name!r} again before "
                f"{missing.name!r}; use every part of the model in every step, or shard them as one group"
            )
        self._seen.add(group.number)
        is_last = len(self._seen) == len(self._filled)
        if is_last:
            self._seen.clear()
        parameters, gradients = [s.local for s, _ in shards], [view for _, view in shards]
        bucket = FlatBucket(parameters, gradients, index=group.number, last=is_last)
        self.feed(bucket).wait()
        for view, update in zip(gradients, bucket.gradients(), strict=True):
            view.copy_(update)


class _Hook:
    """What FSDP calls; it knows its host, so that a later attach finds out whether that one is still at work."""

    def __init__(self, host: ShardedHost, group: "_Group") -> None:
        self.host, self._group = host, group

    def __call__(self, reduced: Tensor) -> None:
        self.host.reduce(self._group, reduced)


class _Shard:
    """This rank's part of one parameter."""

    def __init__(self, fsdp_parameter: Any) -> None:
        self.parameter: Tensor = fsdp_parameter.sharded_param
        self.dtype: torch.dtype = self.parameter.dtype
        self.size: torch.Size = fsdp_parameter.sharded_size
        self.stride: tuple[int, ...] = fsdp_parameter.contiguous_sharded_stride
        self.padded_numel: int = fsdp_parameter.padded_sharded_param_size.numel()
        self.local = self.current()

    @torch.no_grad()
    def current(self) -> Tensor:
        """The local tensor that it has now."""
        assert isinstance(self.parameter, DTensor)
        local: Tensor = self.parameter.to_local()
        return local


class _Group:
    """The parameters that FSDP reduces together."""

    def __init__(self, module: FSDPModule, name: str, group: Any, *, number: int) -> None:
        self.module, self.name, self._group, self.number = module, name, group, number
        self.shards = [_Shard(each) for each in self._group.fsdp_params if each.sharded_param.requires_grad]

    @property
    def hook(self) -> Any:
        """The hook that it has now."""
        return self._group._all_reduce_hook

    def check(self, shard_ranks: list[int]) -> None:
        """Raises `CompatibilityError` unless its gradients arrive as `reduce` needs them."""
        if self._group._is_hsdp:
            raise CompatibilityError(
                f"the model must be sharded over the second dimension of the mesh only, got {self.name!r} sharded over "
                'both, where FSDP has averaged densely before the hook; use fully_shard(module, mesh=mesh["shard"])'
            )
        ranks = dist.get_process_group_ranks(self._group.mesh_info.shard_process_group)
        if ranks != shard_ranks:
            raise CompatibilityError(
                f"the model must be sharded over the second dimension of the mesh, ranks {shard_ranks}, got "
                f'{self.name!r} over ranks {ranks}; use fully_shard(module, mesh=mesh["shard"])'
            )
        if self._group.gradient_divide_factor is not None:
            raise CompatibilityError(
                f"gradients must be divided by the number of ranks, got set_gradient_divide_factor on {self.name!r}; "
                "do not call it, and scale the loss instead"
            )
        if getattr(self._group, "force_sum_reduction_for_comms", False):  # FSDP then divides after the hook
            raise CompatibilityError(
                f"gradients must be averaged by the reduce-scatter, got set_force_sum_reduction_for_comms(True) on "
                f"{self.name!r}; leave it False"
            )
        if isinstance(self._group.offload_policy, CPUOffloadPolicy):
            raise CompatibilityError(
                f"shards must be where their gradients are, got CPUOffloadPolicy on {self.name!r}; leave it out"
            )
        for shard in self.shards:
            policy = self._group.mp_policy
            reduced = policy.reduce_dtype or policy.param_dtype or shard.dtype
            if (shard.dtype, reduced) != (torch.float32, torch.float32):
                raise CompatibilityError(
                    f"parameters must be float32 and be reduced in float32, got {shard.dtype} and {reduced} in "
                    f"{self.name!r}; use MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)"
                )

    def laid_out(self, reduced: Tensor) -> list[tuple[_Shard, Tensor]]:
        """Where each shard's gradient lies in a reduce-scatter's output; those that hold nothing are left out.

        Raises:
            CompatibilityError: A parameter had no gradient, or the model has been moved since attach.
        """
        if reduced.numel() != sum(shard.padded_numel for shard in self.shards):
            raise CompatibilityError(
                f"every parameter of {self.name!r} must have a gradient in every step, got {reduced.numel()} elements "
                f"of {sum(shard.padded_numel for shard in self.shards)}; use every part of the model, or freeze what "
                "is not used before fully_shard"
            )
        if any(shard.current().data_ptr() != shard.local.data_ptr() for shard in self.shards):
            raise CompatibilityError(
                f"the parameters of {self.name!r} must stay where they were at attach, got others; attach after "
                "moving or loading the model"
            )
        found, offset = [], 0
        for shard in self.shards:
            if shard.local.numel():
                view = reduced.as_strided(shard.size, shard.stride, reduced.storage_offset() + offset)
                found.append((shard, view))
            offset += shard.padded_numel
        return found


def _groups_of(model: nn.Module) -> Iterator[_Group]:
    """Those with trained parameters, in the order of the modules.

    Raises:
        CompatibilityError: There are none.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        for group in module._get_fsdp_state()._fsdp_param_groups:
            if id(group) not in seen and any(each.sharded_param.requires_grad for each in group.fsdp_params):
                yield _Group(module, name or "the model", group, number=len(seen))
                seen.add(id(group))
    if not seen:
        raise CompatibilityError(
            f"the model must be sharded by torch.distributed.fsdp.fully_shard, got {type(model).__name__} without; "
            'call fully_shard(model, mesh=mesh["shard"]) first, or use algorithm.attach for DistributedDataParallel'
        )


def _check_mesh(mesh: DeviceMesh) -> None:
    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 2:
        told = f"{mesh.ndim} dimensions" if isinstance(mesh, DeviceMesh) else type(mesh).__name__
        raise CompatibilityError(
            f"mesh must have two dimensions, replicas and shards, got {told}; use init_device_mesh(device, (replicas, "
            'shards), mesh_dim_names=("replicate", "shard")), and for one replica plain fully_shard'
        )

"""Where an attachment finds its gradients, and where it leaves its updates.

DDP hands every bucket over by itself, through its hook slot. Other hosts have gradients and no such slot: `FeedHost`
hands those over, in buckets of a fixed order and size, and copies the updates back.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

from distopt.comm import all_reduce_sum
from distopt.config import check_number
from distopt.ddp.bucket import Bucket, FlatBucket
from distopt.ddp.compatibility import check_floating, synchronised_parameters, unwrap_ddp
from distopt.ddp.hook import CommHook
from distopt.ddp.join import keep_decay_in_step
from distopt.ddp.parameters import TrackedParameter
from distopt.ddp.registration import HookSlot, claim_slot
from distopt.errors import CompatibilityError


class Host(ABC):
    """What an attachment needs of the system it works in.

    Attributes:
        process_group: The ranks that the system averages over.
        device: Where its parameters live.
        tracks_usage: Whether the system leaves the gradient of a parameter alone that no rank's backward pass reached.
        shard: Which part of every parameter this rank has, "0 of 2" say; empty for all of it.
        changes_updates: Whether it clips updates, or casts them to master weights, before the optimizer's step. What
            was taken over of SGD then happens at the step where it can: momentum of parameters that are sent whole, and
            weight decay.
    """

    process_group: dist.ProcessGroup
    device: torch.device
    tracks_usage: bool = False
    shard: str = ""
    changes_updates: bool = False

    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """The parameters whose gradients are synchronised, by name, in an order that all ranks share.

        Raises:
            CompatibilityError: A gradient would be of a kind that cannot be sent.
        """

    def stands_for(self) -> Mapping[int, Sequence[Tensor]]:
        """By the id of a tensor that the optimizer has in place of parameters: those, as in `parameters`.

        Master weights in full precision are such, also flat ones of several parameters (whose momentum cannot be
        taken over), and sharded tensors that wrap a local one (none where this rank has no element of it).
        """
        return {}

    @abstractmethod
    def claim(self) -> None:
        """Takes the one place of an attachment. The last step that may fail, since some hosts cannot undo it.

        Raises:
            CompatibilityError: Another attachment has it, or somebody else's hook.
        """

    @abstractmethod
    def connect(self, hook: CommHook | None) -> None:
        """Sends buckets to this hook from now on; with None, gives the place free: gradients are averaged again."""

    def keep_in_step(self, group: dist.ProcessGroup, tracked: Sequence[TrackedParameter]) -> Callable[[], None]:
        """Keeps replicated state equal where the host sets ranks equal by itself; returns what undoes this."""
        return lambda: None


class DDPHost(Host):
    """Stock DistributedDataParallel.

    Args:
        model: The DDP model, which may be compiled.

    Raises:
        CompatibilityError: It is none, or there is no process group.
    """

    def __init__(self, model: nn.Module) -> None:
        self._ddp = unwrap_ddp(model)
        self._slot: HookSlot | None = None
        self.process_group = self._ddp.process_group
        self.device = next(self._ddp.module.parameters()).device
        self.tracks_usage = bool(self._ddp.find_unused_parameters or self._ddp.static_graph)

    def parameters(self) -> dict[str, Tensor]:
        """See `Host.parameters`."""
        return synchronised_parameters(self._ddp)

    def claim(self) -> None:
        """See `Host.claim`."""
        self._slot = claim_slot(self._ddp)

    def connect(self, hook: CommHook | None) -> None:
        """See `Host.connect`."""
        assert self._slot is not None
        self._slot.hook = hook

    def keep_in_step(self, group: dist.ProcessGroup, tracked: Sequence[TrackedParameter]) -> Callable[[], None]:
        """See `Host.keep_in_step`: under `DDP.join()`, when the final model is sent."""
        return keep_decay_in_step(self._ddp, group, tracked)


class FeedHost(Host):
    """A system whose gradients are handed over by its own code: all of them with `exchange`, or buckets with `feed`.

    While nothing is attached gradients are averaged densely, as DDP's are.

    Args:
        parameters: Those that the system averages, by name, in an order that all ranks share.
        process_group: The ranks that it averages over.
        stands_for: See `Host.stands_for`.
        bucket_cap_mb: Size of the buckets of `exchange`, in MiB: smaller ones are sent while later ones are selected,
            larger ones make fewer collectives.

    Raises:
        CompatibilityError: A parameter is not floating point, or there is none.
        ConfigError: The size is not a positive number.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        process_group: dist.ProcessGroup,
        *,
        stands_for: Mapping[int, Sequence[Tensor]] | None = None,
        bucket_cap_mb: float = 25.0,
    ) -> None:
        check_number(
            "bucket_cap_mb", bucket_cap_mb, rule="a positive number of MiB", remedy="use 25", low=0.0, high=2048.0
        )
        if not parameters:
            raise CompatibilityError("attach needs parameters to synchronise, got none; thaw some of the model's")
        check_floating(parameters)
        self.process_group = process_group
        self.device = next(iter(parameters.values())).device
        self._parameters = dict(parameters)
        self._stands_for = dict(stands_for or {})
        self._cap_nbytes = bucket_cap_mb * 2**20
        self._hook: CommHook | None = None

    def parameters(self) -> dict[str, Tensor]:
        """See `Host.parameters`."""
        return dict(self._parameters)

    def stands_for(self) -> Mapping[int, Sequence[Tensor]]:
        """See `Host.stands_for`."""
        return self._stands_for

    def claim(self) -> None:
        """See `Host.claim`."""
        if self._hook is not None:
            raise CompatibilityError(
                "a host can have one attachment at a time, got a second attach; call detach() on the first"
            )

    def connect(self, hook: CommHook | None) -> None:
        """See `Host.connect`."""
        self._hook = hook

    def feed(self, bucket: Bucket) -> Future[Tensor]:
        """Hands one bucket over; the future holds its buffer with the update. All ranks, all buckets, in one order."""
        if self._hook is not None:
            return self._hook(bucket)
        buffer = bucket.buffer().mul_(1.0 / self.process_group.size())
        return all_reduce_sum(buffer, self.process_group).then(lambda done: (done.value(), buffer)[1])

    def exchange(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Replaces all gradients of a step by the update, in place. Collective.

        Args:
            parameters: Those that take part, the same on all ranks.
            gradients: For each of them this rank's gradient, of the parameter's shape, on its device.
        """
        on_their_way = []
        for number, part in enumerate(parts := self._parts(gradients)):
            bucket = FlatBucket(
                [parameters[i] for i in part],
                [gradients[i] for i in part],
                index=number,
                last=number == len(parts) - 1,
            )
            on_their_way.append((part, bucket, self.feed(bucket)))
        for part, bucket, future in on_their_way:
            future.wait()
            for i, update in zip(part, bucket.gradients(), strict=True):
                gradients[i].copy_(update)

    def _parts(self, gradients: Sequence[Tensor]) -> list[list[int]]:
        """The gradients of each bucket: consecutive ones of a dtype, up to the size of a bucket."""
        parts: dict[torch.dtype, list[list[int]]] = {}
        filled: dict[torch.dtype, int] = {}
        for i, gradient in enumerate(gradients):
            dtype, nbytes = gradient.dtype, gradient.numel() * gradient.element_size()
            if dtype not in parts or filled[dtype] + nbytes > self._cap_nbytes:
                parts.setdefault(dtype, []).append([])
                filled[dtype] = 0
            parts[dtype][-1].append(i)
            filled[dtype] += nbytes
        return [part for of_dtype in parts.values() for part in of_dtype]

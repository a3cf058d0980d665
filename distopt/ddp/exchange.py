"""One bucket through the network: select and encode, launch the collectives, decode into the bucket's buffer.

At most two collectives per bucket, of sizes known beforehand, launched from the hook in bucket order; the callback
behind them only computes. (A collective started or awaited inside a callback hangs or corrupts on gloo.)
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.profiler import record_function

from distopt import ops
from distopt.comm import all_gather, all_reduce_sum, await_at_exit
from distopt.compress import Header, round_to_wire
from distopt.ddp.bucket import Bucket
from distopt.ddp.parameters import shaped_like
from distopt.ddp.plan import BucketPlan
from distopt.ddp.statistics import Statistics
from distopt.errors import DesyncError, DistoptError


@dataclasses.dataclass(frozen=True)
class NonFiniteReport:
    """Where a gradient held NaN or Inf: rank and parameter name."""

    rank: int
    name: str


@dataclasses.dataclass(eq=False)
class _Departed:
    """What is on its way, and what is needed when it arrives."""

    gathered: Tensor | None = None
    reduced: Tensor | None = None
    whole_errors: dict[int, Tensor] = dataclasses.field(default_factory=dict)  # by position of the slot
    snapshots: dict[int, dict[str, Tensor]] = dataclasses.field(default_factory=dict)


class Exchange:
    """Carries buckets between the ranks of a group.

    Attributes:
        failure: The first thing that went wrong in a callback, to be raised where the user can catch it.
        nonfinite: Who reported a non-finite gradient in the step under way.
    """

    def __init__(self, group: dist.ProcessGroup, statistics: Statistics) -> None:
        self.failure: DistoptError | None = None
        self.nonfinite: list[NonFiniteReport] = []
        self._group = group
        self._statistics = statistics
        self._workspaces: dict[tuple[int, int], Tensor] = {}

    def start(
        self, bucket: Bucket, plan: BucketPlan, header: Header, *, unused: frozenset[int] = frozenset()
    ) -> Future[Tensor]:
        """Sends this rank's contribution; the future holds the bucket's buffer with the update in it.

        Args:
            bucket: Local gradients; the buffer is overwritten.
            plan: What to do with it; the same on every rank.
            header: This rank's status. With `nonfinite` set nothing of the gradient is used.
            unused: Positions of slots that this rank's backward pass did not reach.
        """
        departed = _Departed()
        began = time.perf_counter()
        with record_function("distopt::select"):
            if header.nonfinite:
                indices, values, dense = _contribute_nothing(plan, bucket.buffer())
            else:
                indices, values, dense = _contribute(plan, bucket.buffer(), unused, departed)
        self._statistics.add(
            seconds_selecting=time.perf_counter() - began,
            bytes_sent=plan.sent_bytes,
            bytes_dense=4 * plan.numel,
            link_bytes_sent=plan.link_bytes,
            link_bytes_dense=2 * (plan.num_ranks - 1) * 4 * plan.numel // plan.num_ranks,
            entries_sent=plan.count,
            buckets_sparse=bool(plan.count and not plan.selected_on_dense_wire),
            buckets_dense=not (plan.count and not plan.selected_on_dense_wire),
        )

        futures: list[Future[Any]] = []
        self._statistics.launched()
        with record_function("distopt::launch"):
            if plan.layout is not None:
                if plan.selected_on_dense_wire:
                    indices, values = indices[:0], values[:0]
                payload = plan.layout.pack(header, indices, values)
                departed.gathered, future = all_gather(payload, self._group)
                futures.append(future)
            if plan.dense_numel:
                departed.reduced = dense
                futures.append(all_reduce_sum(dense, self._group))

        def arrived(done: Future[list[Future[Any]]]) -> Tensor:
            self._statistics.landed()
            done.value()  # raises what a collective raised
            began = time.perf_counter()
            try:
                with record_function("distopt::decode"):
                    self._arrive(bucket, plan, header, departed)
            except DistoptError as error:
                # Raised at optimizer.step(): from here the user would see a bare RuntimeError.
                self.failure = self.failure or error
                bucket.buffer().zero_()
            self._statistics.add(seconds_decoding=time.perf_counter() - began)
            return bucket.buffer()

        await_at_exit(arrived)
        return torch.futures.collect_all(futures).then(arrived)

    def _arrive(self, bucket: Bucket, plan: BucketPlan, header: Header, departed: _Departed) -> None:
        """Decodes what all ranks sent, in rank order, so that every rank computes the same bits."""
        buffer = bucket.buffer()
        used, finite = self._read_headers(plan, header, departed.gathered)
        if not finite:  # of this bucket only: what becomes of the others must not depend on which one lands first
            buffer.zero_()
            return
        update = self._workspace(bucket, plan, buffer)
        if plan.count and not plan.selected_on_dense_wire:
            assert plan.layout is not None
            assert departed.gathered is not None
            update.zero_()
            for payload in departed.gathered:
                indices, values = plan.layout.unpack(payload)
                ops.scatter_add_(update, indices, values.to(update.dtype).mul_(1.0 / plan.num_ranks))
        if departed.reduced is not None:
            _settle(plan, departed.reduced, departed.whole_errors, update, used)
        for position, slot in enumerate(plan.slots):
            if not used[position]:
                slot.of(update).zero_()  # DDP leaves p.grad alone, but the buffer may be p.grad
                if position in departed.snapshots:
                    slot.tracked.memory.restore_(departed.snapshots[position])
            elif slot.tracked.decay is not None:
                # not the bucket's own view, which DDP makes row-major whatever order the memory is in
                parameter = slot.tracked.parameter.detach()
                slot.tracked.decay.apply_(slot.of(update), parameter, shaped_like(slot.of(update), parameter))
        if update is not buffer:
            buffer.copy_(update)

    def _read_headers(self, plan: BucketPlan, header: Header, gathered: Tensor | None) -> tuple[list[bool], bool]:
        """Checks that all ranks are in the same step.

        Returns which slots any rank's backward pass reached, and whether all gradients of the bucket are finite.
        """
        used = [True] * len(plan.slots)
        if plan.layout is None or gathered is None:
            return used, True
        headers = [plan.layout.unpack_header(payload) for payload in gathered]
        check_steps([other.step for other in headers], header.step)
        for rank, other in enumerate(headers):
            if other.nonfinite:
                self.nonfinite.append(NonFiniteReport(rank, plan.slots[other.nonfinite - 1].tracked.name))
        if plan.layout.num_flags:
            used = [any(flags) for flags in zip(*(other.used for other in headers), strict=True)]
        return used, not any(other.nonfinite for other in headers)

    def _workspace(self, bucket: Bucket, plan: BucketPlan, buffer: Tensor) -> Tensor:
        """Where the update is put together: the buffer, or for 16-bit buckets a float32 tensor that is reused."""
        if buffer.dtype.itemsize >= 4:
            return buffer
        key = (bucket.index(), plan.numel)
        if key not in self._workspaces:
            self._workspaces[key] = torch.empty(plan.numel, dtype=torch.float32, device=buffer.device)
        return self._workspaces[key]


def check_steps(steps: Sequence[int], own: int) -> None:
    """Raises `DesyncError` unless every rank (in rank order) is at this rank's step."""
    if any(step != own for step in steps):
        found = ", ".join(f"rank {rank} at {step}" for rank, step in enumerate(steps))
        raise DesyncError(
            f"the ranks are not in the same step ({found}); load the same checkpoint on every rank and call backward "
            "the same number of times"
        )


def _contribute(
    plan: BucketPlan, buffer: Tensor, unused: frozenset[int], departed: _Departed
) -> tuple[Tensor, Tensor, Tensor]:
    """What this rank sends: indices and values (count,), and the dense part. Takes the gradient into the memories."""
    departed.snapshots = {
        position: slot.tracked.memory.snapshot()
        for position, slot in enumerate(plan.slots)
        if position in unused and slot.k
    }
    indices, values = _select(plan, buffer)
    return indices, values, _dense_part(plan, buffer, indices, values, departed)


def _contribute_nothing(plan: BucketPlan, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same sizes, for a gradient that must not be used: adds nothing."""
    buffer.zero_()
    for slot in plan.sparse:
        slot.tracked.memory.sit_out_()
    indices, values = _nothing(plan, buffer)
    return indices, values, torch.zeros(plan.dense_numel, dtype=plan.dense_dtype, device=buffer.device)


def _select(plan: BucketPlan, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Indices into the bucket, ascending, int32, and values as they will be sent; shapes (count,)."""
    if not plan.count:
        return _nothing(plan, buffer)
    chosen = []
    for slot in plan.sparse:
        values, indices = slot.tracked.memory.select_(slot.of(buffer), slot.k)
        if not plan.selected_on_dense_wire:  # there the share of the average is rounded, later
            values, error = round_to_wire(values, plan.value_dtype)
            if error is not None:
                slot.tracked.memory.give_back_(indices, error)
        chosen.append((indices + slot.start, values))
    return torch.cat([indices for indices, _ in chosen]), torch.cat([values for _, values in chosen])


def _nothing(plan: BucketPlan, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros at the first positions: a contribution of the right size that adds nothing."""
    indices = torch.arange(plan.count, dtype=torch.int32, device=buffer.device)
    return indices, torch.zeros(plan.count, dtype=plan.value_dtype, device=buffer.device)


def _dense_part(plan: BucketPlan, buffer: Tensor, indices: Tensor, values: Tensor, departed: _Departed) -> Tensor:
    """What is all-reduced: this rank's share of the average, 1/N of its own values, in the wire's dtype."""
    share = 1.0 / plan.num_ranks
    parts = [tensor for slot in plan.whole for tensor in slot.tracked.memory.outgoing(slot.of(buffer))]
    in_place = len(parts) == len(plan.slots) and all(
        part.data_ptr() == slot.of(buffer).data_ptr() for part, slot in zip(parts, plan.slots, strict=True)
    )
    if in_place and plan.dense_dtype == buffer.dtype:
        return buffer.mul_(share)
    if plan.selected_on_dense_wire:
        scattered = torch.zeros(plan.numel, dtype=values.dtype, device=buffer.device)
        scattered[indices.long()] = values
        parts += [slot.of(scattered) for slot in plan.sparse]
    if not parts:
        return buffer[:0]
    whole = torch.cat([part.to(torch.promote_types(part.dtype, plan.dense_dtype)) for part in parts]).mul_(share)
    dense, error = round_to_wire(whole, plan.dense_dtype, summands=plan.num_ranks)
    if error is not None:
        _remember_errors(plan, error.mul_(plan.num_ranks), indices, departed)
    return dense


def _remember_errors(plan: BucketPlan, error: Tensor, indices: Tensor, departed: _Departed) -> None:
    """Hands rounding errors of the dense wire back: at once for selected entries, on arrival for whole tensors."""
    taken = 0
    for section in plan.dense_sections:
        slot, part = plan.slots[section.slot], error[section.start : section.stop]
        if slot.k:
            own = indices[taken : taken + slot.k] - slot.start
            slot.tracked.memory.give_back_(own, part[own.long()])
            taken += slot.k
        elif section.part == 0:
            departed.whole_errors[section.slot] = part


def _settle(
    plan: BucketPlan, reduced: Tensor, whole_errors: dict[int, Tensor], update: Tensor, used: list[bool]
) -> None:
    """Distributes the all-reduced tensor: momenta of whole tensors, and selected entries that came this way."""
    averaged: dict[int, list[Tensor]] = {}
    for section in plan.dense_sections:
        averaged.setdefault(section.slot, []).append(reduced[section.start : section.stop])
    for position, tensors in averaged.items():
        slot = plan.slots[position]
        if slot.k:
            slot.of(update).copy_(tensors[0])
        elif used[position]:
            settled = slot.tracked.memory.settle_(tensors, whole_errors.get(position))
            if settled.data_ptr() != slot.of(update).data_ptr():  # plain averaging works in place
                slot.of(update).copy_(settled)

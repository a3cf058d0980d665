"""What a rank contributes to the exchange of a bucket: selected entries, and its share of what is averaged densely."""

import dataclasses
from typing import Self

import torch
from torch import Tensor

from distopt import ops
from distopt.compress import round_to_wire
from distopt.ddp.groups import Group, Groups
from distopt.ddp.plan import BucketPlan


class NonFiniteSlotError(Exception):
    """NaN or Inf has turned up while a gradient was taken in; `position` is that of the slot in the bucket."""

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position


@dataclasses.dataclass(eq=False)
class Contribution:
    """What one rank sends of one bucket.

    Attributes:
        indices: Bucket positions of the selected entries, int32, ascending, shape (count,).
        values: Their values as they travel, shape (count,).
        dense: This rank's share of the all-reduce, shape (dense_numel,).
        whole_errors: By group: what rounding cut off from tensors sent whole.
    """

    indices: Tensor
    values: Tensor
    dense: Tensor
    whole_errors: dict[int, Tensor] = dataclasses.field(default_factory=dict)

    @classmethod
    def empty(cls, buffer: Tensor) -> Self:
        """No entry and no dense part."""
        return cls(buffer.new_empty(0, dtype=torch.int32), buffer.new_empty(0), buffer[:0])


def nothing(plan: BucketPlan, buffer: Tensor) -> Contribution:
    """A contribution of the right size that adds nothing, for a gradient that must not be used: it becomes zero."""
    buffer.zero_()
    for slot in plan.sparse:
        slot.tracked.memory.sit_out_()
    return Contribution(
        indices=torch.arange(plan.count, dtype=torch.int32, device=buffer.device),
        values=torch.zeros(plan.count, dtype=plan.value_dtype, device=buffer.device),
        dense=zeros_for_dense_part(plan, buffer),
    )


def zeros_for_dense_part(plan: BucketPlan, buffer: Tensor) -> Tensor:
    """A dense part that adds nothing."""
    return torch.zeros(plan.dense_numel, dtype=plan.dense_dtype, device=buffer.device)


def select(plan: BucketPlan, groups: Groups, gradients: Tensor, *, takes: bool = False) -> tuple[Tensor, Tensor]:
    """Takes the gradients in and takes out what is sent of the sparse slots.

    Args:
        plan: The bucket's.
        groups: Its memories.
        gradients: The bucket, shape (numel,).
        takes: Whether gradients are checked and left as zeros on the way (CPU only): it saves two passes over them.

    Returns:
        Bucket positions, int32, ascending, and the values as they travel; both of shape (count,).

    Raises:
        NonFiniteSlotError: With `takes`: a gradient is not finite.
    """
    chosen = []
    for group in groups.sparse:
        if takes:
            values, indices = take(plan, group, gradients, group.segments, group.count)
        else:
            values, indices = group.memory.select_(gradients, group.segments, group.count)
        if plan.route != "dense":  # there the share of the average is rounded, later
            values, error = round_to_wire(values, plan.value_dtype)
            if error is not None:
                group.memory.give_back_(group.to_memory(indices), error)
        group.note()
        chosen.append((indices, values))
    if len(chosen) == 1:
        return chosen[0]
    indices = torch.cat([indices for indices, _ in chosen])
    values = torch.cat([values for _, values in chosen])
    indices, order = indices.sort()  # the groups' slots may alternate, and index formats want ascending positions
    return indices, values[order]


def take(plan: BucketPlan, group: Group, gradients: Tensor, segments: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`Memory.take_` for a group; raises `NonFiniteSlotError` with the first of its slots that is not finite."""
    values, indices, bad = group.memory.take_(gradients, segments, count)
    number = int(bad)
    if number >= 0:
        raise NonFiniteSlotError(plan.slots.index(group.slots[number]))
    return values, indices


def add_dense_part(
    plan: BucketPlan, groups: Groups, buffer: Tensor, made: Contribution, *, checks: bool = False
) -> None:
    """Fills in what is all-reduced: this rank's share of the average, 1/N of its own values, in the wire's dtype.

    Raises:
        NonFiniteSlotError: With `checks`: a gradient that goes whole is not finite.
    """
    share = 1.0 / plan.num_ranks
    parts = [part for group in groups.whole for part in group.memory_now().outgoing(group.gather(buffer))]
    in_place = len(parts) == 1 and parts[0].data_ptr() == buffer.data_ptr() and parts[0].numel() == buffer.numel()
    if in_place and plan.dense_dtype == buffer.dtype:
        made.dense = buffer
        if not checks:
            buffer.mul_(share)
        elif not ops.scale_(buffer, share):
            _check_whole(plan, groups, buffer)
        return
    if plan.route == "dense":
        scattered = torch.zeros(plan.numel, dtype=made.values.dtype, device=buffer.device)
        scattered[made.indices.long()] = made.values
        parts += [group.gather(scattered) for group in groups.sparse]
    if not parts:
        return
    if checks:
        _check_whole(plan, groups, buffer)
    whole = torch.cat([part.to(torch.promote_types(part.dtype, plan.dense_dtype)) for part in parts]).mul_(share)
    made.dense, error = round_to_wire(whole, plan.dense_dtype, summands=plan.num_ranks)
    if error is not None:
        _remember_errors(plan, groups, error.mul_(plan.num_ranks), made)


def _check_whole(plan: BucketPlan, groups: Groups, buffer: Tensor) -> None:
    if all(ops.all_finite(group.gather(buffer)) for group in groups.whole):
        return
    for position, slot in enumerate(plan.slots):
        if not slot.k and not ops.all_finite(slot.of(buffer)):
            raise NonFiniteSlotError(position)


def _remember_errors(plan: BucketPlan, groups: Groups, error: Tensor, made: Contribution) -> None:
    """Hands rounding errors of the dense wire back: at once for selected entries, on arrival for whole tensors."""
    for section in plan.dense_sections:
        group, part = groups.all[section.group], error[section.start : section.stop]
        if group.count:
            own = _own_positions(group, made.indices)
            group.memory.give_back_(own, part[own])
        elif section.part == 0:
            made.whole_errors[section.group] = part


def _own_positions(group: Group, indices: Tensor) -> Tensor:
    """Those bucket positions that lie in this group's slots, as positions in its memory."""
    stops = torch.tensor([slot.stop for slot in group.slots], device=indices.device)
    starts = group.segments[:, 0].contiguous()
    at = torch.bucketize(indices, starts, right=True) - 1
    inside = (at >= 0) & (indices < stops[at.clamp(min=0)])
    return group.to_memory(indices[inside])

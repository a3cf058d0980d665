"""A bucket's landing: from what all ranks sent to the update in its buffer, the same bits on every rank."""

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from distopt import ops
from distopt.compress import Header
from distopt.ddp.groups import Group
from distopt.ddp.inflight import InFlight
from distopt.ddp.plan import BucketPlan, Slot
from distopt.errors import DesyncError
from distopt.ops.checks import is_dense_in_memory


@dataclasses.dataclass(frozen=True)
class NonFiniteReport:
    """Where a gradient held NaN or Inf: rank and parameter name."""

    rank: int
    name: str


def check_steps(steps: Sequence[int], own: int) -> None:
    """Raises `DesyncError` unless every rank (in rank order) is at this rank's step."""
    if any(step != own for step in steps):
        found = ", ".join(f"rank {rank} at {step}" for rank, step in enumerate(steps))
        raise DesyncError(
            f"the ranks are not in the same step ({found}); load the same checkpoint on every rank and call backward "
            "the same number of times"
        )


def nonfinite_reports(plan: BucketPlan, headers: Sequence[Header]) -> list[NonFiniteReport]:
    """Who found what was not finite in this bucket."""
    return [
        NonFiniteReport(rank, plan.slots[header.nonfinite - 1].tracked.name)
        for rank, header in enumerate(headers)
        if header.nonfinite
    ]


def unused_slots(plan: BucketPlan, headers: Sequence[Header]) -> frozenset[Slot]:
    """The slots that no rank's backward pass has reached."""
    if not headers or not headers[0].used:
        return frozenset()
    used = [any(flags) for flags in zip(*(header.used for header in headers), strict=True)]
    return frozenset(slot for slot, by_any in zip(plan.slots, used, strict=True) if not by_any)


def write_update(item: InFlight) -> None:
    """Puts the update together from what has arrived."""
    plan, update = item.plan, item.update
    unused = unused_slots(plan, item.headers)
    if item.arrived:
        item.clear_update()
        for indices, values in item.arrived:
            ops.scatter_add_(update, indices, values.to(update.dtype).mul_(1.0 / plan.num_ranks))
    if item.reduced is not None:
        _settle(item, item.reduced, update, unused)
    for slot in unused:
        slot.of(update).zero_()  # DDP leaves p.grad alone, but the buffer may be p.grad
        if slot in item.snapshots:
            slot.tracked.memory.restore_(item.snapshots[slot])
    for slots in plan.decayed:
        _decay([slot for slot in slots if slot not in unused] if unused else slots, update)


def _decay(slots: Sequence[Slot], update: Tensor) -> None:
    """Adds weight decay with the same settings to the updates of these slots."""
    decays = [slot.tracked.decay for slot in slots if slot.tracked.decay is not None]
    if not decays:
        return
    parameters = [slot.tracked.parameter for slot in slots]
    # the update of a parameter with gaps in memory is row-major, see shaped_like
    dense = [p if is_dense_in_memory(p) else p.contiguous() for p in parameters]
    rate, momentum, nesterov = decays[0].settings
    ops.decay_step_(
        update,
        [slot.start for slot in slots],
        [decay.buffer for decay in decays],
        dense,
        rate=rate,
        momentum=momentum,
        nesterov=nesterov,
    )


def _settle(item: InFlight, reduced: Tensor, update: Tensor, unused: frozenset[Slot]) -> None:
    """Distributes the all-reduced tensor: momenta of whole tensors, and selected entries that came this way."""
    assert item.contribution is not None
    averaged: dict[int, list[Tensor]] = {}
    for section in item.plan.dense_sections:
        averaged.setdefault(section.group, []).append(reduced[section.start : section.stop])
    for number, tensors in averaged.items():
        group = item.groups.all[number]
        error = item.contribution.whole_errors.get(number)
        if group.count:
            group.scatter_(update, tensors[0])
        elif unused.isdisjoint(group.slots):
            _settle_group(group, tensors, error, update)
        else:
            _settle_one_by_one(group, tensors, error, update, unused)


def _settle_group(group: Group, averaged: list[Tensor], error: Tensor | None, update: Tensor) -> None:
    group.scatter_(update, group.memory_now().settle_(averaged, error))
    group.note()


def _settle_one_by_one(
    group: Group, averaged: list[Tensor], error: Tensor | None, update: Tensor, unused: frozenset[Slot]
) -> None:
    """The same where some slots took no part on any rank: their memories stay as they are."""
    start = 0
    for slot in group.slots:
        own = slice(start, start + slot.numel)
        start += slot.numel
        if slot not in unused:
            tensors = [tensor[own] for tensor in averaged]
            settled = slot.tracked.memory.settle_(tensors, None if error is None else error[own])
            if settled.data_ptr() != slot.of(update).data_ptr():
                slot.of(update).copy_(settled)

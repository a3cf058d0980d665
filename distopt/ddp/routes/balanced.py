"""Two phases through owners: bytes per rank stay flat however many ranks there are, and no mass is lost.

The sparse entries of a bucket, taken as one vector V, are owned in turn: entry i by rank i mod N.

1. To every owner go the s largest of its entries of v (all-to-all, equal sizes). They leave v.
2. The owner adds up what came in, and sends the m largest sums to all (all-gather). What it drops it puts into its own
   v: the owner keeps, so that the sum over the ranks of updates and of v is what was put in, exactly.
3. u is masked only where this rank sent an entry and its owner passed it on.

s = ceil(k/N), m = ceil(4k/N). Two phases after each other: at few ranks it is slower than one all-gather.

Limits: selection is over the bucket, not per tensor (with N owners a small tensor has no k of its own), so the result
depends on what is in a bucket. DDP rebuilds its buckets behind the first step of a process: a run that was resumed then
goes on exactly, but not with the bits of the uninterrupted one (with find_unused_parameters it does: no rebuild).

Source: the balanced exchange of Li & Hoefler, *Near-Optimal Sparse Allreduce* (PPoPP 2022), with fixed sizes,
interleaved owners, and dropped sums kept by the owner instead of the sender.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from distopt import ops
from distopt.comm import Channels, all_gather, all_reduce_sum, all_to_all
from distopt.compress import Header, round_to_wire
from distopt.ddp.arrival import check_steps, nonfinite_reports, unused_slots
from distopt.ddp.contribution import Contribution, NonFiniteSlotError, add_dense_part, take, zeros_for_dense_part
from distopt.ddp.groups import Groups
from distopt.ddp.inflight import InFlight
from distopt.ddp.plan import Slot
from distopt.ddp.statistics import Statistics
from distopt.spans import span


def send(
    item: InFlight, channels: Channels, statistics: Statistics, land: Callable[[InFlight, Exception | None], None]
) -> None:
    """Launches the bucket. See `distopt.ddp.routes`."""
    plan = item.plan
    assert plan.layout is not None
    with statistics.selecting():
        indices, values = contribute(item)
    with statistics.launching():
        messages = plan.layout.pack(item.header, indices, values)
        averaged = None
        if plan.dense_numel:
            assert item.contribution is not None
            item.reduced = item.contribution.dense
            averaged = all_reduce_sum(item.reduced, channels.world)

    item.clear_update()  # nothing of the gradient is needed any more

    def phases() -> None:
        try:
            with span("ddp", "exchange"):
                _through_owners(item, channels, messages, indices)
                if averaged is not None:
                    averaged.wait()
        except Exception as error:
            land(item, error)
            return
        land(item, None)

    channels.worker.submit(phases)


def _through_owners(item: InFlight, channels: Channels, messages: Tensor, sent: Tensor) -> None:
    """The collectives of both phases."""
    assert channels.phased is not None
    received = all_to_all(messages, channels.phased)
    payload = pass_on(item, received, channels.world.rank())
    if payload is not None:
        gathered, done = all_gather(payload, channels.phased)
        done.wait()
        finish(item, gathered, sent)


def contribute(item: InFlight) -> tuple[Tensor, Tensor]:
    """Phase 1, sender: for each owner the largest entries of v leave it.

    Returns:
        Indices int32 that count an owner's entries, and values as they travel; both of shape (N, s).
    """
    plan, buffer, groups = item.plan, item.buffer, item.groups
    assert plan.layout is not None
    num_owners, share = plan.num_ranks, plan.layout.count
    item.contribution = Contribution.empty(buffer)
    for slot in plan.sparse:
        slot.tracked.memory.sit_out_()
    if not item.header.nonfinite:
        item.take_snapshots()
        try:
            _take_in(item)
        except NonFiniteSlotError as found:
            item.found_nonfinite(found.position)
    if item.header.nonfinite:
        buffer.zero_()
        item.contribution.dense = zeros_for_dense_part(plan, buffer)
        indices = torch.arange(share, dtype=torch.int32, device=buffer.device).repeat(num_owners, 1)
        return indices, torch.zeros((num_owners, share), dtype=plan.value_dtype, device=buffer.device)
    held = [group.memory.held() for group in groups.sparse]
    values, indices = ops.topk_abs_interleaved(held[0] if len(held) == 1 else torch.cat(held), share, num_owners)
    values, error = round_to_wire(values, plan.value_dtype)
    _put(groups, _compact(indices), torch.zeros_like(values) if error is None else error)
    return indices, values


def _take_in(item: InFlight) -> None:
    """Fills in the dense part, and takes the sparse slots' gradients into their memories."""
    plan, groups, buffer = item.plan, item.groups, item.buffer
    assert item.contribution is not None
    add_dense_part(plan, groups, buffer, item.contribution, checks=item.takes)
    for group in groups.sparse:
        if item.takes:
            take(plan, group, buffer, group.segments_of_nothing, 0)
        else:
            group.memory.select_(buffer, group.segments_of_nothing, 0)
    if item.takes:
        item.gradients_are_taken()


def pass_on(item: InFlight, received: Tensor, rank: int) -> Tensor | None:
    """Phases 1 and 2, owner: adds up what came in, keeps the small sums, and makes the payload with the large ones.

    Args:
        item: The bucket.
        received: The messages of all ranks, in rank order, uint8, shape (N, bytes).
        rank: Which owner this is.

    Returns:
        The payload, uint8, 1-D, or None if some rank's gradient was not finite: all ranks see that, and stop here.

    Raises:
        DesyncError: The ranks are not in the same step.
    """
    plan, groups = item.plan, item.groups
    assert plan.layout is not None
    assert plan.returned is not None
    item.headers = [plan.layout.unpack_header(message) for message in received]
    check_steps([header.step for header in item.headers], item.header.step)
    if nonfinite_reports(plan, item.headers):
        return None
    owned = torch.zeros(
        -(-(plan.sparse_numel - rank) // plan.num_ranks),
        dtype=torch.promote_types(plan.value_dtype, torch.float32),
        device=received.device,
    )
    for indices, values in zip(*plan.layout.unpack(received), strict=True):
        ops.scatter_add_(owned, indices.contiguous(), values.contiguous())
    for begin, end in _compact_ranges(groups, unused_slots(plan, item.headers)):
        owned[_first_owned(begin, rank, plan.num_ranks) : _first_owned(end, rank, plan.num_ranks)] = 0
    largest, at = ops.topk_abs(owned, plan.returned.count)
    values, error = round_to_wire(largest, plan.value_dtype)
    owned[at.long()] = 0 if error is None else error
    _keep(groups, owned, rank, plan.num_ranks)
    return plan.returned.pack(Header(step=item.header.step), at, values)


def finish(item: InFlight, gathered: Tensor, sent: Tensor) -> None:
    """Phase 3: forgets momentum only where an entry of this rank has got through, and hands the sums to the decoder.

    Args:
        item: The bucket.
        gathered: The payloads of all owners, uint8, shape (N, bytes).
        sent: The indices that `contribute` returned.
    """
    assert item.plan.returned is not None
    indices, values = item.plan.returned.unpack(gathered)
    updated, mine = _compact(indices), _compact(sent)
    _mask(item.groups, mine[torch.isin(mine, updated)])
    in_bucket = item.groups.compact_to_bucket(updated.view(-1)).to(torch.int32)
    item.arrived = [(in_bucket, values.reshape(-1).contiguous())]  # of one entry per owner reshape makes a view


def _compact(indices: Tensor) -> Tensor:
    """Positions (N, n) that count the entries of owner 0, 1, ... as compact positions, int64."""
    num_owners = len(indices)
    owners = torch.arange(num_owners, device=indices.device).unsqueeze(1)
    return indices.long() * num_owners + owners


def _first_owned(position: int, owner: int, num_owners: int) -> int:
    """How many entries before a compact position are this owner's."""
    return max(0, -(-(position - owner) // num_owners))


def _compact_ranges(groups: Groups, slots: frozenset[Slot]) -> list[tuple[int, int]]:
    """Where these slots lie in compact positions."""
    ranges = []
    for group, start in groups.parts():
        for slot in group.slots:
            if slot in slots:
                ranges.append((start, start + slot.numel))
            start += slot.numel
    return ranges


def _put(groups: Groups, positions: Tensor, values: Tensor) -> None:
    """Overwrites what is held at compact positions."""
    positions, values = positions.view(-1), values.view(-1)
    for group, start in groups.parts():
        held = group.memory.held()
        here = (positions >= start) & (positions < start + group.numel)
        held[positions[here] - start] = values[here].to(held.dtype)


def _mask(groups: Groups, positions: Tensor) -> None:
    """Forgets the momentum at compact positions."""
    for group, start in groups.parts():
        group.memory.mask_(positions[(positions >= start) & (positions < start + group.numel)] - start)


def _keep(groups: Groups, owned: Tensor, owner: int, num_owners: int) -> None:
    """Adds to what is held the sums that this owner dropped."""
    for group, start in groups.parts():
        first, last = (_first_owned(p, owner, num_owners) for p in (start, start + group.numel))
        offset = first * num_owners + owner - start
        held = group.memory.held()[offset::num_owners]
        held.add_(owned[first:last])

"""What happens to one bucket in one step: who is sent sparse, who whole, in which formats and by which exchange.

A plan is a pure function of facts that all ranks share (parameters, densities, number of ranks, the agreed link), so
every rank launches the same collectives with the same sizes without asking.

Words: a parameter is *sparse* if k of its entries are selected in this step, else it is sent *whole*. Whole parameters
travel by all-reduce, or with the selected entries where they are few; that is the *dense part*. Selected entries travel
by the plan's *route*: all-gathered, balanced over owners, hierarchically over nodes, or scattered into zeros and
all-reduced too (the *dense wire*).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from distopt.comm import Place
from distopt.compress import (
    PayloadLayout,
    allgather_bytes,
    allreduce_bytes,
    alltoall_bytes,
    balanced_shares,
)
from distopt.ddp.parameters import LARGEST_INDEX, TrackedParameter, num_selected
from distopt.ddp.policy import Routing, WirePolicy
from distopt.errors import CompatibilityError

# Another route must save this much: less is lost in the noise of what was measured, and changing back costs a flush.
WORTH_S = 5e-4


# A dense part of so few bytes on the link travels with the selected entries: a second collective costs more.
SMALL_NBYTES = 1 << 16


@dataclasses.dataclass(eq=False, slots=True)
class Slot:
    """A parameter's place in a bucket.

    Attributes:
        tracked: The parameter.
        start: Its first entry in the flat bucket.
        stop: Behind its last entry.
        k: How many entries are selected from it; 0 sends it whole.
        num_outgoing: Tensors averaged when it is sent whole: a memory that held back sends two, once.
    """

    tracked: TrackedParameter
    start: int
    stop: int
    k: int
    num_outgoing: int

    @property
    def numel(self) -> int:
        """Entries of the parameter."""
        return self.stop - self.start

    def of(self, flat: Tensor) -> Tensor:
        """This parameter's part of a flat bucket, shape (numel,)."""
        return flat[self.start : self.stop]


@dataclasses.dataclass(frozen=True, slots=True)
class DenseSection:
    """Where one tensor of one group of slots lies in the all-reduce; `part` counts the group's tensors."""

    group: int
    part: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class BucketPlan:
    """The slots of a bucket and the collectives that carry it.

    Attributes:
        slots: All parameters, in the buffer's order.
        route: How selected entries travel: "allgather", "balanced", "hierarchical", "dense"; "whole" if there are none.
        layout: Of the payload that is exchanged first, with this rank's status; None if there is none.
        returned: Of the second payload: what an owner ("balanced") or a node's leader ("hierarchical") sends.
        value_dtype: Dtype of selected values on the wire.
        dense_dtype: Dtype of the all-reduce.
        place: Where this rank stands among the others.
        predicted_s: Seconds that the exchange was expected to take when the route was chosen; NaN if it was given.
    """

    slots: tuple[Slot, ...]
    route: str
    layout: PayloadLayout | None
    returned: PayloadLayout | None
    value_dtype: torch.dtype
    dense_dtype: torch.dtype
    place: Place
    predicted_s: float = math.nan

    def takes_gradients(self, device: torch.device) -> bool:
        """Whether the pass that takes the gradients in also checks them, and clears those that only this rank uses."""
        checks = self.route in ("allgather", "balanced") or (self.route == "whole" and self.layout is not None)
        return checks and device.type == "cpu"

    @property
    def num_ranks(self) -> int:
        """Ranks in the exchange."""
        return self.place.num_ranks

    @cached_property
    def numel(self) -> int:
        """Entries of the bucket."""
        return self.slots[-1].stop

    @cached_property
    def sparse(self) -> tuple[Slot, ...]:
        """The slots of which k entries are selected."""
        return tuple(slot for slot in self.slots if slot.k)

    @cached_property
    def whole(self) -> tuple[Slot, ...]:
        """The slots that are sent whole."""
        return tuple(slot for slot in self.slots if not slot.k)

    @cached_property
    def decayed(self) -> tuple[tuple[Slot, ...], ...]:
        """The slots whose weight decay has a momentum of its own, those with equal settings together."""
        found: dict[object, list[Slot]] = {}
        for slot in self.slots:
            if slot.tracked.decay is not None and not slot.tracked.late:
                found.setdefault(slot.tracked.decay.settings, []).append(slot)
        return tuple(tuple(slots) for slots in found.values())

    @cached_property
    def decayed_locally(self) -> tuple[Slot, ...]:
        """The slots whose weight decay is added to the local gradient."""
        return tuple(slot for slot in self.slots if slot.tracked.local_decay)

    @cached_property
    def count(self) -> int:
        """Entries selected in the bucket."""
        return sum(slot.k for slot in self.sparse)

    @cached_property
    def sparse_numel(self) -> int:
        """Entries that they are selected from."""
        return sum(slot.numel for slot in self.sparse)

    @cached_property
    def groups(self) -> tuple[tuple[Slot, ...], ...]:
        """The slots by fate (whole or sparse) and kind of memory: each group is handled in one call."""
        found: dict[tuple[object, ...], list[Slot]] = {}
        for slot in self.slots:
            found.setdefault((bool(slot.k), slot.tracked.memory.kind(with_v=self.keeps_of(slot))), []).append(slot)
        return tuple(tuple(slots) for slots in found.values())

    def keeps_of(self, slot: Slot) -> bool:
        """Whether something of this slot's gradient may stay behind: unsent entries, or what a 16-bit wire cuts off."""
        return bool(slot.k) or self.dense_dtype.itemsize < torch.float32.itemsize

    @cached_property
    def dense_sections(self) -> tuple[DenseSection, ...]:
        """What the all-reduce carries, in its order: the slots sent whole, then selected ones that go this way."""
        owners = [(i, part) for i, g in enumerate(self.groups) if not g[0].k for part in range(g[0].num_outgoing)]
        if self.route == "dense":
            owners += [(i, 0) for i, group in enumerate(self.groups) if group[0].k]
        sections = []
        position = 0
        for i, part in owners:
            numel = sum(slot.numel for slot in self.groups[i])
            sections.append(DenseSection(i, part, position, position + numel))
            position += numel
        return tuple(sections)

    @cached_property
    def dense_numel(self) -> int:
        """Entries of the dense part."""
        return self.dense_sections[-1].stop if self.dense_sections else 0

    @property
    def is_reduced(self) -> bool:
        """Whether there is an all-reduce: a dense part that does not travel with the selected entries."""
        return bool(self.dense_numel) and not (self.layout and self.layout.num_dense)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the all-reduce's tensor."""
        return self.dense_numel * self.dense_dtype.itemsize if self.is_reduced else 0

    @cached_property
    def sent_bytes(self) -> int:
        """Bytes that this rank encodes: payloads with headers, and the dense part."""
        first = self.layout.nbytes if self.layout else 0
        second = self.returned.nbytes if self.returned else 0
        if self.route == "balanced":
            first *= self.num_ranks
        if self.route == "hierarchical" and not self.place.leads:
            second = 0
        return first + second + self.dense_nbytes

    @cached_property
    def link_bytes(self) -> int:
        """Bytes that this rank's collectives put on the link (between nodes, if the route knows nodes)."""
        first = self.layout.nbytes if self.layout else 0
        second = self.returned.nbytes if self.returned else 0
        n, nodes = self.num_ranks, self.place.num_nodes
        if self.route == "balanced":
            return alltoall_bytes(n, first) + allgather_bytes(n, second) + allreduce_bytes(n, self.dense_nbytes)
        if self.route == "hierarchical":
            leading = allgather_bytes(nodes, second) + allreduce_bytes(nodes, self.dense_nbytes)
            return allgather_bytes(n, first) + (leading if self.place.leads else 0)
        return allgather_bytes(n, first) + allreduce_bytes(n, self.dense_nbytes)

    @cached_property
    def node_bytes(self) -> int:
        """Bytes that this rank sends inside its node: its gradient to the leader, or from the leader what arrived."""
        if self.route != "hierarchical":
            return 0
        assert self.returned is not None
        if self.place.leads:
            return (self.place.node_size - 1) * (self.place.num_nodes * self.returned.nbytes + self.dense_nbytes)
        return self.numel * torch.float32.itemsize + self.dense_nbytes


def plan_bucket(
    tracked: Sequence[TrackedParameter],
    bucket_dtype: torch.dtype,
    density_of: Callable[[TrackedParameter], float],
    policy: WirePolicy,
    routing: Routing,
) -> BucketPlan:
    """The plan for a bucket that holds these parameters in this order.

    Args:
        tracked: The bucket's parameters.
        bucket_dtype: Dtype of its buffer.
        density_of: The density of a parameter in this step; 1.0 sends it whole.
        policy: In which formats entries travel.
        routing: On which routes.

    Raises:
        CompatibilityError: Positions in the bucket do not fit 32 bits.
    """
    place = routing.place
    densities = [density_of(entry) for entry in tracked]
    slots = _slots(tracked, densities)
    if not any(slot.k for slot in slots):
        return _on_route("whole", slots, bucket_dtype, policy, place)
    candidates = []
    for route in routing.routes:
        if route == "whole":
            all_whole = _slots(tracked, [1.0] * len(tracked))
            candidates.append(_on_route(route, all_whole, bucket_dtype, policy, place))
            if policy.value_dtype is not None and policy.value_dtype.itemsize < bucket_dtype.itemsize:
                full = dataclasses.replace(policy, value_dtype=torch.float32)
                candidates.append(_on_route(route, all_whole, bucket_dtype, full, place))
        else:
            candidates.append(_on_route(route, slots, bucket_dtype, policy, place))
    if routing.predict is None:
        return candidates[0]
    usual, *others = (dataclasses.replace(plan, predicted_s=routing.predict(plan)) for plan in candidates)
    best = min(others, key=lambda plan: plan.predicted_s, default=usual)
    return best if best.predicted_s < usual.predicted_s - WORTH_S else usual


def _slots(tracked: Sequence[TrackedParameter], densities: Sequence[float]) -> tuple[Slot, ...]:
    slots = []
    position = 0
    for entry, density in zip(tracked, densities, strict=True):
        numel = entry.parameter.numel()
        k = num_selected(numel, density) if density < 1.0 and numel else 0
        # Selecting everything would mask all momentum; a tensor that is sent whole keeps it.
        k = 0 if k == numel else k
        slots.append(Slot(entry, position, position + numel, k, entry.memory.num_outgoing))
        position += numel
    if position > LARGEST_INDEX and any(slot.k for slot in slots):
        raise CompatibilityError(
            f"a bucket can have at most {LARGEST_INDEX} entries, got {position}; use a smaller bucket_cap_mb in "
            "DistributedDataParallel"
        )
    return tuple(slots)


def _on_route(
    route: str, slots: tuple[Slot, ...], bucket_dtype: torch.dtype, policy: WirePolicy, place: Place
) -> BucketPlan:
    """The plan on this route, or on the all-gather where some rank would own nothing of a small bucket."""
    value_dtype, dense_dtype = _wire_dtypes(bucket_dtype, policy.value_dtype, slots)

    def layout(numel: int, count: int, *, with_status: bool = True) -> PayloadLayout:
        return PayloadLayout(
            numel=numel,
            count=count,
            num_flags=len(slots) if with_status and policy.with_used_flags else 0,
            value_dtype=value_dtype,
            index_format=policy.index_format,
        )

    numel, count = slots[-1].stop, sum(slot.k for slot in slots)
    first: PayloadLayout | None = layout(numel, 0)
    second = None
    if route == "balanced":
        owned = -(-sum(slot.numel for slot in slots if slot.k) // place.num_ranks)
        sent, returned = balanced_shares(sum(slot.numel for slot in slots if slot.k), count, place.num_ranks)
        first, second = layout(owned, sent), layout(owned, returned, with_status=False)
        if not sent:
            route = "allgather"
    if route == "hierarchical":
        second = layout(numel, count, with_status=False)
    elif route == "allgather":
        first, second = layout(numel, count), None
        num_dense = sum(slot.numel * slot.num_outgoing for slot in slots if not slot.k)
        if (place.num_ranks - 1) * num_dense * dense_dtype.itemsize <= SMALL_NBYTES:
            first = dataclasses.replace(first, num_dense=num_dense, dense_dtype=dense_dtype)
    elif route == "whole" and not policy.with_status:
        first = None
    return BucketPlan(
        slots=slots,
        route=route,
        layout=first,
        returned=second,
        value_dtype=dense_dtype if route == "dense" else value_dtype,
        dense_dtype=dense_dtype,
        place=place,
    )


def _wire_dtypes(
    bucket: torch.dtype, chosen: torch.dtype | None, slots: Sequence[Slot]
) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of selected values and of the all-reduce."""
    full = torch.promote_types(bucket, torch.float32)
    if chosen is None or chosen == torch.float32:  # full precision: float64 models keep theirs
        value, dense = full, bucket
    else:
        value = chosen
        dense = chosen if chosen.itemsize < bucket.itemsize else bucket
    catching_up = any(not slot.k and slot.num_outgoing > 1 for slot in slots)
    return value, full if catching_up else dense

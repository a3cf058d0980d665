"""What happens to one bucket in one step: who is sent sparse, who whole, in which formats and on which wire.

A plan is a pure function of facts that all ranks share (parameters, densities, number of ranks), so every rank launches
the same collectives with the same sizes without asking.

Words: a parameter is *sparse* if k of its entries are selected in this step, else it is sent *whole*. Whole parameters
travel by all-reduce; selected entries by all-gather (the *sparse wire*) or, where that takes fewer bytes, scattered
into zeros and all-reduced too (the *dense wire*). What the all-reduce carries is the bucket's *dense part*.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from distopt.compress import PayloadLayout, allgather_bytes, allreduce_bytes, sparse_is_cheaper
from distopt.ddp.parameters import LARGEST_INDEX, TrackedParameter, num_selected
from distopt.ddp.policy import WirePolicy
from distopt.errors import CompatibilityError


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

    def of(self, flat: Tensor) -> Tensor:
        """This parameter's part of a flat bucket, shape (numel,)."""
        return flat[self.start : self.stop]


@dataclasses.dataclass(frozen=True, slots=True)
class DenseSection:
    """Where one tensor of one slot lies in the all-reduce: entries start to stop; `part` counts the slot's tensors."""

    slot: int
    part: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class BucketPlan:
    """The slots of a bucket and the collectives that carry it.

    Attributes:
        slots: All parameters, in the buffer's order.
        layout: Of the payload that is all-gathered, or None if there is none.
        value_dtype: Dtype of selected values on the wire.
        dense_dtype: Dtype of the all-reduce.
        selected_on_dense_wire: Whether selected entries travel scattered into zeros instead of with their positions.
        num_ranks: Ranks in the exchange.
    """

    slots: tuple[Slot, ...]
    layout: PayloadLayout | None
    value_dtype: torch.dtype
    dense_dtype: torch.dtype
    selected_on_dense_wire: bool
    num_ranks: int

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
    def count(self) -> int:
        """Entries selected in the bucket."""
        return sum(slot.k for slot in self.sparse)

    @cached_property
    def dense_sections(self) -> tuple[DenseSection, ...]:
        """What the all-reduce carries, in its order: the slots sent whole, then selected ones that go this way."""
        owners = [(i, part) for i, slot in enumerate(self.slots) if not slot.k for part in range(slot.num_outgoing)]
        if self.selected_on_dense_wire:
            owners += [(i, 0) for i, slot in enumerate(self.slots) if slot.k]
        sections = []
        position = 0
        for i, part in owners:
            numel = self.slots[i].stop - self.slots[i].start
            sections.append(DenseSection(i, part, position, position + numel))
            position += numel
        return tuple(sections)

    @cached_property
    def dense_numel(self) -> int:
        """Entries of the all-reduce."""
        return self.dense_sections[-1].stop if self.dense_sections else 0

    @cached_property
    def sent_bytes(self) -> int:
        """Bytes that this rank encodes: payload with header, and the dense part."""
        return (self.layout.nbytes if self.layout else 0) + self.dense_numel * self.dense_dtype.itemsize

    @cached_property
    def link_bytes(self) -> int:
        """Bytes that this rank's collectives put on the link."""
        gathered = allgather_bytes(self.num_ranks, self.layout.nbytes) if self.layout else 0
        return gathered + allreduce_bytes(self.num_ranks, self.dense_numel * self.dense_dtype.itemsize)


def plan_bucket(
    tracked: Sequence[TrackedParameter],
    bucket_dtype: torch.dtype,
    density_of: Callable[[TrackedParameter], float],
    policy: WirePolicy,
    num_ranks: int,
) -> BucketPlan:
    """The plan for a bucket that holds these parameters in this order.

    Args:
        tracked: The bucket's parameters.
        bucket_dtype: Dtype of its buffer.
        density_of: The density of a parameter in this step; 1.0 sends it whole.
        policy: How entries travel.
        num_ranks: Ranks in the exchange.

    Raises:
        CompatibilityError: Positions in the bucket do not fit 32 bits.
    """
    slots = []
    position = 0
    for entry in tracked:
        numel = entry.parameter.numel()
        density = density_of(entry)
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
    value_dtype, dense_dtype = _wire_dtypes(bucket_dtype, policy.value_dtype, slots)
    num_flags = len(slots) if policy.with_used_flags else 0

    def layout(count: int) -> PayloadLayout:
        return PayloadLayout(
            numel=position,
            count=count,
            num_flags=num_flags,
            value_dtype=value_dtype,
            index_format=policy.index_format,
        )

    count = sum(slot.k for slot in slots)
    dense_nbytes = sum(slot.stop - slot.start for slot in slots if slot.k) * dense_dtype.itemsize
    on_dense_wire = bool(count) and (
        policy.choice == "dense"
        or (policy.choice == "auto" and not sparse_is_cheaper(num_ranks, layout(count).nbytes, dense_nbytes))
    )
    gathers = bool(count) or policy.with_status
    return BucketPlan(
        slots=tuple(slots),
        layout=layout(0 if on_dense_wire else count) if gathers else None,
        value_dtype=dense_dtype if on_dense_wire else value_dtype,
        dense_dtype=dense_dtype,
        selected_on_dense_wire=on_dense_wire,
        num_ranks=num_ranks,
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

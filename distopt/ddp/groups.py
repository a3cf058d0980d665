"""The memories of a bucket's parameters, joined so that one call serves all of a kind: no Python per tensor.

Positions. *Bucket* positions count the entries of the flat bucket. *Compact* positions count only those of the sparse
slots, group by group, as their joined memories hold them.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from distopt.ddp.memory import Memory
from distopt.ddp.plan import BucketPlan, Slot


class Group:
    """Slots of one bucket that share a fate and a kind of memory.

    Args:
        slots: In the bucket's order.
        memory: The joined one.
        device: Where the bucket lives.
    """

    def __init__(self, slots: Sequence[Slot], memory: Memory, device: torch.device) -> None:
        self.slots = tuple(slots)
        self.memory = memory
        self.numel = sum(slot.numel for slot in slots)
        self.count = sum(slot.k for slot in slots)
        self._device = device
        self._is_one_stretch = slots[-1].stop - slots[0].start == self.numel

    def memory_now(self) -> Memory:
        """The joined memory, with what the slots' own have noted since."""
        own = self.slots[0].tracked.memory
        self.memory.holds_back, self.memory.owes, self.memory.pending = own.holds_back, own.owes, own.pending
        return self.memory

    def note(self) -> None:
        """Lets the slots' own memories know what the joined one has noted."""
        noted, own = self.memory, self.slots[0].tracked.memory
        found = (noted.holds_back, noted.owes, noted.pending)
        if found != (own.holds_back, own.owes, own.pending):
            for slot in self.slots:
                memory = slot.tracked.memory
                memory.holds_back, memory.owes, memory.pending = found

    @cached_property
    def segments(self) -> Tensor:
        """The table for `Memory.select_`."""
        return torch.tensor([(slot.start, slot.numel, slot.k) for slot in self.slots], device=self._device)

    @cached_property
    def segments_of_nothing(self) -> Tensor:
        """The same with k = 0: only takes the gradient in."""
        return torch.tensor([(slot.start, slot.numel, 0) for slot in self.slots], device=self._device)

    @cached_property
    def _starts(self) -> tuple[Tensor, Tensor]:
        """Where each slot begins in the bucket and in the joined memory."""
        in_bucket = torch.tensor([slot.start for slot in self.slots], device=self._device)
        numels = torch.tensor([slot.numel for slot in self.slots], device=self._device)
        return in_bucket, numels.cumsum(0) - numels

    def to_memory(self, positions: Tensor) -> Tensor:
        """Bucket positions (of this group) as positions in the joined memory, int64."""
        in_bucket, in_memory = self._starts
        at = torch.bucketize(positions, in_bucket, right=True) - 1
        return positions - (in_bucket - in_memory)[at]

    def to_bucket(self, positions: Tensor) -> Tensor:
        """Positions in the joined memory as bucket positions, int64."""
        in_bucket, in_memory = self._starts
        at = torch.bucketize(positions, in_memory, right=True) - 1
        return positions + (in_bucket - in_memory)[at]

    def gather(self, flat: Tensor) -> Tensor:
        """This group's part of a flat bucket, shape (numel,): a view where it is one stretch."""
        if self._is_one_stretch:
            return flat[self.slots[0].start : self.slots[-1].stop]
        return torch.cat([slot.of(flat) for slot in self.slots])

    def scatter_(self, flat: Tensor, values: Tensor) -> None:
        """Writes values of shape (numel,) to this group's part of a flat bucket."""
        if self._is_one_stretch:
            target = flat[self.slots[0].start : self.slots[-1].stop]
            if target.data_ptr() != values.data_ptr():  # plain averaging works in place
                target.copy_(values)
            return
        parts = values.split([slot.numel for slot in self.slots])
        torch._foreach_copy_([slot.of(flat) for slot in self.slots], list(parts))


class Groups:
    """All groups of a bucket.

    Args:
        plan: The bucket's.
        device: Where the bucket lives.

    Attributes:
        sparse: Of the slots of which entries are selected.
        whole: Of the others.
        moved: Whether tensors of memories were moved: groups made before are no longer joined.
    """

    def __init__(self, plan: BucketPlan, device: torch.device) -> None:
        self.moved = False
        self.all: list[Group] = []
        for slots in plan.groups:
            memories = [slot.tracked.memory for slot in slots]
            memory, moved = type(memories[0]).joined(memories, with_v=plan.keeps_of(slots[0]))
            self.moved |= moved
            self.all.append(Group(slots, memory, device))
        self.sparse = [group for group in self.all if group.count]
        self.whole = [group for group in self.all if not group.count]

    @cached_property
    def _compact_starts(self) -> list[int]:
        starts = [0]
        for group in self.sparse:
            starts.append(starts[-1] + group.numel)
        return starts

    def parts(self) -> list[tuple[Group, int]]:
        """The sparse groups with the compact position at which each begins."""
        return list(zip(self.sparse, self._compact_starts[:-1], strict=True))

    def compact_to_bucket(self, positions: Tensor) -> Tensor:
        """Compact positions as bucket positions, int64, of the same shape."""
        if len(self.sparse) == 1:
            return self.sparse[0].to_bucket(positions)
        found = torch.empty_like(positions, dtype=torch.int64)
        for group, start in self.parts():
            here = (positions >= start) & (positions < start + group.numel)
            found[here] = group.to_bucket(positions[here] - start)
        return found

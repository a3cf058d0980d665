"""Formats for the positions of sent entries. Every format has a fixed size, known from (numel, count) alone.

`int32` is the plain position. `block16` cuts the tensor into blocks of 65,536 entries and sends how many entries lie in
each block and, per entry, its 16-bit offset there: half the bytes, nothing lost. `elias-fano` (in a module of its own)
takes close to the fewest bits there can be.

All of it also works on rows: dimensions before the last one are those of several sets of positions.

Limits: positions are ascending; numel is at most 2**31 - 1.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from distopt.errors import DecodeError


class IndexFormat(ABC):
    """Contract: `decode(encode(indices, numel), numel, count) == indices`, in exactly `sections(numel, count)`."""

    @abstractmethod
    def sections(self, numel: int, count: int) -> tuple[tuple[torch.dtype, int], ...]:
        """Dtype and length of each tensor that `encode` makes."""

    @abstractmethod
    def encode(self, indices: Tensor, numel: int) -> tuple[Tensor, ...]:
        """The sections for ascending int32 indices, shape (..., count), each in [0, numel)."""

    @abstractmethod
    def decode(self, sections: tuple[Tensor, ...], numel: int, count: int) -> Tensor:
        """The int32 indices, shape (..., count). Raises `DecodeError` if the sections contradict each other."""

    def nbytes(self, numel: int, count: int) -> int:
        """Bytes that `count` positions in a tensor of `numel` entries take."""
        return sum(dtype.itemsize * length for dtype, length in self.sections(numel, count))


class Int32(IndexFormat):
    """Four bytes per position."""

    def sections(self, numel: int, count: int) -> tuple[tuple[torch.dtype, int], ...]:
        """See `IndexFormat.sections`."""
        return ((torch.int32, count),)

    def encode(self, indices: Tensor, numel: int) -> tuple[Tensor, ...]:
        """See `IndexFormat.encode`."""
        return (indices,)

    def decode(self, sections: tuple[Tensor, ...], numel: int, count: int) -> Tensor:
        """See `IndexFormat.decode`."""
        return sections[0]


class Block16(IndexFormat):
    """Two bytes per position and two or four per block of 65,536 entries."""

    BLOCK = 1 << 16

    def sections(self, numel: int, count: int) -> tuple[tuple[torch.dtype, int], ...]:
        """See `IndexFormat.sections`."""
        blocks = -(-numel // self.BLOCK)
        # A block's number of entries fits 16 bits unless that many entries are sent at all.
        counts_dtype = torch.int16 if count < self.BLOCK else torch.int32
        return ((counts_dtype, blocks), (torch.int16, count))

    def encode(self, indices: Tensor, numel: int) -> tuple[Tensor, ...]:
        """See `IndexFormat.encode`."""
        (counts_dtype, blocks), (offset_dtype, _) = self.sections(numel, indices.shape[-1])
        rows = torch.atleast_2d(indices).flatten(end_dim=-2)
        first_block = torch.arange(len(rows), dtype=torch.int32, device=rows.device).mul_(blocks).unsqueeze(1)
        counts = torch.bincount(((rows >> 16) + first_block).view(-1), minlength=len(rows) * blocks)
        counts = counts.view(*indices.shape[:-1], blocks)
        return counts.to(counts_dtype), (indices & 0xFFFF).to(offset_dtype)

    def decode(self, sections: tuple[Tensor, ...], numel: int, count: int) -> Tensor:
        """See `IndexFormat.decode`."""
        counts, offsets = sections
        if counts.dtype == torch.int16:  # torch has no 16-bit unsigned arithmetic: undo the sign
            counts = counts.to(torch.int32) & 0xFFFF
        counts = torch.atleast_2d(counts).flatten(end_dim=-2)
        totals = counts.sum(dim=1)
        if bool((totals != offsets.shape[-1]).any()) or bool((counts < 0).any()):
            raise DecodeError(
                f"the blocks announce {', '.join(map(str, totals.tolist()))} entries and {offsets.shape[-1]} arrived; "
                "the payload was damaged or was encoded with other settings"
            )
        block_starts = torch.arange(counts.shape[1], dtype=torch.int32, device=counts.device) << 16
        starts = torch.repeat_interleave(
            block_starts.repeat(len(counts)), counts.view(-1), output_size=offsets.numel()
        ).view(offsets.shape)
        return starts | (offsets.to(torch.int32) & 0xFFFF)

"""The largest entries of each chunk of a flat tensor as one byte tensor of a size that is known beforehand.

A chunk is a run of elements of one parameter; the last one of a parameter may be shorter and sends fewer entries.
Chunks of equal length are written together: positions in the chunk, one row each, then the values of all rows.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from distopt.compress.formats import INDEX_FORMATS, VALUE_FORMATS
from distopt.errors import DecodeError

_HEADER_NBYTES = 4


@dataclass(frozen=True)
class ChunkGroup:
    """Chunks of equal form.

    Attributes:
        numel: Elements of each.
        count: Entries sent of each.
        runs: How many of them lie in each tensor that has any.
        starts: int64 (n, 1), where each begins in the flat tensor.
        entries: int64 (n, count), where its entries are among all that are sent.
    """

    numel: int
    count: int
    runs: tuple[int, ...]
    starts: Tensor
    entries: Tensor


class Chunks:
    """The chunks of tensors that lie one behind the other.

    Args:
        sizes: Elements of each tensor.
        chunk: Elements of a chunk.
        k: Entries sent of each, in [1, chunk]; of a shorter one `ceil(k * numel / chunk)`.
        device: Of the tables.

    Attributes:
        segments: int64 (num_chunks, 3), rows (start, numel, count): see `distopt.ops.ef_sparsify_segments_`.
        count: Entries sent in all.
        groups: The chunks by their form.
    """

    def __init__(self, sizes: Sequence[int], chunk: int, k: int, device: torch.device | None = None) -> None:
        self.sizes, self.chunk, self.k = tuple(sizes), chunk, k
        tables, first = [torch.empty((0, 3), dtype=torch.int64)], 0
        for tensor, size in enumerate(sizes):
            own = torch.arange(0, size, chunk)
            tables.append(torch.stack([own + first, (size - own).clamp(max=chunk), torch.full_like(own, tensor)], 1))
            first += size
        start, numel, tensors = torch.cat(tables).unbind(1)
        count = (numel * k + chunk - 1).div(chunk, rounding_mode="floor")
        self.count = int(count.sum())
        self.segments = torch.stack([start, numel, count], 1).to(device)
        taken = count.cumsum(0) - count
        self.groups = [
            ChunkGroup(
                int(form),
                int(count[chosen[0]]),
                tuple(tensors[chosen].unique_consecutive(return_counts=True)[1].tolist()),
                start[chosen].unsqueeze(1).to(device),
                (taken[chosen].unsqueeze(1) + torch.arange(int(count[chosen[0]]))).to(device),
            )
            for form in numel.unique()
            for chosen in [(numel == form).nonzero().view(-1)]
        ]


class ChunkPayload:
    """How the entries of chunks are written: a header of four bytes that tells layouts apart, then group after group.

    Args:
        chunks: Of what.
        values: Name of a format of values.
        indices: Name of a format of positions.
    """

    def __init__(self, chunks: Chunks, values: str, indices: str) -> None:
        self._chunks = chunks
        self._values, self._indices = VALUE_FORMATS[values], INDEX_FORMATS[indices]
        facts = (chunks.sizes, chunks.chunk, chunks.k, values, indices)
        self._fingerprint = list(zlib.crc32(repr(facts).encode()).to_bytes(_HEADER_NBYTES, "little"))

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one payload."""
        return _HEADER_NBYTES + sum(sum(self._parts_of(group)) for group in self._chunks.groups)

    def _parts_of(self, group: ChunkGroup) -> list[int]:
        sections = self._indices.sections(group.numel, group.count)
        return [
            *(dtype.itemsize * length * len(group.starts) for dtype, length in sections),
            self._values.nbytes(group.runs, group.count),
        ]

    def encode(self, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The payload, (nbytes,) uint8, and the values as they will arrive, (count,) float32.

        Args:
            values: (count,) finite float32.
            positions: (count,) int32, ascending, as many in each chunk as it sends.
        """
        parts = [torch.tensor(self._fingerprint, dtype=torch.uint8, device=values.device)]
        arriving = torch.empty_like(values)
        for group in self._chunks.groups:
            local = (positions[group.entries] - group.starts).to(torch.int32)
            parts += [_as_bytes(section) for section in self._indices.encode(local, group.numel)]
            parts.append(self._values.encode(values[group.entries], group.runs))
            arriving[group.entries] = self._values.decode(parts[-1], group.runs, group.count)
        return torch.cat(parts), arriving

    def decode(self, payloads: Tensor) -> tuple[Tensor, Tensor]:
        """The values as they arrive and their positions, both (..., count), float32 and ascending int32.

        Args:
            payloads: (..., nbytes) uint8.

        Raises:
            DecodeError: The bytes are not a payload of these chunks, contradict each other or hold NaN or Inf.
        """
        if payloads.dtype != torch.uint8 or payloads.shape[-1:] != (self.nbytes,):
            raise DecodeError(
                f"a payload of these chunks must be {self.nbytes} bytes, got {tuple(payloads.shape)} of "
                f"{payloads.dtype}; every rank must run the same model and configuration"
            )
        head, rest = payloads.split([_HEADER_NBYTES, self.nbytes - _HEADER_NBYTES], -1)
        if bool((head != torch.tensor(self._fingerprint, dtype=torch.uint8, device=payloads.device)).any()):
            raise DecodeError(
                f"the payload of {self.nbytes} bytes does not begin as one of these chunks ({self._chunks.count} of "
                f"{sum(self._chunks.sizes)} entries); every rank must run the same model and configuration"
            )
        form = (*payloads.shape[:-1], self._chunks.count)
        values = torch.empty(form, dtype=torch.float32, device=payloads.device)
        positions = torch.empty(form, dtype=torch.int32, device=payloads.device)
        for group in self._chunks.groups:
            sizes = self._parts_of(group)
            *index_bytes, value_bytes, rest = rest.split([*sizes, rest.shape[-1] - sum(sizes)], -1)
            positions[..., group.entries] = self._positions(group, index_bytes)
            values[..., group.entries] = self._values.decode(value_bytes, group.runs, group.count)
        if not bool(torch.isfinite(values).all()):
            raise DecodeError("values must be finite, got NaN or Inf; the payload was damaged")
        return values, positions

    def _positions(self, group: ChunkGroup, parts: Sequence[Tensor]) -> Tensor:
        forms = self._indices.sections(group.numel, group.count)
        sections = tuple(
            part.clone(memory_format=torch.contiguous_format)  # a view must begin on an aligned byte
            .view(dtype)
            .unflatten(-1, (len(group.starts), length))
            for part, (dtype, length) in zip(parts, forms, strict=True)
        )
        local = self._indices.decode(sections, group.numel, group.count)
        if bool((local < 0).any()) or bool((local >= group.numel).any()):
            raise DecodeError(
                f"positions in a chunk must be in [0, {group.numel}), got others; the payload was damaged or was "
                "encoded with other settings"
            )
        return (local + group.starts).to(torch.int32)


def _as_bytes(section: Tensor) -> Tensor:
    return section.contiguous().view(-1).view(torch.uint8)

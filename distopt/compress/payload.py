"""One contribution to a sparse exchange as one byte tensor: a header, then indices and values.

The size depends only on what every rank knows beforehand (numel, count, formats), so a fixed-size all-gather carries
it. Sections are ordered by the size of their items, so that each starts on an aligned byte.
"""

import dataclasses
import zlib
from functools import cached_property

import torch
from torch import Tensor

from distopt.compress.indices import IndexFormat
from distopt.errors import DecodeError

_MAGIC = 0x0D157097  # any fixed number: tells a payload of this layout from stray bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What a rank says about its contribution.

    Attributes:
        step: Number of steps that the sender has completed.
        nonfinite: 1 + position (in the bucket) of the first tensor with NaN or Inf; 0 if all are finite.
        used: For each tensor, whether the sender's backward pass reached it.
    """

    step: int
    nonfinite: int = 0
    used: tuple[bool, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PayloadLayout:
    """Where everything is in a payload of `count` entries out of `numel`.

    Attributes:
        numel: Entries of the flat tensor that the indices point into.
        count: Entries sent.
        num_flags: Used-bits in the header, one per tensor; 0 sends none.
        value_dtype: Dtype of the values on the wire.
        index_format: How positions are written.
        num_dense: Values that travel without a position, behind the others.
        dense_dtype: Their dtype.
    """

    numel: int
    count: int
    num_flags: int
    value_dtype: torch.dtype
    index_format: IndexFormat
    num_dense: int = 0
    dense_dtype: torch.dtype = torch.float32

    @cached_property
    def _sections(self) -> list[tuple[torch.dtype, int, int]]:
        """(dtype, length, first byte) of the header, each index section, values and dense values, in that order."""
        index_sections = self.index_format.sections(self.numel, self.count) if self.count else ()
        sections = [
            (torch.int32, 3 + -(-self.num_flags // 32)),
            *index_sections,
            (self.value_dtype, self.count),
            (self.dense_dtype, self.num_dense),
        ]
        starts = {}
        position = 0
        for i in sorted(range(len(sections)), key=lambda i: -sections[i][0].itemsize):
            starts[i] = position
            position += sections[i][0].itemsize * sections[i][1]
        return [(dtype, length, starts[i]) for i, (dtype, length) in enumerate(sections)]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one payload, padded so that the payloads of several ranks can lie behind one another."""
        end = max(start + dtype.itemsize * length for dtype, length, start in self._sections)
        alignment = max(dtype.itemsize for dtype, _, _ in self._sections)
        return -(-end // alignment) * alignment

    def pack(self, header: Header, indices: Tensor, values: Tensor, dense: Tensor | None = None) -> Tensor:
        """The payload, uint8, shape (..., nbytes): one for each row, with the same header.

        Args:
            header: What the sender says about it.
            indices: int32, shape (..., count), ascending.
            values: Shape (..., count), already in `value_dtype`.
            dense: Shape (..., num_dense), already in `dense_dtype`.
        """
        payload = torch.zeros((*values.shape[:-1], self.nbytes), dtype=torch.uint8, device=values.device)
        head, *index_views, value_view, dense_view = self._views(payload)
        head.copy_(torch.tensor(self._header_words(header), dtype=torch.int32))
        if self.count:
            for view, section in zip(index_views, self.index_format.encode(indices, self.numel), strict=True):
                view.copy_(section)
            value_view.copy_(values)
        if dense is not None:
            dense_view.copy_(dense)
        return payload

    def unpack_header(self, payload: Tensor) -> Header:
        """What the sender said.

        Raises:
            DecodeError: The bytes are not a payload of this layout.
        """
        magic, step, nonfinite, *flags = self._views(payload)[0].tolist()
        if magic != _MAGIC ^ self._fingerprint:
            raise DecodeError(
                f"the payload of {payload.numel()} bytes does not begin as one of this layout ({self.count} of "
                f"{self.numel} entries, {self.value_dtype}); every rank must run the same model and configuration"
            )
        used = tuple(bool(flags[i // 32] >> (i % 32) & 1) for i in range(self.num_flags))
        return Header(step=step, nonfinite=nonfinite, used=used)

    def unpack(self, payload: Tensor) -> tuple[Tensor, Tensor]:
        """The indices, int32, and values, `value_dtype`, both of shape (..., count), of payloads (..., nbytes).

        Raises:
            DecodeError: The bytes are too few or too many, or the sections contradict each other.
        """
        _, *index_views, values, _ = self._views(payload)
        if not self.count:
            return torch.empty(values.shape, dtype=torch.int32, device=payload.device), values
        return self.index_format.decode(tuple(index_views), self.numel, self.count), values

    def unpack_dense(self, payload: Tensor) -> Tensor:
        """The values without positions, `dense_dtype`, shape (..., num_dense), of payloads (..., nbytes).

        Raises:
            DecodeError: The bytes are too few or too many.
        """
        return self._views(payload)[-1]

    @cached_property
    def _fingerprint(self) -> int:
        formats = (str(self.value_dtype), type(self.index_format).__name__, str(self.dense_dtype))
        facts = (self.numel, self.count, self.num_flags, self.num_dense, *formats)
        return zlib.crc32(repr(facts).encode()) & 0x7FFFFFFF  # the header's words are signed

    def _header_words(self, header: Header) -> list[int]:
        words = [0] * -(-self.num_flags // 32)
        for i, used in enumerate(header.used):
            words[i // 32] |= int(used) << (i % 32)
        signed = [word - (1 << 32) if word >> 31 else word for word in words]
        return [_MAGIC ^ self._fingerprint, header.step, header.nonfinite, *signed]

    def _views(self, payload: Tensor) -> list[Tensor]:
        if payload.dtype != torch.uint8 or payload.shape[-1] != self.nbytes:
            raise DecodeError(
                f"a payload of this layout must be {self.nbytes} bytes, got {payload.shape[-1]} of {payload.dtype}; "
                "every rank must run the same model and configuration"
            )
        return [
            payload[..., start : start + dtype.itemsize * length].view(dtype) for dtype, length, start in self._sections
        ]

"""What CHOCO sends instead of a row: its largest entries, or its signs."""

import dataclasses
from abc import abstractmethod
from functools import lru_cache

import torch
from torch import Tensor

from distopt.compress import INDEX_FORMATS, WIRE_DTYPES, Header, PayloadLayout, round_to_wire
from distopt.config import Configurable, check_choice, check_density
from distopt.errors import DecodeError
from distopt.ops import topk_abs


class Codec(Configurable, tag="codec"):
    """A lossy code of flat tensors whose length depends on theirs alone."""

    @abstractmethod
    def num_bytes(self, numel: int) -> int:
        """Length of the code of so many elements."""

    @abstractmethod
    def encode(self, row: Tensor) -> Tensor:
        """(numel,) to (num_bytes,) uint8."""

    @abstractmethod
    def decode(self, code: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """(numel,) of what the code holds."""


@lru_cache
def _layout(numel: int, density: float, values: str, indices: str) -> PayloadLayout:
    return PayloadLayout(
        numel=numel,
        count=max(1, round(numel * density)) if numel else 0,
        num_flags=0,
        value_dtype=WIRE_DTYPES[values],
        index_format=INDEX_FORMATS[indices],
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKCodec(Codec, name="top-k"):
    """The entries of largest magnitude, exactly so many."""

    density: float = 0.01  # fraction of entries; smaller sends less and agrees more slowly
    values: str = "fp32"  # on the wire: "fp16" and "bf16" halve them
    indices: str = "int32"  # on the wire: "block16" and "elias-fano" are shorter

    def __post_init__(self) -> None:
        check_density("density", self.density)
        check_choice("values", self.values, tuple(WIRE_DTYPES))
        check_choice("indices", self.indices, tuple(INDEX_FORMATS))

    def _layout(self, numel: int) -> PayloadLayout:
        return _layout(numel, self.density, self.values, self.indices)

    def num_bytes(self, numel: int) -> int:
        """See `Codec.num_bytes`."""
        return self._layout(numel).nbytes

    def encode(self, row: Tensor) -> Tensor:
        """See `Codec.encode`."""
        layout = self._layout(row.numel())
        selected, indices = topk_abs(row, layout.count)
        values, _ = round_to_wire(selected, layout.value_dtype)
        return layout.pack(Header(step=0), indices, values)

    def decode(self, code: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """See `Codec.decode`."""
        layout = self._layout(numel)
        layout.unpack_header(code)
        indices, values = layout.unpack(code)
        row = torch.zeros(numel, dtype=dtype, device=code.device)
        row[indices.long()] = values.to(dtype)
        return row


@dataclasses.dataclass(frozen=True)
class SignCodec(Codec, name="sign"):
    """A bit per entry, and their mean magnitude: `||x||_1 / d sign(x)` (Karimireddy et al. 2019)."""

    def num_bytes(self, numel: int) -> int:
        """See `Codec.num_bytes`."""
        return 8 + -(-numel // 8)

    def encode(self, row: Tensor) -> Tensor:
        """See `Codec.encode`."""
        code = torch.zeros(self.num_bytes(row.numel()), dtype=torch.uint8, device=row.device)
        if row.numel():
            code[:8].view(torch.float64).fill_(row.abs().mean(dtype=torch.float64))
        bits = torch.zeros(8 * (len(code) - 8), dtype=torch.uint8, device=row.device)
        bits[: row.numel()] = row >= 0
        powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=row.device)
        code[8:] = (bits.view(-1, 8) * powers).sum(1, dtype=torch.uint8)
        return code

    def decode(self, code: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """See `Codec.decode`."""
        if code.dtype != torch.uint8 or code.shape != (self.num_bytes(numel),):
            raise DecodeError(
                f"the signs of {numel} entries must be {self.num_bytes(numel)} bytes, got {tuple(code.shape)} of "
                f"{code.dtype}; every rank must run the same model and configuration"
            )
        magnitude = code[:8].clone().view(torch.float64).to(dtype)
        places = torch.arange(8, dtype=torch.uint8, device=code.device)
        signs = (code[8:, None].bitwise_right_shift(places) & 1).view(-1)[:numel]
        return torch.where(signs.bool(), magnitude, -magnitude)

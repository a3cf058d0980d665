"""Fields of a few bits in bytes: lowest bits first, no gaps, zeros behind the last field."""

import torch
from torch import Tensor

from distopt.errors import DecodeError


def packed_nbytes(width: int, count: int) -> int:
    """Bytes of `count` fields of `width` bits."""
    return -(-width * count // 8)


def to_bits(fields: Tensor, width: int) -> Tensor:
    """(..., n) integers in [0, 2**width) as (..., n * width) uint8 zeros and ones."""
    places = torch.arange(width, dtype=fields.dtype, device=fields.device)
    return ((fields.unsqueeze(-1) >> places) & 1).to(torch.uint8).flatten(-2)


def from_bits(bits: Tensor, width: int, count: int) -> Tensor:
    """(..., count * width) zeros and ones as (..., count) int32; width is at most 31."""
    fields = torch.zeros((*bits.shape[:-1], count), dtype=torch.int32, device=bits.device)
    for place in range(width):
        fields |= bits[..., place::width].to(torch.int32) << place
    return fields


def pack_bits(bits: Tensor) -> Tensor:
    """(..., n) zeros and ones as (..., ceil(n / 8)) uint8."""
    padded = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    packed: Tensor = padded[..., 0].clone()
    for place in range(1, 8):
        packed |= padded[..., place] << place
    return packed


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """(..., ceil(count / 8)) uint8 as (..., count) zeros and ones.

    Raises:
        DecodeError: A bit behind the last one is not zero.
    """
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = ((packed.unsqueeze(-1) >> places) & 1).flatten(-2)
    if bool(bits[..., count:].any()):
        raise DecodeError(
            f"the bits behind the last of {count} must be zero, got others; the payload was damaged or was encoded "
            "with other settings"
        )
    return bits[..., :count]


def pack(fields: Tensor, width: int) -> Tensor:
    """(..., n) integers in [0, 2**width) as (..., ceil(n * width / 8)) uint8."""
    return pack_bits(to_bits(fields, width))


def unpack(packed: Tensor, width: int, count: int) -> Tensor:
    """(..., ceil(count * width / 8)) uint8 as (..., count) int32. Raises `DecodeError` as `unpack_bits`."""
    return from_bits(unpack_bits(packed, count * width), width, count)

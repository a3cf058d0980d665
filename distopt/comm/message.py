"""A message between roles: a header (kind, round, sender, shapes, dtypes, numbers) and raw tensor bytes, in one frame.

Nothing that arrives is unpickled. A frame is a 1-D uint8 tensor: a fixed prefix, the description of each tensor, the
numbers, then the tensors' bytes, each at a multiple of 64. The header carries its own CRC-32, so garbage and a header
from another version are told apart from a message; what the message means is for the role to check.

Limits: little-endian machines; at most 8 dimensions; payload bytes carry no checksum (TCP has one).
"""

import dataclasses
import math
import struct
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from distopt.errors import DecodeError

_MAGIC = b"DOPT"
_VERSION = 1
_PREFIX = struct.Struct(
    "<4sHHIqHHIQ"
)  # magic, version, kind, sender, round, tensors, numbers, header bytes, frame bytes
_CRC = struct.Struct("<I")
_ALIGNMENT = 64
_MAX_DIMENSIONS = 8
_MAX_VALUES = 2**59  # so that bytes fit 63 bits
DTYPES = (  # of the tensors in a message
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor in a message."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Message:
    """What one role tells another.

    Attributes:
        kind: A number whose meaning the roles share, 0 to 65535.
        round: Round or version that it belongs to.
        sender: Who says so; the receiver compares it with where the frame came from.
        tensors: Values; on receipt views into the frame, valid as long as it is.
        numbers: float64 values.
    """

    kind: int
    round: int
    sender: int
    tensors: tuple[Tensor, ...] = ()
    numbers: tuple[float, ...] = ()


def encode(message: Message) -> Tensor:
    """The message as a frame, with a copy of its tensors (which are read from any device).

    Raises:
        DecodeError: A dtype that frames cannot carry, or too many dimensions.
    """
    specs = [TensorSpec(tuple(tensor.shape), tensor.dtype) for tensor in message.tensors]
    header_bytes = _header_bytes(specs, len(message.numbers))
    total = frame_bytes(specs, len(message.numbers))
    header = bytearray(header_bytes)
    prefix = (len(specs), len(message.numbers), header_bytes, total)
    _PREFIX.pack_into(header, 0, _MAGIC, _VERSION, message.kind, message.sender, message.round, *prefix)
    at = _PREFIX.size
    for spec in specs:
        if spec.dtype not in DTYPES or len(spec.shape) > _MAX_DIMENSIONS:
            raise DecodeError(
                f"a message carries {', '.join(str(d) for d in DTYPES)} of at most {_MAX_DIMENSIONS} dimensions, got "
                f"{spec.dtype} of shape {spec.shape}; convert it before sending"
            )
        struct.pack_into(f"<BB{len(spec.shape)}q", header, at, DTYPES.index(spec.dtype), len(spec.shape), *spec.shape)
        at += 2 + 8 * len(spec.shape)
    struct.pack_into(f"<{len(message.numbers)}d", header, at, *message.numbers)
    _CRC.pack_into(header, header_bytes - _CRC.size, zlib.crc32(header[: header_bytes - _CRC.size]))

    frame = torch.empty(total, dtype=torch.uint8)
    frame[:header_bytes] = torch.frombuffer(header, dtype=torch.uint8)
    for view, tensor in zip(_views(frame, header_bytes, specs), message.tensors, strict=True):
        view.copy_(tensor.detach())
    return frame


def decode(frame: Tensor) -> Message:
    """The message in a frame; bytes behind its end are ignored, for a receiver's buffer may be longer.

    Raises:
        DecodeError: It is not a message: no header, a damaged one, or one that does not fit the frame.
    """
    if frame.dtype != torch.uint8 or frame.dim() != 1 or frame.numel() < _PREFIX.size + _CRC.size:
        raise DecodeError(f"a frame is at least {_PREFIX.size + _CRC.size} bytes, got {frame.numel()} of {frame.dtype}")
    prefix = frame[: _PREFIX.size].numpy().tobytes()
    magic, version, kind, sender, round_, num_tensors, num_numbers, header_bytes, total = _PREFIX.unpack(prefix)
    if magic != _MAGIC or version != _VERSION:
        raise DecodeError(f"a frame begins with {_MAGIC!r} and version {_VERSION}, got {magic!r} and {version}")
    if not _PREFIX.size + _CRC.size <= header_bytes <= total <= frame.numel():
        raise DecodeError(f"a message of {total} bytes, {header_bytes} of header, does not fit {frame.numel()} bytes")
    header = frame[:header_bytes].numpy().tobytes()
    if zlib.crc32(header[: -_CRC.size]) != _CRC.unpack_from(header, header_bytes - _CRC.size)[0]:
        raise DecodeError("the header does not match its CRC-32: it is damaged")
    try:
        specs, numbers = _unpack(header, num_tensors, num_numbers)
    except (struct.error, IndexError) as error:
        raise DecodeError(f"the header describes {num_tensors} tensors that it does not hold: {error}") from error
    if _header_bytes(specs, num_numbers) != header_bytes or frame_bytes(specs, num_numbers) != total:
        raise DecodeError(f"the tensors described do not add up to the {total} bytes announced")
    return Message(kind, round_, sender, tuple(_views(frame, header_bytes, specs)), numbers)


def length(frame: Tensor) -> int:
    """Bytes of the message in a frame that `decode` takes, without what is behind its end."""
    prefix = frame[: _PREFIX.size].numpy().tobytes()
    return int(_PREFIX.unpack(prefix)[-1])


def frame_bytes(specs: Sequence[TensorSpec], num_numbers: int) -> int:
    """Length of the frame of a message with such tensors and that many numbers."""
    end = _header_bytes(specs, num_numbers)
    for spec in specs:
        end = _aligned(end) + spec.num_bytes
    return end


def _unpack(header: bytes, num_tensors: int, num_numbers: int) -> tuple[list[TensorSpec], tuple[float, ...]]:
    specs = []
    at = _PREFIX.size
    for _ in range(num_tensors):
        code, dimensions = struct.unpack_from("<BB", header, at)
        shape = struct.unpack_from(f"<{dimensions}q", header, at + 2)
        if dimensions > _MAX_DIMENSIONS or min(shape, default=0) < 0:
            raise IndexError(f"shape {shape}")
        if math.prod(max(size, 1) for size in shape) > _MAX_VALUES:  # torch cannot make it, though it may be empty
            raise IndexError(f"shape {shape}")
        specs.append(TensorSpec(shape, DTYPES[code]))
        at += 2 + 8 * dimensions
    return specs, struct.unpack_from(f"<{num_numbers}d", header, at)


def _views(frame: Tensor, start: int, specs: Sequence[TensorSpec]) -> list[Tensor]:
    views = []
    for spec in specs:
        start = _aligned(start)
        views.append(frame[start : start + spec.num_bytes].view(spec.dtype).view(spec.shape))
        start += spec.num_bytes
    return views


def _header_bytes(specs: Sequence[TensorSpec], num_numbers: int) -> int:
    described = sum(2 + 8 * len(spec.shape) for spec in specs)
    return _PREFIX.size + described + 8 * num_numbers + _CRC.size


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT

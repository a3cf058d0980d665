"""Frames: what a transport asks of one, and its bytes."""

import torch
from torch import Tensor

from distopt.errors import ConfigError


def check_frame(frame: Tensor, *, min_bytes: int, max_bytes: int) -> None:
    """Nothing, if a transport can carry it.

    Raises:
        ConfigError: It is not a 1-D contiguous uint8 CPU tensor, or is too short or too long.
    """
    if frame.dtype != torch.uint8 or frame.dim() != 1 or frame.device.type != "cpu" or not frame.is_contiguous():
        raise ConfigError(
            f"a frame must be a 1-D contiguous uint8 CPU tensor, got {frame.dtype} of shape {tuple(frame.shape)} "
            f"on {frame.device}; encode the message first"
        )
    if not min_bytes <= frame.numel() <= max_bytes:
        raise ConfigError(
            f"a frame may have {min_bytes} to {max_bytes} bytes, got {frame.numel()}; give max_frame_bytes when the "
            "transport is made"
        )


def bytes_of(frame: Tensor) -> memoryview:
    """The frame's own memory, not a copy."""
    return memoryview(frame.numpy())  # type: ignore[arg-type]  # numpy's arrays have been buffers all along

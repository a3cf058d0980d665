"""What CUDA kernels found wrong with data that only the device has seen, told when somebody asks.

An operation on CUDA tensors waits for nothing, so it cannot raise for an index or a segment table that lies in device
memory. The kernels leave alone what does not fit, count it per device, and this module raises for the counts.

Limits: the counts say how many, not which call; without CUDA kernels the reference raises at once.
"""

import torch

from distopt.errors import ConfigError, DecodeError
from distopt.ops import native


def raise_device_errors(device: torch.device | str) -> None:
    """Raises for what went wrong on a device since the last call. Waits for its current stream.

    Args:
        device: Where the tensors of the operations were; on others than CUDA devices nothing can be outstanding.

    Raises:
        DecodeError: `scatter_add_` met indices out of range; they wrote nothing.
        ConfigError: a segment table contradicted itself or the sizes; what that call returned is undefined.
    """
    device = torch.device(device)
    if device.type != "cuda" or not native.has_cuda_kernels():
        return
    errors = torch.ops.distopt._device_errors(torch.empty(0, device=device))
    num_indices, num_tables = errors.tolist()
    if num_indices:
        raise DecodeError(
            f"indices must be in [0, numel), got {num_indices} that are not on {device}; the payload is damaged or "
            "belongs to another tensor, nothing was written for them"
        )
    if num_tables:
        raise ConfigError(
            f"segments must be ascending, apart, inside grad and add up to the states and to count, got {num_tables} "
            f"tables that are not on {device}; check them with distopt.ops.checks.segment_rows"
        )

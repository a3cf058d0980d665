"""Rounding of values for the wire, with the rounding error handed back so that nobody throws it away.

A 16-bit value saturates instead of becoming infinite, alone or in the sum over the ranks: what was cut off is part of
the error and stays with the sender. (A sum that the wire itself makes is rounded once more; that part is lost.)
"""

import torch
from torch import Tensor

WIRE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def round_to_wire(values: Tensor, dtype: torch.dtype, *, summands: int = 1) -> tuple[Tensor, Tensor | None]:
    """Values as they travel, and what the receiver will not see.

    Args:
        values: Any shape, floating point.
        dtype: The dtype on the wire.
        summands: How many such tensors the wire itself adds up in that dtype (an all-reduce: one per rank).

    Returns:
        The values in `dtype`, and `values - sent` in the dtype of values, or None if nothing is lost.
    """
    wide = torch.promote_types(values.dtype, dtype)
    if wide == dtype:
        return values.to(dtype), None
    largest = torch.finfo(dtype).max
    if summands > 1:  # room for the rounding of partial sums, half a last place each
        last_place = largest * torch.finfo(dtype).eps / 2
        largest = max(largest / summands - last_place, largest / (2 * summands))
    exact = values.to(wide)  # bfloat16 and float16 lose something either way: neither holds the other
    sent = exact.clamp(-largest, largest).to(dtype)
    return sent, (exact - sent.to(wide)).to(values.dtype)

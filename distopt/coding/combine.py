"""The decoded gradient: the sum of the messages times their coefficients, in one pass over memory.

Limits: CPU tensors. The order of the messages is the order of the additions: give them in the order of the workers, not
of their arrival, where equal sets are to give equal bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distopt.errors import ConfigError
from distopt.ops import weighted_sum_

_BLOCK = 1 << 17  # elements of a sum of 16-bit messages that stay in the cache until they are rounded


@torch.no_grad()
def combine(messages: Sequence[Tensor], coefficients: Sequence[float], out: Tensor | None = None) -> Tensor:
    """`sum_i coefficients[i] * messages[i]`, added up in this order; the same bits each time.

    Args:
        messages: Flat floating-point tensors on the CPU, of one dtype and length, at least one.
        coefficients: One for each message. Those that are zero are skipped, their messages not even read.
        out: Where the sum goes: of the messages' length, and of their dtype or, for 16-bit messages, of float32; none
            of the messages. A new tensor like the messages if left out.

    Returns:
        The sum; `out` if given. 16-bit messages are added up in float32 and rounded once, at the end.

    Raises:
        ConfigError: What was given does not fit together.
    """
    if len(messages) != len(coefficients):
        raise ConfigError(
            f"there must be one coefficient for each message, got {len(coefficients)} for {len(messages)}; leave out "
            "the coefficients of the missing"
        )
    if not messages:
        raise ConfigError("there must be at least one message to combine, got none; decode needs survivors")
    _check_messages(messages)
    first = messages[0]
    dtype = torch.float32 if first.dtype.itemsize < 4 else first.dtype
    if out is None:
        out = torch.empty_like(first)
    else:
        _check_out(out, messages, dtype)
    terms = [(message, float(a)) for message, a in zip(messages, coefficients, strict=True) if a != 0]
    if not terms:
        return out.zero_()
    parts, factors = [message for message, _ in terms], [a for _, a in terms]
    if out.dtype == dtype:
        weighted_sum_(out, parts, factors)
        return out
    scratch = torch.empty(min(_BLOCK, out.numel()), dtype=dtype)
    for start in range(0, out.numel(), _BLOCK):
        target = out[start : start + _BLOCK]
        total = scratch[: target.numel()]
        weighted_sum_(total, [part[start : start + _BLOCK] for part in parts], factors)
        target.copy_(total)
    return out


def _check_messages(messages: Sequence[Tensor]) -> None:
    first = messages[0]
    for i, message in enumerate(messages):
        flat = message.dim() == 1 and message.is_contiguous() and message.device.type == "cpu"
        if not flat or not message.is_floating_point():
            raise ConfigError(
                f"messages must be flat floating-point tensors on the CPU, got {tuple(message.shape)} "
                f"{message.dtype} on {message.device} at {i}; flatten and copy it there"
            )
        if message.dtype != first.dtype or message.numel() != first.numel():
            raise ConfigError(
                f"messages must have one dtype and length, got {message.numel()} {message.dtype} at {i} beside "
                f"{first.numel()} {first.dtype}; check what the workers sent"
            )


def _check_out(out: Tensor, messages: Sequence[Tensor], accumulated: torch.dtype) -> None:
    first = messages[0]
    fits = out.dim() == 1 and out.is_contiguous() and out.device.type == "cpu" and out.numel() == first.numel()
    if not fits or out.dtype not in (first.dtype, accumulated):
        raise ConfigError(
            f"out must be a flat tensor of {first.numel()} {first.dtype} on the CPU, got {tuple(out.shape)} "
            f"{out.dtype} on {out.device}; leave it out for a new one"
        )
    own = out.untyped_storage().data_ptr()
    if any(message.untyped_storage().data_ptr() == own for message in messages):
        raise ConfigError("out must not share memory with a message, which may be needed again; leave it out")

"""The decoded gradient: the sum of the messages times their coefficients, in one pass over memory.

`combine` goes through the messages in blocks so small that the block of the sum stays in the cache while it collects
the same block of every message: each message is read once and the sum written once.

Limits: CPU tensors. The order of the messages is the order of the additions: give them in the order of the workers, not
of their arrival, where equal sets are to give equal bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distopt.errors import ConfigError

# Large enough that calls into torch, and its threads' waiting for each other, cost little beside the work, small enough
# for a cache: of the powers of two the fastest were 1 to 4 MiB with 1 thread, 4 with 2.
_BLOCK_NBYTES = 1 << 21


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
    block = _BLOCK_NBYTES // dtype.itemsize
    factors = [a for _, a in terms]
    blocks = zip(*(message.split(block) for message, _ in terms), strict=True)
    scratch = None if out.dtype == dtype else torch.empty(min(block, out.numel()), dtype=dtype)
    for target, parts in zip(out.split(block), blocks, strict=True):
        if scratch is None:
            _add_up(parts, factors, target)
        else:
            target.copy_(_add_up(parts, factors, scratch[: target.numel()]))
    return out


def _add_up(parts: Sequence[Tensor], factors: Sequence[float], total: Tensor) -> Tensor:
    torch.mul(parts[0], factors[0], out=total)
    for part, factor in zip(parts[1:], factors[1:], strict=True):
        total.add_(part, alpha=factor)  # a factor of 1 rounds nothing: a plain sum
    return total


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

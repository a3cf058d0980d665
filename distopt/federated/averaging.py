"""Weighted sums of what the clients sent, with the same bits whatever order it came in.

The terms are added by ascending client id, in float64, and the sum is rounded to the dtype of the rows. Multiplication
and addition are separate operations, so that no processor fuses them: one thread or many, one machine or another, the
result is the same to the bit.

The weights of McMahan et al., *Communication-Efficient Learning of Deep Networks from Decentralized Data* (FedAvg,
2017): `sample_weights`, n_k / sum n_k; or the same for all, `uniform_weights`.

Cost: each row is read once; scratch memory is two blocks, 2 MiB on the CPU, and the result, whatever the number of
rows. About 1.4 times as long as adding up in float32 would take (10 rows of 4 million float32 values, one thread).

Limits: a value beyond the range of the rows' dtype becomes inf, as in any rounding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distopt.config import check_count
from distopt.errors import ConfigError
from distopt.federated.checks import float_vector
from distopt.federated.rows import Ids, Rows, as_rows, blocks, client_order

# Values per block. On the CPU, of the powers of two from 2^13 to 2^22, those from 2^17 to 2^19 were the fastest: two
# float64 blocks stay in the cache. Elsewhere the calls cost more than the memory.
_CPU_BLOCK_NUMEL = 1 << 17
_DEVICE_BLOCK_NUMEL = 1 << 24


@torch.no_grad()
def weighted_sum(rows: Rows, weights: Sequence[float] | Tensor, ids: Ids = None) -> Tensor | None:
    """`sum_i weights[i] * rows[i]`, added by ascending client id.

    Args:
        rows: m flat floating-point tensors of d values, or one of shape (m, d); models or, better, deltas.
        weights: m finite numbers. A row of weight 0 is not even read: what is in it does not matter.
        ids: The client of each row; left out, the rows are in the order of the clients.

    Returns:
        (d,) in the dtype of the rows; None if there is nothing to add, no row or all weights 0: leave the model as it
        is, a sum of zero models would wipe it out.

    Raises:
        ConfigError: What was given does not fit together.
    """
    listed = as_rows("rows", rows)
    factors = float_vector("weights", weights, remedy="reject a reply that is not finite").tolist()
    if len(factors) != len(listed):
        raise ConfigError(
            f"there must be one weight for each row, got {len(factors)} for {len(listed)}; leave out those of the "
            "clients that did not answer"
        )
    order = [i for i in client_order(ids, len(listed)) if factors[i] != 0]
    if not order:
        return None
    out = torch.empty_like(listed[order[0]])
    numel = block_numel(out)
    total = torch.empty(min(numel, out.numel()), dtype=torch.float64, device=out.device)
    term = torch.empty_like(total)
    terms = [listed[i] for i in order]
    for target, *parts in blocks([out, *terms], numel):
        size = target.numel()
        total[:size].zero_()
        for i, part in zip(order, parts, strict=True):
            add_product(total[:size], factors[i], part, term[:size])
        target.copy_(total[:size])
    return out


def add_product(total: Tensor, factor: float, part: Tensor, term: Tensor) -> None:
    """`total += factor * part` in float64, by way of `term`: `add_(part, alpha=factor)` might round once, or twice."""
    total.add_(term.copy_(part).mul_(factor))


def block_numel(like: Tensor) -> int:
    """How many values of a row to work on at a time."""
    return _CPU_BLOCK_NUMEL if like.device.type == "cpu" else _DEVICE_BLOCK_NUMEL


def sample_weights(num_samples: Sequence[int] | Tensor) -> Tensor:
    """FedAvg's n_k / sum n_k. A client without samples gets 0; all get 0 where nobody has any.

    Args:
        num_samples: m counts, the samples of each client that answered.

    Returns:
        (m,) float64.

    Raises:
        ConfigError: A count is not an integer of at least 0.
    """
    counts = torch.as_tensor(num_samples, device="cpu") if len(num_samples) else torch.empty(0, dtype=torch.int64)
    integral = not counts.is_floating_point() and counts.dtype != torch.bool
    if counts.dim() != 1 or not integral or (counts < 0).any():
        raise ConfigError(
            f"num_samples must be integers of at least 0, got {num_samples!r}; give how many samples each client "
            "trained on"
        )
    return counts.double() / max(int(counts.sum()), 1)


def uniform_weights(m: int) -> Tensor:
    """1/m for each of m clients, (m,) float64.

    Raises:
        ConfigError: m is not an integer of at least 0.
    """
    check_count("m", m, low=0, remedy="give how many clients are averaged")
    return torch.full((m,), 1.0 / max(m, 1), dtype=torch.float64)

"""The flat tensors of a round, one for each client, in an order that does not depend on who answered first.

Floating-point sums depend on the order of their terms. Every rule of this package therefore goes through the clients by
ascending id, and through the coordinates in blocks, so that its scratch memory does not grow with the model.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distopt.errors import ConfigError
from distopt.ops import weighted_sum_

# Values per block. On the CPU, of the powers of two from 2^13 to 2^22, those from 2^17 to 2^19 were the fastest: two
# float64 blocks stay in the cache. Elsewhere the calls cost more than the memory.
_CPU_BLOCK_NUMEL = 1 << 17
_DEVICE_BLOCK_NUMEL = 1 << 24

Rows = Sequence[Tensor] | Tensor  # m flat tensors of d values, or one of shape (m, d)
Ids = Sequence[int] | Tensor | None  # the client of each row; None: the rows are in the order of the clients


def as_rows(name: str, rows: Rows) -> list[Tensor]:
    """The rows as a list, detached, none of them copied.

    Raises:
        ConfigError: They are not flat floating-point tensors of one length, dtype and device.
    """
    if isinstance(rows, Tensor) and rows.dim() != 2:
        raise ConfigError(f"{name} must be of shape (clients, values), got {tuple(rows.shape)}; flatten each client's")
    listed = [row.detach() for row in rows]
    for i, row in enumerate(listed):
        first = listed[0]
        if row.dim() != 1 or not row.is_floating_point():
            raise ConfigError(
                f"{name} must be flat floating-point tensors, got {row.dtype} of shape {tuple(row.shape)} at {i}; "
                "flatten it, and leave integer buffers out"
            )
        if (row.numel(), row.dtype, row.device) != (first.numel(), first.dtype, first.device):
            raise ConfigError(
                f"{name} must have one length, dtype and device, got {row.numel()} {row.dtype} on {row.device} at {i} "
                f"beside {first.numel()} {first.dtype} on {first.device}; check what the clients sent"
            )
    return listed


def client_order(ids: Ids, num_rows: int) -> list[int]:
    """The places of the rows by ascending client id.

    Raises:
        ConfigError: There is not exactly one id for each row, or one comes twice.
    """
    if ids is None:
        return list(range(num_rows))
    listed = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    if len(listed) != num_rows:
        raise ConfigError(
            f"there must be one id for each row, got {len(listed)} for {num_rows}; give the client of each"
        )
    order = sorted(range(num_rows), key=listed.__getitem__)
    for i, j in itertools.pairwise(order):
        if listed[i] == listed[j]:
            raise ConfigError(f"ids must not repeat, got {listed[i]!r} twice; count one reply of a client per round")
    return order


def ordered(name: str, rows: Rows, ids: Ids) -> list[Tensor]:
    """The rows by ascending client id; raises as `as_rows` and `client_order` do."""
    listed = as_rows(name, rows)
    return [listed[i] for i in client_order(ids, len(listed))]


def block_numel(like: Tensor) -> int:
    """How many values of a row to work on at a time."""
    return _CPU_BLOCK_NUMEL if like.device.type == "cpu" else _DEVICE_BLOCK_NUMEL


def blocks(rows: Sequence[Tensor], numel: int) -> Iterator[tuple[Tensor, ...]]:
    """The rows, cut at the same places into pieces of `numel` values; the last ones may be shorter."""
    return zip(*(row.split(numel) for row in rows), strict=True)


def float64_stack(parts: Sequence[Tensor]) -> Tensor:
    """(clients, values) float64."""
    stacked = torch.empty((len(parts), parts[0].numel()), dtype=torch.float64, device=parts[0].device)
    for target, part in zip(stacked, parts, strict=True):
        target.copy_(part)
    return stacked


def weighted_rows(rows: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`weights[0] rows[0] + weights[1] rows[1] + ...`, in this order; 16-bit rows are added in float32."""
    rows = [row.contiguous() for row in rows]
    dtype = rows[0].dtype
    total = torch.empty_like(rows[0], dtype=dtype if dtype is torch.float64 else torch.float32)
    weighted_sum_(total, rows, weights)
    return total.to(dtype)

"""Trimmed mean and median: each coordinate by itself, without the values that lie furthest out.

Source: Yin et al., *Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates*, ICML 2018.

The values of a coordinate are sorted before they are added, so the order in which the clients answered cannot show.
NaN counts as larger than all numbers. Blocks of coordinates keep the scratch memory small, whatever the model.

Limits: nothing is said about whole vectors: the result may be none that any client, or any model, is near to. With
data that differ much from client to client it leaves out what is rare, not only what is wrong.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from distopt.config import check_count
from distopt.errors import ConfigError
from distopt.federated.rows import Ids, Rows, blocks, ordered

_BLOCK_VALUES = 1 << 18  # of all clients together: 1 MiB of float32, which sorting keeps in the cache


@torch.no_grad()
def trimmed_mean(deltas: Rows, trim: int, ids: Ids = None) -> Tensor:
    """Per coordinate the mean of what is left without the `trim` largest and the `trim` smallest values.

    Up to `trim` arbitrary clients cannot move it out of the range of the others.

    Args:
        deltas: n flat floating-point tensors of d values, or one of shape (n, d).
        trim: How many at each end; 0 is the plain mean.
        ids: The client of each row; left out, the rows are in the order of the clients.

    Returns:
        (d,) in the dtype of the deltas, added up in float64.

    Raises:
        ConfigError: trim is below 0 or leaves no value, or the deltas do not fit together.
    """
    rows = ordered("deltas", deltas, ids)
    check_count("trim", trim, low=0, remedy="use the number of clients that may be wrong")
    if 2 * trim >= len(rows):
        raise ConfigError(
            f"trim must be below half the number of clients, got {trim} for {len(rows)}; wait for more clients or use "
            "median"
        )
    out = torch.empty_like(rows[0])
    for target, values in _sorted_blocks(rows, out):
        target.copy_(values[:, trim : len(rows) - trim].double().mean(dim=1))
    return out


@torch.no_grad()
def median(deltas: Rows, ids: Ids = None) -> Tensor:
    """Per coordinate the median; with an even number of clients the mean of the two in the middle.

    Fewer than half the clients, if arbitrary, cannot move it out of the range of the others.

    Args:
        deltas: n >= 1 flat floating-point tensors of d values, or one of shape (n, d).
        ids: The client of each row; left out, the rows are in the order of the clients.

    Returns:
        (d,) in the dtype of the deltas.

    Raises:
        ConfigError: There are no deltas, or they do not fit together.
    """
    rows = ordered("deltas", deltas, ids)
    if not rows:
        raise ConfigError("deltas must be of at least 1 client, got none; skip a round that nobody answered")
    out = torch.empty_like(rows[0])
    for target, values in _sorted_blocks(rows, out):
        target.copy_(middle(values))
    return out


def middle(ascending: Tensor) -> Tensor:
    """The median of each row of sorted values, (coordinates, n), in float64."""
    n = ascending.shape[1]
    return ascending[:, (n - 1) // 2 : n // 2 + 1].double().mean(dim=1)


def value_blocks(rows: list[Tensor], out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of `out` with the clients' values for them, (coordinates, clients)."""
    for target, *parts in blocks([out, *rows], max(_BLOCK_VALUES // len(rows), 1)):
        yield target, torch.stack(parts, dim=1)


def _sorted_blocks(rows: list[Tensor], out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for target, values in value_blocks(rows, out):
        yield target, values.sort(dim=1).values

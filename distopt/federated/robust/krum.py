"""Krum and Multi-Krum: the deltas that lie nearest to many others.

The score of a client is the sum of the squared distances to its n - f - 2 nearest others, of n clients f of which may
be arbitrary. Krum takes the delta with the lowest score, Multi-Krum the mean of several. Ties go to the lowest id.

Source: Blanchard et al., *Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent*, NeurIPS 2017.

Limits: n >= 2f + 3. Krum's result is as noisy as one client's delta. A delta near the others may still be wrong in a
single coordinate by as much as honest deltas differ in norm: see `bulyan`.
"""

import math

import torch
from torch import Tensor

from distopt.config import check_count
from distopt.errors import ConfigError
from distopt.federated.robust.distances import squared_distances
from distopt.federated.rows import Ids, Rows, as_rows, client_order, weighted_rows


@torch.no_grad()
def krum(deltas: Rows, num_byzantine: int, ids: Ids = None) -> Tensor:
    """The delta with the lowest score.

    Args:
        deltas: n flat floating-point tensors of d values, or one of shape (n, d).
        num_byzantine: f, how many of them may be arbitrary.
        ids: The client of each row; left out, the rows are in the order of the clients.

    Returns:
        (d,), a copy of one of the deltas.

    Raises:
        ConfigError: n < 2f + 3, or the deltas do not fit together.
    """
    rows = as_rows("deltas", deltas)
    return rows[_best_first(rows, num_byzantine, ids)[0]].clone()


@torch.no_grad()
def multi_krum(deltas: Rows, num_byzantine: int, num_selected: int, ids: Ids = None) -> Tensor:
    """The mean of the `num_selected` deltas with the lowest scores, added in float64 by ascending client id.

    Args:
        deltas: n flat floating-point tensors of d values, or one of shape (n, d).
        num_byzantine: f, how many of them may be arbitrary.
        num_selected: From 1, which is `krum`, to n - f. Higher: less noise; n - f - 2 is common.
        ids: The client of each row; left out, the rows are in the order of the clients.

    Returns:
        (d,) in the dtype of the deltas.

    Raises:
        ConfigError: n < 2f + 3, num_selected breaks its rule, or the deltas do not fit together.
    """
    rows = as_rows("deltas", deltas)
    order = _best_first(rows, num_byzantine, ids)
    most = len(rows) - num_byzantine
    check_count("num_selected", num_selected, low=1, remedy=f"use up to {most}")
    if num_selected > most:
        raise ConfigError(
            f"num_selected must be at most the {most} of {len(rows)} clients that are surely honest, got "
            f"{num_selected}; use {max(most - 2, 1)}"
        )
    places = client_order(ids, len(rows))
    selected = set(order[:num_selected])
    return weighted_rows([rows[i] for i in places if i in selected], [1.0 / num_selected] * num_selected)


@torch.no_grad()
def krum_scores(deltas: Rows, num_byzantine: int) -> Tensor:
    """The score of each delta, (n,) float64, in the order given; lower is nearer to the others. To see who stands out.

    Raises:
        ConfigError: As `krum`.
    """
    rows = as_rows("deltas", deltas)
    check_enough("krum", len(rows), num_byzantine, times=2)
    return scores(squared_distances(rows), len(rows) - num_byzantine - 2)


def scores(distances: Tensor, num_neighbours: int) -> Tensor:
    """For each of (n, n) squared distances' rows the sum of the smallest to others; the number is at most n - 1."""
    to_others = distances.clone().fill_diagonal_(math.inf)
    return to_others.sort(dim=1).values[:, :num_neighbours].sum(dim=1)


def check_enough(rule: str, num_clients: int, num_byzantine: int, *, times: int) -> None:
    """Raises `ConfigError` unless n >= times * f + 3."""
    check_count("num_byzantine", num_byzantine, low=0, remedy="give how many clients may be arbitrary")
    needed = times * num_byzantine + 3
    if num_clients < needed:
        bearable = (num_clients - 3) // times
        instead = f", or lower num_byzantine to {bearable}" if bearable >= 0 else ", or use the median"
        raise ConfigError(
            f"{rule} with num_byzantine = {num_byzantine} must have at least {times}f + 3 = {needed} clients, got "
            f"{num_clients}; wait for more{instead}"
        )


def _best_first(rows: list[Tensor], num_byzantine: int, ids: Ids) -> list[int]:
    """The places of the rows, best score first, equal ones by id."""
    check_enough("krum", len(rows), num_byzantine, times=2)
    places = client_order(ids, len(rows))
    by_client = scores(squared_distances([rows[i] for i in places]), len(rows) - num_byzantine - 2)
    return [places[i] for i in by_client.sort(stable=True).indices.tolist()]

"""Bulyan: Krum chooses whom to hear, then each coordinate leaves out what lies furthest from the median.

1. theta = n - 2f times, Krum takes one of the deltas that are left.
2. Per coordinate: the mean of the beta = theta - 2f values of step 1 that are nearest to their median.

With f arbitrary clients among n, step 1 keeps more honest ones than arbitrary ones, and step 2 bounds every single
coordinate, which Krum alone does not: the distance of two deltas of many coordinates hides a large error in one.

Source: El Mhamdi, Guerraoui & Rouault, *The Hidden Vulnerability of Distributed Learning in Byzantium*, ICML 2018.

Limits: n >= 4f + 3. The scores of step 1 add r - f - 2 distances when r deltas are left; for the last choice with
f = 1 that would be none, and the nearest one is taken instead. Ties go to the lowest id, in both steps.
"""

import torch
from torch import Tensor

from distopt.federated.robust.coordinate_wise import middle, value_blocks
from distopt.federated.robust.distances import squared_distances
from distopt.federated.robust.krum import check_enough, scores
from distopt.federated.rows import Ids, Rows, ordered


@torch.no_grad()
def bulyan(deltas: Rows, num_byzantine: int, ids: Ids = None) -> Tensor:
    """The mean of the values nearest to the median, among the deltas that Krum chooses.

    Args:
        deltas: n flat floating-point tensors of d values, or one of shape (n, d).
        num_byzantine: f, how many of them may be arbitrary; 0 is the plain mean.
        ids: The client of each row; left out, the rows are in the order of the clients.

    Returns:
        (d,) in the dtype of the deltas, added up in float64.

    Raises:
        ConfigError: n < 4f + 3, or the deltas do not fit together.
    """
    rows = ordered("deltas", deltas, ids)
    check_enough("bulyan", len(rows), num_byzantine, times=4)
    num_chosen = len(rows) - 2 * num_byzantine
    chosen = [rows[i] for i in _choose(squared_distances(rows), num_byzantine, num_chosen)]
    out = torch.empty_like(rows[0])
    for target, values in value_blocks(chosen, out):
        target.copy_(_near_median(values.double(), num_chosen - 2 * num_byzantine).mean(dim=1))
    return out


def _choose(distances: Tensor, num_byzantine: int, num_chosen: int) -> list[int]:
    """Step 1: who is chosen, ascending."""
    left = list(range(len(distances)))
    chosen = []
    for _ in range(num_chosen):
        among = distances[left][:, left]
        best = int(scores(among, max(len(left) - num_byzantine - 2, 1)).argmin())  # the first of equal ones
        chosen.append(left.pop(best))
    return sorted(chosen)


def _near_median(values: Tensor, num_kept: int) -> Tensor:
    """Step 2: of each row of (coordinates, clients) the values nearest to the median, (coordinates, num_kept)."""
    centre = middle(values.sort(dim=1).values)
    nearest = (values - centre[:, None]).abs().sort(dim=1, stable=True).indices[:, :num_kept]
    return values.gather(1, nearest)

"""What a topology is worth on so many ranks: how fast it agrees, and what that costs."""

import dataclasses
import math

import numpy as np

from distopt.config import check_count
from distopt.errors import ConfigError
from distopt.gossip.graph import TOLERANCE, Graph
from distopt.gossip.topology import Topology

_FLOOR = 1e-12  # of disagreement: rounding
_SUDDEN = 1e-9  # what falls to the floor from above this has become exact, and did not creep there
_SAMPLED_ROUNDS = 200  # of topologies that never repeat
_MOST_ROUNDS = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """See `describe`.

    Attributes:
        num_ranks: n.
        period: Rounds after which the graphs begin again; None if they never do.
        directed: Whether some send to whom they do not receive from.
        keeps_mean: Whether the plain average keeps the mean; otherwise push-sum is needed.
        messages: Most that a rank sends in a round, averaged over the rounds.
        spectral_gap: 1 minus the factor by which a round shrinks the disagreement, in the long run.
        chi1: 1 / lambda_2 of the Laplacian in which each rank meets a random neighbour once per unit of time (A2CiD2,
            Nabli et al. 2023); None for directed graphs.
        chi2: Half the largest effective resistance of an edge of it; `sqrt(chi1 chi2)` is what A2CiD2 needs, where
            plain gossip needs chi1. None for directed graphs.
        exact_after: Rounds after which all ranks have the exact average, whatever they had; None if never.
        rounds_to_consensus: Until the disagreement is a thousandth of what it was, for the worst start; None beyond
            100,000.
        bytes_per_round: That the busiest rank sends in a round; None if the size of the model is not given.
    """

    num_ranks: int
    period: int | None
    directed: bool
    keeps_mean: bool
    messages: float
    spectral_gap: float
    chi1: float | None
    chi2: float | None
    exact_after: int | None
    rounds_to_consensus: int | None
    bytes_per_round: float | None


def describe(topology: Topology, num_ranks: int, *, model_bytes: int | None = None) -> Description:
    """How fast a topology agrees on so many ranks, and what it sends.

    Of a topology that never repeats, means over its first 200 rounds.

    Args:
        topology: Any.
        num_ranks: n; the work grows with its cube.
        model_bytes: Of one rank's tensors.

    Raises:
        ConfigError: There is no such graph, or it is not connected.
    """
    if model_bytes is not None:
        check_count("model_bytes", model_bytes, low=1, remedy="leave it out if it is not known")
    period = topology.period(num_ranks)
    graphs = [topology.graph(num_ranks, number) for number in range(period or _SAMPLED_ROUNDS)]
    check_connected(topology, num_ranks)
    sent = np.mean([[len(graph.receivers(rank)) for rank in range(num_ranks)] for graph in graphs], axis=0).max()
    undirected = not any(graph.directed for graph in graphs)
    chi1, chi2 = chis(mean_laplacian(graphs)) if undirected and num_ranks > 1 else (None, None)
    exact, thousandth, factor = _agreement(topology, num_ranks, len(graphs))
    return Description(
        num_ranks=num_ranks,
        period=period,
        directed=not undirected,
        keeps_mean=all(graph.keeps_mean for graph in graphs),
        messages=float(sent),
        spectral_gap=1.0 - factor,
        chi1=chi1,
        chi2=chi2,
        exact_after=exact,
        rounds_to_consensus=thousandth,
        bytes_per_round=None if model_bytes is None else float(sent) * model_bytes,
    )


def check_connected(topology: Topology, num_ranks: int) -> None:
    """Raises `ConfigError` unless what one rank has reaches all others, in as many rounds as that may take."""
    period = topology.period(num_ranks) or _SAMPLED_ROUNDS
    reached = np.eye(num_ranks, dtype=bool)
    for start in range(num_ranks):
        before = reached
        for number in range(start * period, (start + 1) * period):
            reached = (topology.graph(num_ranks, number).weights > 0).astype(np.float64) @ reached > 0
        if reached.all():
            return
        if (reached == before).all():
            break
    from_rank = int(np.argmin(reached.all(0)))
    cut_off = np.flatnonzero(~reached[:, from_rank]).tolist()
    raise ConfigError(
        f"the graph must be connected, got {topology.to_dict()!r:.200} in which nothing of rank {from_rank} reaches "
        f"ranks {', '.join(map(str, cut_off[:8]))}{', ...' if len(cut_off) > 8 else ''}; add edges between them"
    )


def mean_laplacian(graphs: list[Graph]) -> np.ndarray:
    """(n, n), the Laplacian of gossip in which each rank meets one of its neighbours, drawn evenly, per unit of time.

    The rate of an edge is `(1/d_i + 1/d_j) / 2`; a rank without neighbours in a round meets nobody in it.
    """
    total = np.zeros_like(graphs[0].weights)
    for graph in graphs:
        adjacent = (graph.weights > 0) & ~np.eye(graph.num_ranks, dtype=bool)
        chosen = adjacent / np.maximum(adjacent.sum(1, keepdims=True), 1)
        rates = (chosen + chosen.T) / 2
        total += np.diag(rates.sum(1)) - rates
    return total / len(graphs)


def chis(laplacian: np.ndarray) -> tuple[float, float]:
    """chi1, the inverse of the least non-zero eigenvalue, and chi2, half the largest resistance of an edge.

    As in A2CiD2 (Nabli, Belilovsky and Oyallon 2023).
    """
    values = np.linalg.eigvalsh(laplacian)
    if values[1] <= TOLERANCE:
        return math.inf, math.inf
    inverse = np.linalg.pinv(laplacian, hermitian=True)
    diagonal = np.diag(inverse)
    resistance = diagonal[:, None] + diagonal[None, :] - 2 * inverse
    joined = (laplacian < -TOLERANCE) & ~np.eye(len(laplacian), dtype=bool)
    return float(1.0 / values[1]), float(resistance[joined].max() / 2)


def _agreement(topology: Topology, num_ranks: int, rounds: int) -> tuple[int | None, int | None, float]:
    """Rounds to the exact average and to a thousandth of the disagreement, and the factor of a round in the long run.

    A directed graph that does not keep the mean converges to a weighted one: it is measured against that, as push-sum's
    ratio undoes the weights.
    """
    product = np.eye(num_ranks)
    exact = thousandth = None
    left, slope = 1.0, 0.0
    for number in range(1, rounds + 1):
        product = topology.graph(num_ranks, number - 1).weights @ product
        before, left = left, disagreement(product)
        if left <= _FLOOR < before:
            exact = number if before > _SUDDEN else None
            break
        slope = left ** (1 / number)
        if left <= 1e-3 and thousandth is None:
            thousandth = number
    if exact is not None:
        return exact, thousandth or exact, 0.0
    if topology.period(num_ranks) is None:
        return None, thousandth, slope
    factor = float(np.sort(np.abs(np.linalg.eigvals(product)))[-2]) ** (1 / rounds)
    if thousandth is None and factor < 1:
        thousandth = _rounds_by_squaring(product, rounds)
    return None, thousandth, factor


def disagreement(product: np.ndarray) -> float:
    """The part of the disagreement that is left behind weights, for the worst start: between 0 and about 1.

    Of push-sum's ratios: each row divided by its sum, then the largest singular value off the mean.
    """
    rows = product / product.sum(1, keepdims=True)
    return float(np.linalg.norm(rows - rows.mean(0), 2))


def _rounds_by_squaring(product: np.ndarray, rounds: int) -> int | None:
    """The least multiple of `rounds` whose product leaves at most a thousandth."""
    powers = [product]
    while disagreement(powers[-1]) > 1e-3:
        if rounds << len(powers) > 2 * _MOST_ROUNDS:
            return None
        powers.append(powers[-1] @ powers[-1])
    done, periods = np.eye(len(product)), 0
    for power in reversed(range(len(powers) - 1)):
        if disagreement(further := powers[power] @ done) > 1e-3:
            done, periods = further, periods + (1 << power)
    found = (periods + 1) * rounds
    return found if found <= _MOST_ROUNDS else None

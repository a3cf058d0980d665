"""Asynchronous gossip, event by event in one process: gradients and exchanges come at random times, nobody waits.

Nabli, Belilovsky and Oyallon, "A2CiD2: Accelerating Asynchronous Communication in Decentralized Deep Learning", NeurIPS
2023, algorithm 1, and plain asynchronous gossip, which is the same without the second vector. Real ranks use
`Gossip(mixing="a2cid2", exchange="asynchronous")`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distopt.config import check_count, check_number
from distopt.errors import ConfigError
from distopt.gossip.clocks import PoissonClocks
from distopt.gossip.description import check_connected, mean_laplacian
from distopt.gossip.mixing.a2cid2 import constants, flow_
from distopt.gossip.topology import Topology, make_topology

_PLAIN = 0.0, 0.5  # eta and alpha with which both vectors stay the same


@dataclass
class AsynchronousHistory:
    """What happened.

    Attributes:
        rows: One for each look: "time", "gradients" by all nodes and "messages" (edges used) so far,
            "consensus_distance" (root of the mean over nodes of the squared distance to their mean), and what
            `evaluate` has said.
        models: (n, d), the last ones.
        copies: (n, d), the second vectors, equal to the models without acceleration.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    models: Tensor = field(default_factory=lambda: torch.empty(0))
    copies: Tensor = field(default_factory=lambda: torch.empty(0))


class _Nodes:
    """Both vectors of all nodes, each at the time of its own last event."""

    def __init__(self, start: Tensor, eta: float, alpha: float) -> None:
        self.rows, self.copies = start.clone(), start.clone()
        self._times = [0.0] * len(start)
        self._eta, self._alpha = eta, alpha

    def advance(self, node: int, time: float) -> None:
        if self._eta:
            flow_(self.rows[node], self.copies[node], self._eta, time - self._times[node])
        self._times[node] = time

    def update(self, node: int, change: Tensor) -> None:
        self.rows[node] += change
        self.copies[node] += change

    def meet(self, i: int, j: int) -> None:
        difference = self.rows[i] - self.rows[j]
        self.rows[i].sub_(difference, alpha=0.5)
        self.rows[j].add_(difference, alpha=0.5)
        self.copies[i].sub_(difference, alpha=self._alpha)
        self.copies[j].add_(difference, alpha=self._alpha)


def simulate_asynchronous(
    *,
    start: Tensor,
    topology: Topology | str,
    duration: float,
    accelerated: bool = True,
    rate: float = 1.0,
    gradient: Callable[[int, Tensor], Tensor] | None = None,
    lr: float = 0.0,
    look_every: float = 1.0,
    evaluate: Callable[[Tensor], Mapping[str, float]] | None = None,
    until: Callable[[Mapping[str, float]], bool] | None = None,
    seed: int = 0,
) -> AsynchronousHistory:
    """Runs asynchronous gossip among the rows of `start`.

    The same arguments give the same history to the bit; `accelerated` does not change when things happen.

    Args:
        start: (n, d), the first models.
        topology: Undirected, the same in every round.
        duration: In units of time, in which each node computes one gradient on average.
        accelerated: With A2CiD2's second vector, or plain gossip: two nodes that meet take their average.
        rate: How often a node takes part in an exchange per unit of time, on average over the nodes. Nodes choose their
            partners evenly among their neighbours.
        gradient: `gradient(node, x)`, (d,); None for gossip alone.
        lr: Of the gradients.
        look_every: In units of time.
        evaluate: Numbers of the models, (n, d), at each look.
        until: Ends at the first look where it is true of the row.
        seed: Of the clocks.

    Raises:
        ConfigError: A value breaks its rule, or the graph does not fit.
    """
    rule, remedy = "a positive number", "use 1.0"
    check_number("duration", duration, rule=rule, remedy="use 100.0", low=0.0, high=1e9)
    check_number("rate", rate, rule=rule, remedy=remedy, low=0.0, high=1e6)
    check_number("look_every", look_every, rule=rule, remedy=remedy, low=0.0, high=1e9)
    check_count("the number of rows of start", len(start), low=2, remedy="give a row for each of two or more nodes")
    made, count = make_topology(topology), len(start)
    if made.period(count) != 1 or made.graph(count).directed:
        raise ConfigError(
            f"asynchronous gossip needs an undirected graph that stays the same, got {made.name!r}; use 'ring', say"
        )
    check_connected(made, count)
    graph = made.graph(count)
    laplacian = rate * mean_laplacian([graph])
    nodes = _Nodes(start, *(constants(laplacian) if accelerated else _PLAIN))
    clocks = PoissonClocks(count, {(i, j): -float(laplacian[i, j]) for i, j in graph.edges}, seed)
    history, gradients, messages, look = AsynchronousHistory(), 0, 0, look_every
    while True:
        event = clocks.tick()
        while look <= min(clocks.time, duration):
            row = _seen(nodes, look, evaluate)
            history.rows.append({"time": look, "gradients": float(gradients), "messages": float(messages), **row})
            look = (len(history.rows) + 1) * look_every
            if until is not None and until(history.rows[-1]):
                return _ended(history, nodes)
        if clocks.time > duration:
            return _ended(history, nodes)
        if isinstance(event, tuple):
            for node in event:
                nodes.advance(node, clocks.time)
            nodes.meet(*event)
            messages += 1
        else:
            nodes.advance(event, clocks.time)
            if gradient is not None:
                nodes.update(event, gradient(event, nodes.rows[event]) * -lr)
            gradients += 1


def _seen(nodes: _Nodes, time: float, evaluate: Callable[[Tensor], Mapping[str, float]] | None) -> dict[str, float]:
    for node in range(len(nodes.rows)):
        nodes.advance(node, time)
    away = nodes.rows - nodes.rows.mean(0)
    found = {"consensus_distance": float(away.double().square().sum(1).mean().sqrt())}
    return found if evaluate is None else {**found, **evaluate(nodes.rows)}


def _ended(history: AsynchronousHistory, nodes: _Nodes) -> AsynchronousHistory:
    history.models, history.copies = nodes.rows, nodes.copies
    return history

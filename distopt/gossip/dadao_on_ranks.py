"""DADAO between real ranks, a node each.

The clocks of all nodes and edges are drawn from one seed, so each rank knows the order of all events by itself. It
computes the gradients that are its own, exchanges a vector with its partner in the edges that are its own, and waits
for nobody else: as all pairs take their events in one order, ranks never wait for each other in a circle. The result is
that of `simulate_dadao` to the bit.

Limits: time is the clocks', not the wall's, so a rank that is slow keeps its partners waiting at their common events. A
rank that dies ends the job.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.comm import agree
from distopt.config import check_count
from distopt.errors import CompatibilityError, DistoptError, PeerLostError
from distopt.gossip.clocks import PoissonClocks
from distopt.gossip.dadao import DadaoNode, prepare
from distopt.gossip.topology import Topology
from distopt.version import __version__

_CPU = torch.device("cpu")


def run_dadao(
    gradient: Callable[[Tensor], Tensor],
    *,
    start: Tensor,
    smoothness: float,
    strong_convexity: float,
    topology: Topology | str,
    num_gradients: int,
    rates: dict[tuple[int, int], float] | None = None,
    seed: int = 0,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Minimises the sum of the ranks' functions. Collective.

    Args:
        gradient: Of this rank's function, (d,) float64 to (d,).
        start: (d,), this rank's; it may differ from the others'.
        smoothness: L, of every rank's function.
        strong_convexity: mu, of every rank's function.
        topology: Undirected, the same in every round.
        num_gradients: By all ranks together.
        rates: Of the edges, relative to each other; see `optimal_edge_rates`.
        seed: Of the clocks.
        process_group: The ranks, with a backend for the CPU such as gloo; all by default.

    Returns:
        (d,) float64, the minimiser, as this rank has it.

    Raises:
        ConfigError: A value breaks its rule.
        CompatibilityError: There is no process group, or another rank cannot begin.
        DesyncError: The ranks have different settings or sizes; names both.
        PeerLostError: A partner has gone.
    """
    group = process_group if process_group is not None else _world()
    problem: DistoptError | None = None
    told = None
    try:
        check_count("num_gradients", num_gradients, low=1, remedy="use 10000")
        per_edge, constants = prepare(topology, group.size(), smoothness, strong_convexity, rates)
        told = {
            "distopt version": __version__,
            "size": tuple(start.shape),
            "settings": [repr(constants), sorted(per_edge.items()), num_gradients, seed],
        }
    except DistoptError as error:
        problem = error
    agree(told, problem, group, _CPU)
    rank, node = group.rank(), DadaoNode(start.double(), constants)
    clocks, gradients = PoissonClocks(group.size(), per_edge, seed), 0
    while gradients < num_gradients:
        event = clocks.tick()
        if isinstance(event, int):
            gradients += 1
        if event == rank:
            node.advance(clocks.time)
            node.take_gradient(gradient)
        elif isinstance(event, tuple) and rank in event:
            node.advance(clocks.time)
            own = node.message.clone()
            node.meet(own, _swapped(own, event[event[0] == rank], group))
    node.advance(clocks.time)
    return node.vectors[0].clone()


def _swapped(own: Tensor, partner: int, group: dist.ProcessGroup) -> Tensor:
    arrived = torch.empty_like(own)
    try:
        sent, got = group.send([own], partner, 0), group.recv([arrived], partner, 0)
        sent.wait()
        got.wait()
    except RuntimeError as error:
        raise PeerLostError(f"rank {partner} has gone; start again from the last result", [partner]) from error
    return arrived


def _world() -> dist.ProcessGroup:
    if not dist.is_initialized() or dist.group.WORLD is None:
        raise CompatibilityError(
            "there must be a process group, got none; call init_process_group('gloo'), or use simulate_dadao"
        )
    return dist.group.WORLD

"""A2CiD2: continuous local momentum between two copies of the model, for graphs that agree slowly."""

import dataclasses
import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from distopt.errors import ConfigError
from distopt.gossip.correction import Correction
from distopt.gossip.description import chis, mean_laplacian
from distopt.gossip.mixing.mixer import Mixer
from distopt.gossip.mixing.rule import Mixing, State, Surroundings

_SAMPLED_ROUNDS = 200  # of topologies that never repeat


def constants(laplacian: np.ndarray) -> tuple[float, float]:
    """Eta and alpha for a graph whose edges are used at the rates of this Laplacian, per unit of time.

    The unit is that in which a rank computes one gradient. See `A2CiD2`.
    """
    chi1, chi2 = chis(laplacian)
    return 1 / (2 * math.sqrt(chi1 * chi2)), math.sqrt(chi1 / chi2) / 2


def flow_(rows: Tensor, copies: Tensor, eta: float, time: float) -> None:
    """Both vectors move towards each other, in place, for so long."""
    toward = -math.expm1(-2 * eta * time) / 2
    difference = (copies - rows).mul_(toward)
    rows.add_(difference)
    copies.sub_(difference)


@dataclasses.dataclass(frozen=True)
class A2CiD2(Mixing, name="a2cid2"):
    """Two vectors x and y, which flow into each other; each update goes to both, each exchange further into y.

    Between exchanges dt apart (in units of a gradient's time) `x, y <- ((1+e) x + (1-e) y)/2, ((1-e) x + (1+e) y)/2`
    with `e = exp(-2 eta dt)`; where two ranks meet, with m = x_i - x_j as it was after that, `x -= m/2; y -= alpha m`.
    `eta = 1/(2 sqrt(chi1 chi2))`, `alpha = sqrt(chi1/chi2)/2`, of the graph at the rate of its exchanges (Nabli,
    Belilovsky and Oyallon, "A2CiD2", NeurIPS 2023, algorithm 1). Pays on rings and other graphs whose chi1 is much
    larger than their chi2, on complete and exponential ones it does nothing.

    Meant for `exchange="asynchronous"`. Two that meet first agree on the time, the later of their clocks, then flow
    until then, and exchange what they have there: with one order of events for all, the mean of x is kept, and not
    only that of x + y. Of y, only y - x is remembered: the optimizer's updates, which go to both, leave it as it is.
    """

    can_overlap: ClassVar[bool] = True

    def check(self, around: Surroundings) -> None:
        """See `Mixing.check`."""
        self._constants(around)

    def begin(self, rows: Tensor, around: Surroundings) -> State:
        """See `Mixing.begin`."""
        clock = torch.zeros((len(rows), 1), dtype=torch.float64, device=rows.device)
        return {
            "difference": torch.zeros_like(rows),
            "now": clock,  # of the rank's own clock
            "ahead": clock.clone(),  # by so much others' clocks have been later
            "flowed": clock.clone(),  # until when
            "constants": torch.tensor(self._constants(around), dtype=torch.float64),
        }

    def at_(self, state: State, now: float) -> None:
        """See `Mixing.at_`."""
        state["now"].fill_(now)

    def regroup_(self, state: State, rows: Tensor, around: Surroundings) -> None:
        """See `Mixing.regroup_`: both vectors are the model again; differences whose partners are gone have a mean."""
        state["difference"].zero_()
        state["constants"].copy_(torch.tensor(self._constants(around), dtype=torch.float64))

    def exchange_(
        self, state: State, rows: Tensor, mixer: Mixer, lr: Tensor | float, correction: Correction | None
    ) -> None:
        """See `Mixing.exchange_`."""
        own = torch.maximum(state["now"] + state["ahead"], state["flowed"])
        (mean,) = mixer.mix(own)
        self._flow_until_(state, rows, torch.maximum(own, 2 * mean - own))
        half = rows - mixer.mix(rows)[0]  # of what lies between the two that meet
        rows.sub_(half)
        state["difference"].sub_(half, alpha=2 * float(state["constants"][1]) - 1)

    def clock(self, state: State) -> float:
        """See `Mixing.clock`."""
        return float((state["now"] + state["ahead"]).max())

    def level_(self, state: State, rows: Tensor, clock: float) -> None:
        """See `Mixing.level_`."""
        self._flow_until_(state, rows, torch.full_like(state["now"], clock))

    def _flow_until_(self, state: State, rows: Tensor, time: Tensor) -> None:
        eta, difference = float(state["constants"][0]), state["difference"]
        lost = -torch.expm1(-2 * eta * (time - state["flowed"])).to(rows.dtype)
        rows.addcmul_(difference, lost, value=0.5)
        difference.mul_(1 - lost)
        state["ahead"].copy_(time - state["now"])
        state["flowed"].copy_(time)

    def _constants(self, around: Surroundings) -> tuple[float, float]:
        n, topology = around.num_ranks, around.topology
        graphs = [topology.graph(n, number) for number in range(topology.period(n) or _SAMPLED_ROUNDS)]
        if any(graph.directed or any(len(graph.receivers(rank)) > 1 for rank in range(n)) for graph in graphs):
            raise ConfigError(
                f"a2cid2 must have ranks that meet in pairs, got {topology.name!r}; use random matchings of it, "
                "distopt.gossip.RandomMatchings(of=...)"
            )
        if any(not np.isin(graph.weights, (0.0, 0.5, 1.0)).all() for graph in graphs):
            raise ConfigError(
                f"ranks that meet for a2cid2 must take half of each other, got other weights in {topology.name!r}; use "
                "distopt.gossip.RandomMatchings(of=...)"
            )
        return constants(mean_laplacian(graphs) / around.every) if n > 1 else (1.0, 0.5)

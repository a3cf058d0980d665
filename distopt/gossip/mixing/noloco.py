"""NoLoCo: local steps, then outer momentum over random pairs."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from distopt.config import check_number
from distopt.gossip.correction import Correction
from distopt.gossip.mixing.mixer import Mixer
from distopt.gossip.mixing.rule import Mixing, State, Surroundings


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoLoCo(Mixing, name="noloco"):
    """After many local steps from phi to theta: `m <- a m + b mean(theta - phi) + c (mean(phi) - phi); phi <- phi + m`.

    Means over the rank and those that it meets in the round, and theta = phi for the next steps (Kolehmainen et al.,
    "NoLoCo: No-all-reduce Low Communication Training Method for Large Models", 2025). Meant for random pairs and
    `every=50`. Messages are twice as long as the model.
    """

    momentum: float = 0.5  # a; larger remembers more rounds
    outer_lr: float = 0.7  # b; of what the local steps did
    pull: float = 0.7  # c; larger brings the ranks together faster

    needs_mean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, high in (("momentum", 1.0 - 1e-9), ("outer_lr", 10.0), ("pull", 2.0)):
            rule, remedy = f"a number above 0 and at most {high:.3g}", "leave it out"
            check_number(name, getattr(self, name), rule=rule, remedy=remedy, low=0.0, high=high)

    def begin(self, rows: Tensor, around: Surroundings) -> State:
        """See `Mixing.begin`."""
        return {"slow": rows.clone(), "momentum": torch.zeros_like(rows)}

    def regroup_(self, state: State, rows: Tensor, around: Surroundings) -> None:
        """See `Mixing.regroup_`: the pulls in the momenta cancel over those who were there, not over these."""
        state["momentum"].zero_()

    def exchange_(
        self, state: State, rows: Tensor, mixer: Mixer, lr: Tensor | float, correction: Correction | None
    ) -> None:
        """See `Mixing.exchange_`."""
        slow, momentum = state["slow"], state["momentum"]
        went, average = mixer.mix(rows - slow, slow)
        momentum.mul_(self.momentum).add_(went, alpha=self.outer_lr).add_(average - slow, alpha=self.pull)
        slow.add_(momentum)
        rows.copy_(slow)

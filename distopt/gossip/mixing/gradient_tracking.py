"""Gradient tracking."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from distopt.errors import ConfigError
from distopt.gossip.correction import Correction
from distopt.gossip.mixing.mixer import Mixer
from distopt.gossip.mixing.rule import Mixing, State, Surroundings


@dataclasses.dataclass(frozen=True)
class GradientTracking(Mixing, name="gradient-tracking"):
    """Each rank steps along an estimate y of the mean gradient: exact with a constant rate, also on different data.

    `y <- W y + g - g_before; x <- W (x - lr y)`, with y = g in the first step (Di Lorenzo and Scutari 2016; Nedic,
    Olshevsky and Shi 2017; Pu and Nedic 2021 with stochastic gradients). The mean of the y is that of the gradients.
    The optimizer is SGD without momentum, and messages are twice as long.
    """

    replaces_momentum: ClassVar[bool] = True

    def check(self, around: Surroundings) -> None:
        """See `Mixing.check`."""
        if around.every != 1:
            raise ConfigError(
                f"gradient-tracking must exchange in every step, got every={around.every}; use every=1, or d-psgd"
            )

    def begin(self, rows: Tensor, around: Surroundings) -> State:
        """See `Mixing.begin`."""
        return {"tracked": torch.zeros_like(rows), "gradient": torch.zeros_like(rows)}

    def gradient_(self, state: State, grads: Tensor) -> None:
        """See `Mixing.gradient_`."""
        state["tracked"].add_(grads).sub_(state["gradient"])
        state["gradient"].copy_(grads)
        grads.copy_(state["tracked"])

    def regroup_(self, state: State, rows: Tensor, around: Surroundings) -> None:
        """See `Mixing.regroup_`: the mean of the estimates becomes that of the gradients of those that are there."""
        state["tracked"].copy_(state["gradient"])

    def exchange_(
        self, state: State, rows: Tensor, mixer: Mixer, lr: Tensor | float, correction: Correction | None
    ) -> None:
        """See `Mixing.exchange_`."""
        mixed, tracked = mixer.mix(rows, state["tracked"])
        rows.copy_(mixed)
        state["tracked"].copy_(tracked)

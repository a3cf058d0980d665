"""Push-sum, also called stochastic gradient push: averages on directed graphs."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from distopt.gossip.correction import Correction
from distopt.gossip.mixing.mixer import Mixer
from distopt.gossip.mixing.rule import Mixing, State, Surroundings


@dataclasses.dataclass(frozen=True)
class PushSum(Mixing, name="push-sum"):
    """Biased sums x and weights w travel; the model is z = x / w, at which gradients are taken.

    `x <- P (x - lr g(z)); w <- P w; z = x / w` with columns of P that add up to 1 (Assran et al., "Stochastic Gradient
    Push for Distributed Deep Learning", ICML 2019, algorithm 1). The sum of the x over the ranks is kept, and on any
    strongly connected graph the z converge to the mean. Where the weights keep the mean by themselves w stays 1, and
    this is D-PSGD.

    Of x, only x - z is remembered: the optimizer's steps between exchanges, which change z and x alike, leave it as it
    is. In an exchange that overlaps with them, what is under way counts as the sender's until it has arrived.
    """

    needs_mean: ClassVar[bool] = False
    can_correct: ClassVar[bool] = True
    can_overlap: ClassVar[bool] = True

    def begin(self, rows: Tensor, around: Surroundings) -> State:
        """See `Mixing.begin`."""
        weight = torch.ones((len(rows), 1), dtype=torch.float64, device=rows.device)
        return {"weight": weight, "bias": torch.zeros_like(rows)}

    def regroup_(self, state: State, rows: Tensor, around: Surroundings) -> None:
        """See `Mixing.regroup_`: all weights are 1 again, and the mean of these models is kept."""
        state["weight"].fill_(1.0)
        state["bias"].zero_()

    def exchange_(
        self, state: State, rows: Tensor, mixer: Mixer, lr: Tensor | float, correction: Correction | None
    ) -> None:
        """See `Mixing.exchange_`. The optimizer's steps since the last exchange count for x as they are, see SGP."""
        weight = state["weight"]
        biased = rows + state["bias"]
        if correction is None:
            mixed, pushed = mixer.mix(biased, weight)
            rows.copy_(mixed / pushed.to(mixed.dtype))
        else:  # the weights of an average of z are P_ij w_j / w_i
            variances = weight * correction.variances(rows)
            mixed, pushed, targets, squares = mixer.mix(biased, weight, variances, by_squares=weight.square())
            rows.copy_(mixed / pushed.to(mixed.dtype))
            correction.restore_(rows, targets / pushed, (squares / pushed.square()).squeeze(1))
        weight.copy_(pushed)
        torch.mul(rows, (pushed - 1).to(rows.dtype), out=state["bias"])

"""Quasi-global momentum."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from distopt.config import check_number
from distopt.gossip.correction import Correction
from distopt.gossip.mixing.mixer import Mixer
from distopt.gossip.mixing.rule import Mixing, State, Surroundings, average_


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuasiGlobalMomentum(Mixing, name="quasi-global-momentum"):
    """Momentum of what the averaged model does, instead of the local gradients: for ranks with different data.

    `x <- W (x - lr (g + beta m)); m <- beta m + (1 - beta) (x_before - x) / lr` (Lin et al., "Quasi-Global Momentum",
    ICML 2021, algorithm 1). The optimizer is SGD without momentum. With several steps between exchanges, x_before is
    the model after the last exchange, and lr the sum of theirs.
    """

    beta: float = 0.9  # larger remembers longer

    can_correct: ClassVar[bool] = True
    replaces_momentum: ClassVar[bool] = True

    def __post_init__(self) -> None:
        rule, remedy = "a number above 0 and below 1", "use 0.9"
        check_number("beta", self.beta, rule=rule, remedy=remedy, low=0.0, high=1.0 - 1e-9)

    def begin(self, rows: Tensor, around: Surroundings) -> State:
        """See `Mixing.begin`."""
        steps = torch.zeros((), dtype=torch.int64)
        return {"momentum": torch.zeros_like(rows), "before": rows.clone(), "steps": steps}

    def gradient_(self, state: State, grads: Tensor) -> None:
        """See `Mixing.gradient_`."""
        grads.add_(state["momentum"], alpha=self.beta)

    def stepped_(self, state: State, rows: Tensor) -> None:
        """See `Mixing.stepped_`."""
        state["steps"] += 1

    def exchange_(
        self, state: State, rows: Tensor, mixer: Mixer, lr: Tensor | float, correction: Correction | None
    ) -> None:
        """See `Mixing.exchange_`."""
        average_(rows, mixer, correction)
        went = _quotient(state["before"] - rows, lr * int(state["steps"]))
        state["momentum"].mul_(self.beta).add_(went, alpha=1 - self.beta)
        state["before"].copy_(rows)
        state["steps"].zero_()


def _quotient(moved: Tensor, rates: Tensor | float) -> Tensor:
    """Zero where the rate is zero, as at the start of a warm-up: no step was taken there."""
    if isinstance(rates, Tensor):
        return torch.where(rates > 0, moved / rates, 0.0)
    return moved / rates if rates else torch.zeros_like(moved)

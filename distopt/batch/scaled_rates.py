"""A learning-rate rule at work: the rates of an optimizer are multiplied for the time of its step."""

from typing import Any

import torch
from torch import Tensor


class ScaledRates:
    """The learning rates of an optimizer, which a factor changes from `scale` to `restore`, and for nobody else.

    Schedulers and users see their own rates between steps.

    Args:
        optimizer: The user's.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._before: list[Any] | None = None

    def scale(self, factor: float) -> None:
        """Multiplies the rates; of a step that has failed, gives them back first."""
        self.restore()
        if factor == 1.0:
            return
        self._before = []
        for group in self._optimizer.param_groups:
            rate = group["lr"]
            if isinstance(rate, Tensor):  # a captured graph reads this very tensor
                self._before.append(rate.clone())
                rate.mul_(factor)
            else:
                self._before.append(rate)
                group["lr"] = rate * factor

    def restore(self) -> None:
        """Gives the rates back, to the bit."""
        before, self._before = self._before, None
        for group, rate in zip(self._optimizer.param_groups, before or (), strict=False):
            if isinstance(rate, Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate

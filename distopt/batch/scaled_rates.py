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
        self._before = [_value(group["lr"]) for group in self._optimizer.param_groups]
        tensors = {}
        for group in self._optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # groups may share one, which is to be multiplied once
                tensors[id(group["lr"])] = group["lr"]
            else:
                group["lr"] *= factor
        for rate in tensors.values():
            rate.mul_(factor)  # in place: a captured graph reads this very tensor

    def restore(self) -> None:
        """Gives the rates back, to the bit."""
        before, self._before = self._before, None
        for group, rate in zip(self._optimizer.param_groups, before or (), strict=False):
            if isinstance(rate, Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate


def _value(rate: Any) -> Any:
    return rate.clone() if isinstance(rate, Tensor) else rate

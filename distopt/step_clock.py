"""Counting an optimizer's steps, also those that a gradient scaler skips: so ranks that exchange stay in step."""

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Scaler(Protocol):
    """What is needed of a `torch.amp.GradScaler`."""

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Takes the optimizer's step, or skips it."""


class StepClock:
    """Calls `tick` after each step of the optimizer, and after each that the scaler skips, until `stop`.

    A step that is skipped fires no hook of the optimizer; the other ranks, whose gradients were finite, do not know
    and would wait.

    Args:
        optimizer: Any.
        scaler: That steps it, if one does; its `step` is replaced by one that looks whether the optimizer's was called.
        tick: What is to be done.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: Scaler | None, tick: Callable[[], None]) -> None:
        self._tick = tick
        self._ticked = False
        self._handle = optimizer.register_step_post_hook(self._after_step)
        self._undo = None if scaler is None else self._watch(scaler, optimizer)

    def stop(self) -> None:
        """Gives the optimizer and the scaler back as they were."""
        self._handle.remove()
        if self._undo is not None:
            self._undo()

    def _after_step(self, *_: Any) -> None:
        self._ticked = True
        self._tick()

    def _watch(self, scaler: Scaler, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        original = scaler.step

        def step(stepped: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            if stepped is not optimizer:
                return original(stepped, *args, **kwargs)
            self._ticked = False
            result = original(stepped, *args, **kwargs)
            if not self._ticked:
                self._tick()
            return result

        scaler.step = step  # type: ignore[method-assign, assignment]

        def undo() -> None:
            if vars(scaler).get("step") is step:
                del scaler.step

        return undo

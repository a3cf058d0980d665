"""Linear decay of the learning rate, and its refinement from the gradient norms of an earlier run.

Source: Defazio, Cutkosky, Mehta and Mishchenko, *When, Why and How Much? Adaptive Learning Rate Scheduling by
Refinement*, 2310.07831: linear decay is the best schedule where nothing is known but a bound of the gradients; with
their norms known, `eta_t = w_t * (sum of w_p over p > t)` with `w_t` from the norm of step t is, which warms up and
falls fast at the end by itself.

Limits: a refined schedule belongs to the optimizer, model and data of the run whose norms it is made of, and to about
its length. Norms are those that the optimizer sees: beside a sparse algorithm of the sparse updates. As in the paper
the last factor of a refined schedule is 0.
"""

import dataclasses
import math
import warnings
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from distopt.config import check_count, check_number
from distopt.errors import ConfigError

_RERUN = "record the norms of a whole run by GradientNorms"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefinedDecay:
    """A refined schedule: learning-rate factors, and where in a run they are; between two places the factor is between.

    Plain numbers: `json.dumps(dataclasses.asdict(refined))` keeps it, `RefinedDecay(**json.loads(...))` is equal to it.

    Raises:
        ConfigError: The two do not fit each other, or break their rules.
    """

    at: tuple[float, ...]  # parts of a run, from 0, ascending and below 1: where each factor's step begins
    factors: tuple[float, ...]  # in [0, 1]

    def __post_init__(self) -> None:
        for name in ("at", "factors"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        rises = all(a < b for a, b in zip(self.at, (*self.at[1:], 1.0), strict=True))
        if len(self.at) != len(self.factors) or not self.at or self.at[0] != 0.0 or not rises:
            raise ConfigError(
                f"at must rise from 0 to below 1, a place for each factor, got {len(self.at)} places for "
                f"{len(self.factors)} factors: {self.at[:3]}...; {_RERUN}"
            )
        if not all(0.0 <= factor <= 1.0 for factor in self.factors):
            raise ConfigError(f"factors must be in [0, 1], got {self.factors[:3]}...; {_RERUN}")


class LinearDecay(LRScheduler):
    """The learning rate falls in proportion to what is left of a run, after a warm-up, or as a refined schedule says.

    It counts in steps (`step()`) or, where the batch may grow, in samples: `advance_to(batch.stats()["samples"])` after
    each step.

    Args:
        optimizer: Whose learning rates it sets; those that they have now are the largest ones.
        total: Length of the run, in steps or samples.
        warmup: Length of a linear warm-up in it, likewise: at its end the rate is the optimizer's own, and from there
            on it falls to 0 at `total`.
        refined: A refined schedule, to be followed in place of the straight line, stretched to `total`.
        last_epoch: As for other schedulers of torch: what is done of `total`, or -1 at the start.

    Raises:
        ConfigError: A length breaks its rule, or there is a warm-up beside a refined schedule.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total: int,
        *,
        warmup: int = 0,
        refined: RefinedDecay | None = None,
        last_epoch: int = -1,
    ) -> None:
        check_count("total", total, low=1, remedy="give the length of the run in steps or samples")
        check_count("warmup", warmup, low=0, remedy="use a twentieth of total, or 0 for none")
        if warmup >= total:
            raise ConfigError(f"warmup must be below total={total}, got {warmup!r}; use a twentieth of it")
        if warmup and refined is not None:
            raise ConfigError(
                f"warmup must be 0 beside a refined schedule, got {warmup!r}; it has the warm-up that it needs"
            )
        self.total = total
        self.warmup = warmup
        # plain numbers, for state_dict()
        self.refined = None if refined is None else dataclasses.asdict(refined)
        super().__init__(optimizer, last_epoch)

    def factor_at(self, done: int) -> float:
        """The factor of the step before which `done` steps or samples have been: a pure function; 0 after the end."""
        if done >= self.total:
            return 0.0
        if self.refined is not None:
            return float(np.interp(done / self.total, self.refined["at"], self.refined["factors"]))
        if done < self.warmup:
            return (done + 1) / (self.warmup + 1)
        return (self.total - done) / (self.total - self.warmup)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rates of the groups now; see `torch.optim.lr_scheduler.LRScheduler.get_lr`."""
        factor = self.factor_at(self.last_epoch)
        return [base * factor for base in self.base_lrs]

    _get_closed_form_lr = get_lr

    def advance_to(self, done: int) -> None:
        """So many steps or samples of the run are done: sets the learning rate of the next step.

        Raises:
            ConfigError: `done` is less than before, or no count.
        """
        check_count("done", done, low=0, remedy="count the samples of all steps so far over all ranks")
        if done < self.last_epoch:
            raise ConfigError(
                f"done must not fall, got {done} after {self.last_epoch}; count from the beginning of the run, not of "
                "an epoch or a step"
            )
        if self.last_epoch >= self.total:
            warnings.warn(
                f"the learning rate has been 0 since {self.total} steps or samples were done; give LinearDecay a "
                "larger total, or stop there",
                stacklevel=2,
            )
        self.last_epoch = done - 1  # the last one is counted by `step`
        self.step()


class GradientNorms:
    """Records the norm of all gradients before each step of an optimizer, for a refined schedule.

    Nothing is waited for: on an accelerator the norms stay there until they are looked at.

    Args:
        optimizer: Whose gradients to look at, before its step.
        order: 2 for SGD and its kin, 1 for Adam and its kin, as the paper derives the weights.
        samples: Called before each step for the number of samples of the run so far, over all ranks, the step's own
            included: `lambda: batch.stats()["samples"]`. None counts steps.

    Raises:
        ConfigError: `order` is neither 1 nor 2.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, order: int = 2, samples: Callable[[], int] | None = None
    ) -> None:
        _check_order(order)
        self.order = order
        self._count = samples
        self._norms: list[float] = []
        self._arriving: list[Tensor] = []  # norms that may not be computed yet
        self._done: list[int] = []
        self._hook = optimizer.register_step_pre_hook(self._record)

    def _record(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [
            parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        with torch.no_grad():
            # of partial norms of one place each; the norm of the norms is the norm of all
            parts = [torch.linalg.vector_norm(gradient, self.order, dtype=torch.float32) for gradient in gradients]
            if parts:
                device = parts[0].device
                together = torch.stack([part.to(device) for part in parts])
                self._arriving.append(torch.linalg.vector_norm(together, self.order))
                self._done.append(len(self._done) + 1 if self._count is None else self._count())

    @property
    def norms(self) -> tuple[float, ...]:
        """The norm of each step so far."""
        if self._arriving:
            self._norms += torch.stack(self._arriving).tolist()
            self._arriving.clear()
        return tuple(self._norms)

    @property
    def done(self) -> tuple[int, ...]:
        """The samples (without `samples=`, the steps) of the run at the end of each step."""
        return tuple(self._done)

    def refined(self, *, smoothing: float = 0.1) -> RefinedDecay:
        """The schedule for a run like the one recorded, see `refined_decay`; its places follow the samples of steps.

        Raises:
            ConfigError: Fewer than two steps were recorded, or a norm is 0 or not finite.
        """
        factors = refined_decay(self.norms, order=self.order, smoothing=smoothing)
        return RefinedDecay(at=tuple(np.array((0, *self._done[:-1])) / self._done[-1]), factors=factors)

    def state_dict(self) -> dict[str, Any]:
        """What was recorded, as plain values."""
        return {"order": self.order, "norms": list(self.norms), "done": list(self._done)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where the run that saved it stopped.

        Raises:
            ConfigError: It has norms of another order.
        """
        if state_dict["order"] != self.order:
            raise ConfigError(
                f"order must be that of the saved norms, {state_dict['order']}, got {self.order}; make the "
                f"recorder with order={state_dict['order']}"
            )
        self._arriving.clear()
        self._norms, self._done = list(state_dict["norms"]), list(state_dict["done"])

    def remove(self) -> None:
        """Records no more; what was recorded stays."""
        self._hook.remove()


def refined_decay(norms: Sequence[float], *, order: int = 2, smoothing: float = 0.1) -> tuple[float, ...]:
    """The refined schedule of the paper's algorithm 1.

    The norms are smoothed by a median filter, as the weights of noisy ones would be far too uneven; then, for steps
    t = 1 to T, `w_t = 1 / norm_t ** order` and `eta_t = w_t * (sum of w_p over p = t + 1 to T)`, divided by the
    largest. Equal norms give linear decay: `(T - t) / (T - 1)`.

    Args:
        norms: Of the gradients of every step of a run: the 2-norm for SGD, the 1-norm for Adam.
        order: 2 for SGD, 1 for Adam: the power of the norm in the weights, as for `GradientNorms`.
        smoothing: Width of the median filter as a part of the run (tau); the paper uses 0.1. 0 does not smooth.

    Returns:
        A factor for each step, in [0, 1]; the largest is 1, the last 0.

    Raises:
        ConfigError: Fewer than two norms, or one that is not positive and finite; a setting breaks its rule.
    """
    _check_order(order)
    if smoothing != 0:
        check_number("smoothing", smoothing, rule="a number in [0, 1]", remedy="use 0.1", low=0.0, high=1.0)
    values = np.asarray(norms, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ConfigError(f"norms must be those of at least 2 steps, got shape {values.shape}; {_RERUN}")
    wrong = np.flatnonzero(~((values >= 0.0) & (values < math.inf)))
    if len(wrong):
        raise ConfigError(
            f"norms must be finite, got {values[wrong[0]]} at step {wrong[0]}; leave out the steps that the optimizer "
            "skipped, and record anew where the run diverged"
        )
    smooth = _median_filtered(values, smoothing)
    if smooth.min() == 0.0:
        raise ConfigError(
            f"norms must be above 0, got 0 at step {int(smooth.argmin())}, also smoothed; use a larger smoothing, or "
            "end the run where nothing is learned any more"
        )
    weights = (smooth / smooth.min()) ** -order  # their scale does not matter
    after = np.concatenate([np.cumsum(weights[::-1])[::-1][1:], [0.0]])
    eta = weights * after
    return tuple((eta / eta.max()).tolist())


def _median_filtered(values: np.ndarray, smoothing: float) -> np.ndarray:
    """The median around each value; the first one goes on before the start, and the end is reflected.

    Reflected, as the norms rise or fall fast at the end, where it matters most (the paper's choice).
    """
    half = int(smoothing * len(values)) // 2
    if half == 0:
        return values
    padded = np.pad(np.pad(values, (0, half), mode="reflect"), (half, 0), mode="edge").tolist()
    window = sorted(padded[: 2 * half])
    medians = []
    for index, entering in enumerate(padded[2 * half :]):
        insort(window, entering)
        medians.append(window[half])
        del window[bisect_left(window, padded[index])]
    return np.array(medians)


def _check_order(order: object) -> None:
    if order not in (1, 2) or isinstance(order, bool):
        raise ConfigError(f"order must be 1 or 2, got {order!r}; use 2 for SGD and 1 for Adam")

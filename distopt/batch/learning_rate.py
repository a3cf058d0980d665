"""Learning rates for batches that have grown: by which factor the rate of the start batch is multiplied.

A rule is a pure function of the batch, the start batch and, for AdaScale's, of what the gradient noise is: all ranks
agree without asking, and schedulers keep working, as the factor is applied on top of the rate that they set.

Sources: Granziol, Zohren and Roberts, *Learning Rates as a Function of Batch Size*, JMLR 2022 (proportional for SGD,
with the square root for Adam and its kin); Hoffer, Hubara and Soudry, *Train Longer, Generalize Better*, NeurIPS 2017
(the square root, also for SGD); Johnson et al., *AdaScale SGD*, ICML 2020; AdamScale is AdaScale's gain under the
square root, for adaptive optimizers, as in Pollux (Qiao et al., OSDI 2021).

Limits: none of these papers changes the batch within a run by a noise test. AdAdaGrad (2402.11215) does and leaves the
rate as it is; that is `learning_rate=None`.
"""

import dataclasses
import math
from abc import abstractmethod
from typing import ClassVar

from distopt.config import Configurable, check_count
from distopt.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningRateRule(Configurable, tag="rule"):
    """Base of the rules. `factor` is 1 at the start batch and at most `cap`."""

    needs_noise: ClassVar[bool] = False  # whether `factor` asks for var and sqr

    # Most that the learning rate may be multiplied by; lower is safer. None: no limit. For Adam the best rate rises
    # with the batch and then falls again (2405.14578): a cap keeps it from following the rule beyond the top.
    cap: float | None = None

    def __post_init__(self) -> None:
        if self.cap is not None and not _at_least(self.cap, 1.0):
            raise ConfigError(
                f"cap must be a number of at least 1 or None, got {self.cap!r}; use 8.0 to multiply the learning rate "
                "by 8 at most"
            )

    def factor(self, batch: int, start_batch: int, *, var: float | None = None, sqr: float | None = None) -> float:
        """What the learning rate of the start batch is to be multiplied by.

        Args:
            batch: Samples of a step now, over all ranks.
            start_batch: Samples of a step that the learning rate was chosen for, over all ranks.
            var: Variance of the gradient of a START batch: the trace of the per-sample covariance divided by
                `start_batch`. Only rules that need the noise look at it.
            sqr: Squared norm of the expected gradient. Likewise.

        Raises:
            ConfigError: A batch is below 1; the rule needs var and sqr, and one is missing, negative or not finite.
        """
        check_count("batch", batch, low=1, remedy="count the samples of a step over all ranks")
        check_count("start_batch", start_batch, low=1, remedy="count the samples of a step over all ranks")
        if self.needs_noise:
            for name, value in (("var", var), ("sqr", sqr)):
                if value is None or not _at_least(value, 0.0):
                    raise ConfigError(
                        f"{name} must be a finite number of at least 0 for {type(self).__name__}, got {value!r}; give "
                        "the estimate of a test of the gradient noise, or use Linear or SquareRoot, which need none"
                    )
        grown = self._factor(batch / start_batch, var or 0.0, sqr or 0.0)
        return grown if self.cap is None else float(min(grown, self.cap))

    @abstractmethod
    def _factor(self, scale: float, var: float, sqr: float) -> float:
        """The factor of a batch of `scale` start batches, without the cap."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(LearningRateRule, name="linear"):
    """In proportion to the batch: for SGD."""

    def _factor(self, scale: float, var: float, sqr: float) -> float:
        return scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquareRoot(LearningRateRule, name="square-root"):
    """With the square root of the batch: for Adam, RMSProp, AdaGrad and their kin."""

    def _factor(self, scale: float, var: float, sqr: float) -> float:
        return math.sqrt(scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaScale(LearningRateRule, name="adascale"):
    """AdaScale's gain, from 1 where the gradient has no noise to the linear rule where it is nothing but noise.

    With S start batches in a batch `gain = (var + sqr) / (var / S + sqr)` (Johnson et al., equation 3): so many steps
    of start batches does one step stand for. Where var and sqr are both 0, nothing moves, and the gain is 1.
    """

    needs_noise: ClassVar[bool] = True

    def _factor(self, scale: float, var: float, sqr: float) -> float:
        mean_square = var / scale + sqr
        return (var + sqr) / mean_square if mean_square > 0.0 else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamScale(AdaScale, name="adamscale"):
    """The square root of AdaScale's gain: for Adam and its kin."""

    def _factor(self, scale: float, var: float, sqr: float) -> float:
        return math.sqrt(super()._factor(scale, var, sqr))


def _at_least(value: object, low: float) -> bool:
    """Whether it is a finite number (not a bool) of at least `low`."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value < math.inf

"""`distopt.AdaptiveBatch`: when, and how fast, the batch grows."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distopt.batch import estimator
from distopt.batch.learning_rate import LearningRateRule
from distopt.config import Configurable, check_choice, check_count, check_number, check_switch
from distopt.errors import ConfigError

if TYPE_CHECKING:
    from distopt.batch.controller import BatchController
    from distopt.gradients import Observable
    from distopt.step_clock import Scaler

TESTS = ("norm", "augmented", "coordinate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveBatch(Configurable, tag="batch", name="batch"):
    """Grow the batch while the gradient noise says so: AdAdaGrad's schedule (arXiv 2402.11215), for any optimizer.

    A test finds the batch T that just passes it; the batch becomes `min(ceil(max(b, T)), max_batch)` and never shrinks.
    The learning rate stays as it is, unless a rule says otherwise.

    Raises:
        ConfigError: A value breaks its rule.
    """

    test: str = "norm"  # or "augmented" (inner product and orthogonality), "coordinate" (strict: grows soonest)
    eta: float = 0.2  # noise against signal that norm and coordinate allow; smaller grows sooner
    theta: float = 0.2  # likewise of the inner product test
    nu: float = 1.0  # likewise of the orthogonality test
    max_batch: int = 8192  # samples of a step over all ranks, at most; larger makes fewer rounds
    every: int | None = None  # gradients from one test to the next; None: 20; of rounds 1, with a probe 4
    ema: int = 10  # tests to average over, and to wait for before the first decision; fewer decide sooner, by luck
    growth: float = 2.0  # the most that one test multiplies the batch by
    max_accumulation: int = 8  # micro-batches of a step before they grow themselves; more need no more memory
    probe: int = 65_536  # coordinates that stand for the gradient where no mean of it is made; more err less, cost more
    raw: bool = False  # True: |gbar|^2 as it is, as published, which is too large by the noise: grows later
    learning_rate: LearningRateRule | None = dataclasses.field(  # None leaves the rate as it is, as AdAdaGrad does
        default=None, metadata={"configurable": LearningRateRule}
    )

    def __post_init__(self) -> None:
        check_choice("test", self.test, TESTS)
        for name, remedy in (
            ("eta", "use 0.1 to 0.5"), ("theta", "use 0.1 to 0.5"), ("nu", "use 1.0"),
        ):  # fmt: skip
            check_number(name, getattr(self, name), rule="a positive number", remedy=remedy, low=0.0, high=1e6)
        check_count("max_batch", self.max_batch, low=1, remedy="use 8192: samples of a step over all ranks")
        if self.every is not None:
            check_count("every", self.every, low=1, remedy="leave it out, or use 1 to test every gradient")
        check_count("ema", self.ema, low=1, remedy="use 10, or 1 to decide by each test alone")
        if not isinstance(self.growth, int | float) or isinstance(self.growth, bool) or not 1.0 < self.growth <= 1e6:
            raise ConfigError(f"growth must be a number above 1, got {self.growth!r}; use 2.0")
        check_count("max_accumulation", self.max_accumulation, low=1, remedy="use 8, or 1 to grow the micro-batch")
        check_count("probe", self.probe, low=1, remedy="use 65536 coordinates, which are 256 KiB")
        check_switch("raw", self.raw)
        if self.learning_rate is not None and not isinstance(self.learning_rate, LearningRateRule):
            raise ConfigError(
                f"learning_rate must be a rule or None, got {self.learning_rate!r}; use distopt.batch.SquareRoot()"
            )

    def needed(self, averages: Mapping[str, float]) -> float:
        """T, the batch that just passes the test; 0 without noise, infinite without signal.

        Args:
            averages: Of the quantities of tests, see `distopt.batch.sums.Sums.quantities`.
        """
        square = averages["raw_square"] if self.raw else averages["square"]
        if self.test == "norm":
            return estimator.norm_test(averages["trace"], square, eta=self.eta)
        if self.test == "coordinate":
            return estimator.coordinate_test(averages["coordinate_ratio"], eta=self.eta)
        return max(
            estimator.inner_product_test(averages["inner_product"], max(square, 0.0), theta=self.theta),
            estimator.orthogonality_test(averages["orthogonal"], square, nu=self.nu),
        )

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: Any,
        *,
        beside: "Observable | None" = None,
        scaler: "Scaler | None" = None,
    ) -> "BatchController":
        """Grows the batches of this loader. Collective where there are several ranks.

        Args:
            model: What is trained: a DDP model, or a bare one where `beside` takes such.
            optimizer: Its optimizer, any.
            loader: A `DataLoader` whose `batch_sampler` is a `distopt.batch.GrowingBatchSampler`.
            beside: What `attach` of `Dense`, `TopK`, `DGC`, `DiLoCo` or `SparseLoCo` has returned; one rank needs none.
            scaler: The `torch.amp.GradScaler` in use, if any: beside local steps, ranks skip steps of their own.

        Raises:
            ConfigError: `max_batch` is below the batch at the start.
            CompatibilityError: The loader's batch cannot change, or no mean of gradients is made.
            DesyncError: The ranks have different configurations, data or loaders; names both.
        """
        from distopt.batch.controller import BatchController  # which imports this module

        return BatchController(self, model, optimizer, loader, beside=beside, scaler=scaler)

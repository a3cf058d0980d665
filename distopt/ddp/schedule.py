"""Warm-up schedules: which density at which step.

A schedule is a pure function of the number of completed steps, so every rank agrees without asking and a resumed run
goes on where it was. To count in epochs, give `steps_per_epoch=len(loader)`.

Sources: Lin et al., *Deep Gradient Compression*, ICLR 2018, section 3.4 (the stages 25%, 6.25%, 1.5625%, 0.4%, 0.1%);
the exponential form follows the authors' published training code.
"""

import dataclasses
from abc import abstractmethod

from distopt.config import Configurable, check_count, check_density
from distopt.errors import ConfigError


class Schedule(Configurable, tag="schedule"):
    """Base of the warm-ups. `density_at(step, final)` is in (0, 1] and is `final` once warm-up is over."""

    @abstractmethod
    def density_at(self, step: int, final: float) -> float:
        """The density of 0-based step `step`, for an algorithm whose own density is `final`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Staged(Schedule):
    stage: int = 1  # steps per stage, or epochs if steps_per_epoch is given: longer warms up more gently
    steps_per_epoch: int | None = None  # len(loader); None counts stages in steps

    def __post_init__(self) -> None:
        check_count("stage", self.stage, low=1, remedy="give the length of one stage in steps or epochs")
        if self.steps_per_epoch is not None:
            check_count("steps_per_epoch", self.steps_per_epoch, low=1, remedy="use len(loader)")

    def stage_at(self, step: int) -> int:
        """The 0-based stage that a 0-based step falls into."""
        return step // (self.stage * (self.steps_per_epoch or 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaperWarmup(_Staged, name="paper"):
    """The paper's stages 0.25, 0.0625, 0.015625, 0.004, then the algorithm's density; never below that density."""

    STAGES = (0.25, 0.0625, 0.015625, 0.004)

    def density_at(self, step: int, final: float) -> float:
        """See `Schedule.density_at`."""
        stage = self.stage_at(step)
        return max(final, self.STAGES[stage]) if stage < len(self.STAGES) else final


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExponentialWarmup(_Staged, name="exponential"):
    """Density `final ** ((e + 1) / (E + 1))` in stage e of E: geometric from above down to the algorithm's density."""

    stages: int = 4  # E: more stages come down in smaller steps

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("stages", self.stages, low=1, remedy="the authors' code uses 5, the paper 4")

    def density_at(self, step: int, final: float) -> float:
        """See `Schedule.density_at`."""
        stage = self.stage_at(step)
        return float(final ** ((stage + 1) / (self.stages + 1))) if stage < self.stages else final


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListWarmup(_Staged, name="list"):
    """The densities given, one per stage, then the algorithm's own."""

    densities: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.densities, tuple) or not self.densities:
            raise ConfigError(f"densities must be a non-empty tuple, got {self.densities!r}; use (0.25, 0.05)")
        for index, density in enumerate(self.densities):
            check_density(f"densities[{index}]", density)

    def density_at(self, step: int, final: float) -> float:
        """See `Schedule.density_at`."""
        stage = self.stage_at(step)
        return self.densities[stage] if stage < len(self.densities) else final

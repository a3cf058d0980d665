"""Straggler models: which workers may be slow in which rounds for a scheme to decode every job in time.

A pattern is a boolean matrix (workers, rounds): True where a worker straggles. Rounds before the first count as rounds
without stragglers. Each model allows a round, given those before it, by one rule of three parts (`Limits`), so that a
stop rule can ask after each arrival, and a simulation can compute when the answer turns to yes.

Source: Krishnan, Ebrahimi & Khisti, *Sequential Gradient Coding For Straggler Mitigation*, ICLR 2023, section 2.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distopt.config import check_count

Pattern = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Limits:
    """Who may straggle in one round.

    Attributes:
        recent: (workers,) bool: who has straggled within the window; straggling again costs nothing.
        distinct: The most distinct stragglers in the window, the recent ones included.
        barred: (workers,) bool: who must answer.
    """

    recent: Pattern
    distinct: int
    barred: Pattern

    def allow(self, stragglers: Pattern) -> bool:
        """Whether these, (workers,) bool, may straggle in the round."""
        within = int((self.recent | stragglers).sum()) <= self.distinct
        return within and not (stragglers & self.barred).any()

    def met_at(self, times: NDArray[np.float64]) -> float:
        """When those still missing are first allowed to straggle, if worker i answers at `times[i]`.

        Args:
            times: (workers,) seconds, inf for an answer that never comes; -inf for one that is not needed.

        Returns:
            Seconds; -inf if they are from the start, inf if never.
        """
        met = float(times[self.barred].max(initial=-math.inf))
        free = self.distinct - int(self.recent.sum())
        if free < 0:
            return math.inf  # the rounds before were outside the model
        others = times[~self.recent]
        if free < len(others):
            met = max(met, float(np.partition(others, len(others) - free - 1)[len(others) - free - 1]))
        return met


class StragglerModel(ABC):
    """Base of the models."""

    @abstractmethod
    def limits(self, before: Pattern) -> Limits:
        """Who may straggle in the round that follows the rounds `before`, (workers, rounds)."""

    def allows(self, before: Pattern, stragglers: Pattern) -> bool:
        """Whether one more round keeps a conforming pattern conforming: `stragglers`, (workers,), after `before`."""
        return self.limits(before).allow(stragglers)

    def conforms(self, pattern: Pattern) -> bool:
        """Whether every round of the pattern, (workers, rounds), is allowed after the rounds before it."""
        return all(self.allows(pattern[:, :round], pattern[:, round]) for round in range(pattern.shape[1]))

    def generate(self, num_workers: int, num_rounds: int, rng: np.random.Generator) -> Pattern:
        """A random pattern, (workers, rounds), that conforms and is nearly maximal: most rounds have no room for more.

        How eagerly stragglers stay slow and how eagerly new ones come differs from pattern to pattern.
        """
        stay, come = rng.choice([0.5, 0.9, 1.0]), rng.choice([0.5, 0.9, 1.0])
        pattern = np.zeros((num_workers, num_rounds), dtype=np.bool_)
        for round in range(num_rounds):
            limits = self.limits(pattern[:, :round])
            again = limits.recent & ~limits.barred & (rng.random(num_workers) < stay)
            free = limits.distinct - int(limits.recent.sum())
            new = rng.permutation(np.flatnonzero(~limits.recent & ~limits.barred))[: max(free, 0)]
            pattern[:, round] = again
            pattern[new[rng.random(len(new)) < come], round] = True
        return pattern


@dataclass(frozen=True)
class PerRound(StragglerModel):
    """At most `stragglers` in each round."""

    stragglers: int

    def __post_init__(self) -> None:
        check_count("stragglers", self.stragglers, low=0, remedy="give how many may straggle in one round")

    def limits(self, before: Pattern) -> Limits:
        """See `StragglerModel.limits`; the rounds before do not matter."""
        nobody = np.zeros(before.shape[0], dtype=np.bool_)
        return Limits(nobody, self.stragglers, nobody)


@dataclass(frozen=True)
class Bursty(StragglerModel):
    """The (B, W, lambda)-bursty model: short bursts of slowness, with a pause after each.

    In any W rounds at most lambda distinct stragglers, and who straggles in round t has not straggled in any of the
    rounds t-W+1 .. t-B: within a window, all that a worker straggles lies in B consecutive rounds.
    """

    burst: int  # B, rounds
    window: int  # W, rounds
    stragglers: int  # lambda, distinct workers per window

    def __post_init__(self) -> None:
        check_count("burst", self.burst, low=1, remedy="give the length of a burst in rounds")
        check_count("window", self.window, low=self.burst, remedy="give a window in rounds, as long as a burst or more")
        check_count("stragglers", self.stragglers, low=0, remedy="give how many workers may straggle in one window")

    def limits(self, before: Pattern) -> Limits:
        """See `StragglerModel.limits`."""
        round = before.shape[1]
        start = max(0, round - self.window + 1)
        recent = np.any(before[:, start:], axis=1)
        barred = np.any(before[:, start : max(0, round - self.burst + 1)], axis=1)
        return Limits(recent, self.stragglers, barred)


@dataclass(frozen=True)
class Arbitrary(StragglerModel):
    """The (N, W', lambda')-arbitrary model: in any W' rounds at most lambda' stragglers, each at most N times."""

    times: int  # N, rounds
    window: int  # W', rounds
    stragglers: int  # lambda', distinct workers per window

    def __post_init__(self) -> None:
        check_count("times", self.times, low=1, remedy="give how often a worker may straggle in one window")
        check_count("window", self.window, low=1, remedy="give a window in rounds")
        check_count("stragglers", self.stragglers, low=0, remedy="give how many workers may straggle in one window")

    def limits(self, before: Pattern) -> Limits:
        """See `StragglerModel.limits`."""
        counts = before[:, max(0, before.shape[1] - self.window + 1) :].sum(axis=1)
        return Limits(counts > 0, self.stragglers, counts >= self.times)

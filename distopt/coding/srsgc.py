"""SR-SGC: a gradient code that repeats, B rounds later, what too few workers have answered.

Job t is coded by an (n, s) gradient code. If fewer than n - s workers answer in round t, then in round t + B as many as
are still needed compute their part of job t in place of their part of job t + B. With s = ceil(B lambda / (W - 1 + B))
every job decodes by the end of round t + B for every (B, W, lambda)-bursty pattern of stragglers and for every pattern
with at most s in each round.

Source: Krishnan, Ebrahimi & Khisti, *Sequential Gradient Coding For Straggler Mitigation*, ICLR 2023, section 3.2.

Limits: a worker that is gone for good counts as one of the s of each round, so the bursty tolerance is less.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from distopt.coding.scheme import Task, Term
from distopt.coding.sequential import SequentialCode, SequentialRun
from distopt.coding.stragglers import Bursty, PerRound, StragglerModel
from distopt.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SRSGC(SequentialCode, name="sr-sgc"):
    """Selective-reattempt sequential gradient coding; B must divide W - 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.window - 1) % self.burst:
            raise ConfigError(
                f"burst must divide window - 1 in sr-sgc, got burst {self.burst} and window {self.window}; "
                f"use window {(self.window - 1) // self.burst * self.burst + self.burst + 1}"
            )
        if self.inner_stragglers >= self.n:
            raise ConfigError(
                f"stragglers must leave somebody who answers, got {self.stragglers} of {self.n} workers, "
                f"which makes s = {self.inner_stragglers}; use fewer"
            )
        _ = self.inner  # not every code exists for every n and s

    @property
    def inner_stragglers(self) -> int:
        """The s of the inner code: ceil(B lambda / (W - 1 + B))."""
        return -(-self.burst * self.stragglers // (self.window - 1 + self.burst))

    @property
    def load(self) -> float:
        """(s + 1) / n: the mean over the workers. Codes of unequal loads, as `binary` has, give some more than that."""
        return (self.inner_stragglers + 1) / self.n

    @property
    def delay(self) -> int:
        """T = B."""
        return self.burst

    @property
    def models(self) -> tuple[StragglerModel, ...]:
        """(B, W, lambda)-bursty, or s per round."""
        return Bursty(self.burst, self.window, self.stragglers), PerRound(self.inner_stragglers)

    @property
    def chunks(self) -> NDArray[np.float64]:
        """The parts of the inner code."""
        return self.inner.part_weights

    def begin(self, num_jobs: int) -> "SRSGCRun":
        """See `Scheme.begin`."""
        return SRSGCRun(self, num_jobs)


class SRSGCRun(SequentialRun):
    """See `Run`."""

    scheme: SRSGC

    def __init__(self, scheme: SRSGC, num_jobs: int) -> None:
        super().__init__(scheme, num_jobs)
        self._came_in: dict[int, NDArray[np.int64]] = {}  # of each live job: the round of each worker's result, or -1
        self._rows = [tuple(row) for row in scheme.inner_rows]

    def may_end(self, round: int) -> bool:
        """The job that is due decodes, and of the round's own job at most lambda results are missing.

        More than lambda could still be made up for, but only by everybody's answer in round t + B.
        """
        due = round - self.delay
        if 0 <= due < self.num_jobs and not self.decodable(due):
            return False
        if round >= self.num_jobs or self.decodable(round):
            return True
        return int((self._came_in[round] < 0).sum()) <= self.scheme.stragglers

    @property
    def delay(self) -> int:
        """T, in rounds."""
        return self.scheme.burst

    def _assign(self) -> list[list[Task]]:
        due, own = self.round - self.delay, self.round
        if own < self.num_jobs:
            self._came_in[own] = np.full(self.scheme.n, -1)
        again: set[int] = set()
        if 0 <= due < self.num_jobs and not self.decodable(due):
            absent = np.flatnonzero(self._came_in[due] < 0)
            again = {int(worker) for worker in absent[: max(0, len(absent) - self.scheme.inner_stragglers)]}
        return [
            [Task(job, self._rows[worker])] if (job := due if worker in again else own) < self.num_jobs else []
            for worker in range(self.scheme.n)
        ]

    def _keep(self, job: int, round: int, worker: int, index: int) -> None:
        if self._came_in[job][worker] < 0:
            self._came_in[job][worker] = round

    def _lacking(self, job: int) -> list[int]:
        here = self._came_in[job] >= 0
        workers: list[int] = [] if self.scheme.decodes(here) else np.flatnonzero(~here).tolist()
        return workers

    def _combination(self, job: int) -> list[Term]:
        came_in = self._came_in[job]
        coefficients = self.scheme.inner.decode(np.flatnonzero(came_in >= 0).tolist())
        return [
            Term(int(came_in[worker]), int(worker), 0, float(coefficients[worker]))
            for worker in np.flatnonzero(coefficients)
        ]

    def _forget(self, job: int) -> None:
        del self._came_in[job]

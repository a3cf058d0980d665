"""M-SGC: most of a job is private to one worker and uncoded, and repeated when it was late; only a small part is coded.

Job t is done in T + 1 = W - 1 + B mini-tasks per worker, in the rounds t .. t + T. In slot m, the round t + m:

    m <= W - 2    chunk m of the worker's own W - 1 chunks (D1)
    m >= W - 1    one of its D1 chunks of this job that has not arrived; if all have, its coded result of the group
                  m - (W - 1), one of B groups of chunks (D2) under an (n, lambda) gradient code

So a worker has the slots of T + 1 jobs in one round. A D1 chunk is (lambda + 1) / Z of the data, a D2 chunk 1 / Z, with
Z = n (B + (W - 1)(lambda + 1)). With lambda = n there is no coded part. Every job decodes by the end of round t + T for
every (B, W, lambda)-bursty pattern of stragglers and every (N = B, W' = W + B - 1, lambda' = lambda)-arbitrary one.

Source: Krishnan, Ebrahimi & Khisti, *Sequential Gradient Coding For Straggler Mitigation*, ICLR 2023, section 3.3.

Limits: a worker that is gone for good is never made up for: its D1 chunks are nobody else's.
"""

import dataclasses
from collections.abc import Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from distopt.coding.scheme import Task, Term
from distopt.coding.sequential import SequentialCode, SequentialRun
from distopt.coding.stragglers import Arbitrary, Bursty, StragglerModel
from distopt.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class MSGC(SequentialCode, name="m-sgc"):
    """Multiplexed sequential gradient coding; 1 <= B < W."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.burst >= self.window:
            raise ConfigError(
                f"burst must be less than window in m-sgc, got burst {self.burst} and window {self.window}; "
                f"use window {self.burst + 1} or more"
            )
        if self.coded:
            _ = self.inner  # not every code exists for every n and s

    @property
    def coded(self) -> bool:
        """Whether there is a coded part: not if everybody may straggle."""
        return self.stragglers < self.n

    @property
    def num_slots(self) -> int:
        """K = W - 1 + B, the mini-tasks of a job per worker."""
        return self.window - 1 + self.burst

    @property
    def inner_stragglers(self) -> int:
        """Lambda."""
        return self.stragglers

    @property
    def load(self) -> float:
        """K (lambda + 1) / Z, without a coded part K / (n (W - 1)): the mean over the workers, as in `SRSGC.load`."""
        if not self.coded:
            return self.num_slots / (self.n * (self.window - 1))
        return self.num_slots * (self.stragglers + 1) / self._unit

    @property
    def delay(self) -> int:
        """T = W - 2 + B."""
        return self.window - 2 + self.burst

    @property
    def models(self) -> tuple[StragglerModel, ...]:
        """(B, W, lambda)-bursty, or (B, W + B - 1, lambda)-arbitrary."""
        return (
            Bursty(self.burst, self.window, self.stragglers),
            Arbitrary(self.burst, self.window + self.burst - 1, self.stragglers),
        )

    @cached_property
    def chunks(self) -> NDArray[np.float64]:
        """D1: W - 1 chunks of worker 0, of worker 1, ...; then D2: the parts of group 0, of group 1, ..."""
        private = self.n * (self.window - 1)
        if not self.coded:
            return np.full(private, 1 / private)
        coded = np.tile(self.inner.part_weights * self.n / self._unit, self.burst)
        return np.concatenate([np.full(private, (self.stragglers + 1) / self._unit), coded])

    def begin(self, num_jobs: int) -> "MSGCRun":
        """See `Scheme.begin`."""
        return MSGCRun(self, num_jobs)

    @property
    def _unit(self) -> int:
        """Z: the chunks' sizes are multiples of 1 / Z."""
        return self.n * (self.burst + (self.window - 1) * (self.stragglers + 1))


class _Job:
    """What has arrived of one job; places 0 .. W-2 are a worker's D1 chunks, W-1 .. K-1 the groups of D2."""

    def __init__(self, scheme: MSGC) -> None:
        self.num_private = scheme.window - 1
        self.came = np.full(
            (scheme.n, scheme.num_slots, 2), -1
        )  # (round, task) of each result, -1 where it is not here
        self.tried = 0  # D1 chunks that have had their slot
        self.given: dict[int, list[int]] = {}  # of each round so far: the place that each worker was given, or -1

    def owed(self) -> NDArray[np.int64]:
        """(workers,): the D1 chunks that have had their slot but are not here."""
        owed: NDArray[np.int64] = (self.came[:, : self.tried, 0] < 0).sum(axis=1)
        return owed

    def coded_here(self, group: int) -> NDArray[np.bool_]:
        """(workers,): whose coded result of the group is here."""
        here: NDArray[np.bool_] = self.came[:, self.num_private + group, 0] >= 0
        return here


class MSGCRun(SequentialRun):
    """See `Run`."""

    scheme: MSGC

    def __init__(self, scheme: MSGC, num_jobs: int) -> None:
        super().__init__(scheme, num_jobs)
        self._jobs: dict[int, _Job] = {}
        private = scheme.window - 1
        self._rows = [  # of each worker, by place
            [((worker * private + chunk, 1.0),) for chunk in range(private)]
            + [
                tuple((scheme.n * private + group * scheme.inner.num_parts + part, value) for part, value in row)
                for row in (scheme.inner_rows[worker : worker + 1] if scheme.coded else [])
                for group in range(scheme.burst)
            ]
            for worker in range(scheme.n)
        ]

    def may_end(self, round: int) -> bool:
        """Each job under way decodes in time if everybody answers in all later rounds.

        A worker has as many slots left for what it owes as the job has rounds. And those who owe nothing, now and
        after this round, are enough for the inner code: they alone have coded results of the group that is next.
        """
        return all(self._feasible(job, slot) for job, slot in self._under_way(round))

    def _feasible(self, job: int, slot: int) -> bool:
        state, owed = self._jobs[job], self._jobs[job].owed()
        group = slot - state.num_private
        if owed.max() > self.scheme.burst - 1 - max(group, -1):
            return False
        return not self.scheme.coded or self.scheme.decodes(state.coded_here(group) if group >= 0 else owed == 0)

    def _under_way(self, round: int) -> Iterator[tuple[int, int]]:
        """The jobs of a round with their slots."""
        for slot in range(self.scheme.num_slots):
            if 0 <= round - slot < self.num_jobs:
                yield round - slot, slot

    def _assign(self) -> list[list[Task]]:
        assigned: list[list[Task]] = [[] for _ in range(self.scheme.n)]
        if self.round < self.num_jobs:
            self._jobs[self.round] = _Job(self.scheme)
        for job, slot in self._under_way(self.round):
            given = self._jobs[job].given[self.round] = self._places(self._jobs[job], slot)
            for tasks, place, rows in zip(assigned, given, self._rows, strict=True):
                if place >= 0:
                    tasks.append(Task(job, rows[place]))
        return assigned

    def _places(self, state: _Job, slot: int) -> list[int]:
        """What each worker does in a slot."""
        if slot < state.num_private:
            state.tried = slot + 1
            return [slot] * self.scheme.n
        absent = state.came[:, : state.num_private, 0] < 0
        instead = slot if self.scheme.coded else -1
        places: list[int] = np.where(absent.any(axis=1), absent.argmax(axis=1), instead).tolist()
        return places

    def _keep(self, job: int, round: int, worker: int, index: int) -> None:
        state = self._jobs[job]
        cell = state.came[worker, state.given[round][worker]]
        if cell[0] < 0:
            cell[:] = round, index

    def _lacking(self, job: int) -> list[int]:
        state = self._jobs[job]
        lacking = (state.came[:, : state.num_private, 0] < 0).any(axis=1)
        for group in range(self.scheme.burst if self.scheme.coded else 0):
            here = state.coded_here(group)
            if not self.scheme.decodes(here):
                lacking |= ~here
        workers: list[int] = np.flatnonzero(lacking).tolist()
        return workers

    def _combination(self, job: int) -> list[Term]:
        state = self._jobs[job]
        terms = [(worker, chunk, 1.0) for worker in range(self.scheme.n) for chunk in range(state.num_private)]
        for group in range(self.scheme.burst if self.scheme.coded else 0):
            coefficients = self.scheme.inner.decode(np.flatnonzero(state.coded_here(group)).tolist())
            place = state.num_private + group
            terms += [(worker, place, float(coefficients[worker])) for worker in np.flatnonzero(coefficients).tolist()]
        return [
            Term(int(state.came[worker, place, 0]), worker, int(state.came[worker, place, 1]), coefficient)
            for worker, place, coefficient in terms
        ]

    def _forget(self, job: int) -> None:
        del self._jobs[job]

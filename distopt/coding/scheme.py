"""A coding scheme: who computes what in which round, and from which answers a job is decoded.

A job is one full gradient. Jobs and rounds count from 0: job t starts in round t and must be decoded by the end of
round t + T, where T is the scheme's delay, so J jobs take the rounds 0 .. J + T - 1. In a round each worker gets some
tasks and sends one answer: for each task one vector, the sum of coefficient * gradient over the task's chunks of data.

`Scheme` is the plan, `Run` its bookkeeping for a number of jobs: without clock, tensors or transport, so that live
training and the simulation run on the same one.

Limits: a worker's answer of a round counts whole or not at all.
"""

import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distopt.coding.code import name_workers
from distopt.config import check_count
from distopt.errors import ConfigError, DecodeError


@dataclass(frozen=True)
class Task:
    """One vector of an answer: the sum of coefficient * gradient of the chunk, over `row`.

    Attributes:
        job: Whose model and data.
        row: Pairs (chunk, coefficient), chunks ascending.
    """

    job: int
    row: tuple[tuple[int, float], ...]


class Term(NamedTuple):
    """One term of a decoded gradient: `coefficient` times the vector of task `task` in a worker's answer."""

    round: int
    worker: int
    task: int  # place in the worker's list of tasks, and so of the vector in its answer
    coefficient: float


class Scheme(ABC):
    """Base of the schemes.

    Law: whatever stragglers the scheme's model allows, each job decodes to the sum of the gradients of all chunks.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """What a configuration calls it."""

    @property
    @abstractmethod
    def num_workers(self) -> int:
        """Number of workers, the master not counted."""

    @property
    @abstractmethod
    def load(self) -> float:
        """The largest fraction of the whole data that a worker computes per round."""

    @property
    def delay(self) -> int:
        """T: a job is decoded at the latest T rounds after the one it starts in."""
        return 0

    @property
    @abstractmethod
    def chunks(self) -> NDArray[np.float64]:
        """(num_chunks,) float64: each chunk's fraction of a job's samples; they add up to 1."""

    @abstractmethod
    def begin(self, num_jobs: int) -> "Run":
        """Bookkeeping for `num_jobs` jobs, before their first round."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """What to write in a configuration."""


class Run(ABC):
    """The bookkeeping of one run of a scheme.

    In each round: `tasks` once at its start, `record` for each answer that comes, and when a stop rule ends the round,
    `decode` the job that is due. A worker without a task counts as having answered.

    Attributes:
        scheme: The plan.
        num_jobs: J.
        num_rounds: J + T.
        round: The current round, -1 before the first.
    """

    def __init__(self, scheme: Scheme, num_jobs: int) -> None:
        check_count("num_jobs", num_jobs, low=1, remedy="give the number of gradients to compute")
        self.scheme = scheme
        self.num_jobs = num_jobs
        self.num_rounds = num_jobs + scheme.delay
        self.round = -1
        self._tasks: dict[int, list[list[Task]]] = {}  # of the rounds whose jobs may still need an answer
        self._answered: dict[int, NDArray[np.bool_]] = {}
        self._decoded: dict[int, list[Term]] = {}
        self._undecoded: set[int] = set()  # jobs that were not decodable when they were due

    def tasks(self, round: int) -> list[list[Task]]:
        """Starts a round, which ends the one before it: those who have not answered by now straggled in that one.

        Args:
            round: The one after the current round.

        Returns:
            For each worker its tasks, in the order of the vectors in its answer; none where it has nothing to do.

        Raises:
            ConfigError: It is not the next round of this run.
        """
        if round != self.round + 1 or round >= self.num_rounds:
            raise ConfigError(
                f"round must be {self.round + 1}, the next one of {self.num_rounds}, got {round!r}; "
                "start the rounds in order, each once"
            )
        if self.round >= 0:
            self._end_round(~self._answered[self.round])
        over = self.round - self.scheme.delay
        if over >= 0:
            if not self.decodable(over):
                self._undecoded.add(over)
            self._forget(over)
            self._tasks.pop(over)
            self._answered.pop(over)
            self._decoded.pop(over, None)
        self.round = round
        assigned = self._assign()
        self._tasks[round] = assigned
        self._answered[round] = np.array([not tasks for tasks in assigned])
        return assigned

    def record(self, round: int, worker: int) -> None:
        """A worker's answer of a round is here, whole. A late one counts for those of its jobs that are not decoded.

        Raises:
            ConfigError: There is no such worker, or the round has not started.
        """
        worker = self._check_worker(worker)
        if not 0 <= round <= self.round:
            raise ConfigError(f"round must be in 0..{self.round}, the rounds so far, got {round!r}; call tasks first")
        if round not in self._tasks:
            return  # so late that all its jobs are over
        if round == self.round:
            self._answered[round][worker] = True
        for index, task in enumerate(self._tasks[round][worker]):
            if task.job >= self.round - self.scheme.delay:
                self._keep(task.job, round, worker, index)

    def missing(self, round: int) -> list[int]:
        """The workers, ascending, that have not answered in this round: until now, or before it ended."""
        if round not in self._answered:
            raise ConfigError(
                f"round must be one of the last {self.scheme.delay + 1} rounds up to {self.round}, got {round!r}"
            )
        return [int(worker) for worker in np.flatnonzero(~self._answered[round])]

    @abstractmethod
    def conforms(self, round: int) -> bool:
        """Whether the stragglers so far are within the scheme's model if nobody else answers in this round.

        Once True, it stays so for the rest of the round.
        """

    @abstractmethod
    def may_end(self, round: int) -> bool:
        """Whether the round may end now: the job that is due decodes, and each later one does if all answer from now.

        Once True, it stays so for the rest of the round. Looser than `conforms`.
        """

    def decodable(self, job: int) -> bool:
        """Whether `decode` would succeed with what is here."""
        if not 0 <= job < self.num_jobs:
            raise ConfigError(f"job must be in 0..{self.num_jobs - 1}, got {job!r}")
        if job > self.round:
            return False
        if job < self.round - self.scheme.delay:
            return job not in self._undecoded
        return job in self._decoded or not self._lacking(job)

    def decode(self, job: int) -> list[Term]:
        """The terms whose sum is the job's gradient; answers that come after this are ignored for this job.

        Raises:
            DecodeError: What is here is not enough; names the workers whose answers are missing.
            ConfigError: The job has not started, or its last round is over.
        """
        if not max(0, self.round - self.scheme.delay) <= job <= min(self.round, self.num_jobs - 1):
            raise ConfigError(
                f"job must be one of {max(0, self.round - self.scheme.delay)}..{min(self.round, self.num_jobs - 1)}, "
                f"which round {self.round} works on, got {job!r}; decode a job by the end of the round it is due in"
            )
        if job not in self._decoded:
            if lacking := self._lacking(job):
                raise DecodeError(
                    f"job {job} cannot be decoded from what arrived by round {self.round}, for the answers of "
                    f"{name_workers(lacking)} are missing; wait for more of them, or tolerate more stragglers",
                    lacking,
                )
            self._decoded[job] = self._combination(job)
        return self._decoded[job]

    @abstractmethod
    def _assign(self) -> list[list[Task]]:
        """The tasks of the current round, by worker."""

    @abstractmethod
    def _keep(self, job: int, round: int, worker: int, index: int) -> None:
        """The vector of this task is here; it may have been here before."""

    @abstractmethod
    def _lacking(self, job: int) -> list[int]:
        """The workers without whom the job does not decode yet, empty if it does."""

    @abstractmethod
    def _combination(self, job: int) -> list[Term]:
        """The terms of a job that lacks nobody."""

    def _end_round(self, stragglers: NDArray[np.bool_]) -> None:  # noqa: B027  # nothing to do is the default
        """The current round is over, and these straggled in it."""

    def _forget(self, job: int) -> None:  # noqa: B027  # nothing to do is the default
        """The last round of this job is over."""

    def _check_worker(self, worker: int) -> int:
        worker = operator.index(worker)
        if not 0 <= worker < self.scheme.num_workers:
            raise ConfigError(f"worker must be in 0..{self.scheme.num_workers - 1}, got {worker}; give its id")
        return worker

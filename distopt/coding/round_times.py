"""The fast form of a run for a simulation: all workers at once, and one formula for when a round may end.

A `Run` is asked after each arrival. Every condition that it knows becomes true once, with one certain answer, so that
moment is a maximum or an order statistic of the answers' times. The classes here keep as little as that needs; they
agree with the runs in every round, which tests hold them to.

Limits: answers that come after the end of their round are lost here, as in the paper's replays; a live run uses them.
"""

import math
from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from distopt.coding.decode_time import DecodeTime, FloatArray
from distopt.coding.msgc import MSGC
from distopt.coding.one_round import OneRound, Uncoded
from distopt.coding.scheme import Scheme
from distopt.coding.sequential import SequentialCode
from distopt.coding.srsgc import SRSGC

Mask = NDArray[np.bool_]


class RoundTimes(ABC):
    """The rounds of one run of a scheme; times are (workers,) seconds from the round's start, -inf for the idle."""

    @abstractmethod
    def start(self, round: int) -> FloatArray:
        """Starts the round: (workers,) the fraction of the whole data that each computes, NaN for one with no task."""

    @abstractmethod
    def conforms_at(self, times: FloatArray) -> float:
        """When `Run.conforms` turns true; inf if never, -inf if it is from the start."""

    @abstractmethod
    def may_end_at(self, times: FloatArray) -> float:
        """When `Run.may_end` turns true; inf if never, -inf if it is from the start."""

    def end(self, arrived: Mask) -> None:  # noqa: B027  # rounds that do not depend on each other need nothing
        """The round is over, and these (workers,) have answered in it or had no task."""


class _OneRoundTimes(RoundTimes):
    def __init__(self, scheme: OneRound) -> None:
        self._code = scheme.code
        self._decode_time = DecodeTime(scheme.code)

    def start(self, round: int) -> FloatArray:
        return self._code.loads

    def conforms_at(self, times: FloatArray) -> float:
        return _latest_but(times, self._code.tolerance)

    def may_end_at(self, times: FloatArray) -> float:
        return self._decode_time.at(times)


class _UncodedTimes(RoundTimes):
    def __init__(self, scheme: Uncoded) -> None:
        self._loads = scheme.chunks

    def start(self, round: int) -> FloatArray:
        return self._loads

    def conforms_at(self, times: FloatArray) -> float:
        return float(times.max())

    def may_end_at(self, times: FloatArray) -> float:
        return float(times.max())


class _SequentialTimes(RoundTimes):
    """Keeps the last rounds of the pattern, as many as the straggler models look back."""

    def __init__(self, scheme: SequentialCode, num_jobs: int) -> None:
        self._num_jobs = num_jobs
        self._round = -1
        self._pattern = np.zeros((scheme.n, num_jobs + scheme.delay), dtype=np.bool_)
        self._kept = scheme.models

    def conforms_at(self, times: FloatArray) -> float:
        before = self._pattern[:, : self._round]
        everybody = float(times.max())
        return min([everybody, *(model.limits(before).met_at(times) for model in self._kept)])

    def end(self, arrived: Mask) -> None:
        before = self._pattern[:, : self._round]
        self._kept = tuple(model for model in self._kept if model.allows(before, ~arrived))
        self._pattern[:, self._round] = ~arrived


class _SRSGCTimes(_SequentialTimes):
    def __init__(self, scheme: SRSGC, num_jobs: int) -> None:
        super().__init__(scheme, num_jobs)
        self._scheme = scheme
        self._decode_time = DecodeTime(scheme.inner)
        self._here: dict[int, Mask] = {}  # of each live job: whose results are here
        self._again = np.zeros(scheme.n, dtype=np.bool_)  # who repeats the job that is due

    def start(self, round: int) -> FloatArray:
        scheme, due = self._scheme, round - self._scheme.burst
        self._round = round
        self._here.pop(due - 1, None)
        self._here[round] = np.zeros(scheme.n, dtype=np.bool_)
        self._again = np.zeros(scheme.n, dtype=np.bool_)
        if 0 <= due < self._num_jobs and self._decode_time.at(_when(self._here[due])) == math.inf:
            absent = np.flatnonzero(~self._here[due])
            self._again[absent[: max(0, len(absent) - scheme.inner_stragglers)]] = True
        if round < self._num_jobs:
            return scheme.inner.loads
        return np.where(self._again, scheme.inner.loads, np.nan)

    def may_end_at(self, times: FloatArray) -> float:
        end, due = -math.inf, self._round - self._scheme.burst
        if 0 <= due < self._num_jobs:
            repeated = np.where(self._again, times, math.inf)
            end = self._decode_time.at(np.where(self._here[due], -math.inf, repeated))
        if self._round < self._num_jobs:
            own = np.where(self._again, math.inf, times)
            end = max(end, min(_latest_but(own, self._scheme.stragglers), self._decode_time.at(own)))
        return end

    def end(self, arrived: Mask) -> None:
        super().end(arrived)
        due = self._round - self._scheme.burst
        self._here[self._round] = arrived & ~self._again
        if due >= 0:
            self._here[due] = self._here[due] | (arrived & self._again)


class _MSGCTimes(_SequentialTimes):
    def __init__(self, scheme: MSGC, num_jobs: int) -> None:
        super().__init__(scheme, num_jobs)
        self._scheme = scheme
        self._private = scheme.window - 1
        self._load = float(scheme.chunks[0])
        self._coded_loads = np.zeros(scheme.n)
        if scheme.coded:
            self._decode_time = DecodeTime(scheme.inner)
            self._coded_loads = scheme.inner.loads * (self._load * scheme.n / (scheme.stragglers + 1))
        # Of the job in each slot: how many of its D1 chunks each worker owes.
        self._owed = np.zeros((scheme.num_slots, scheme.n), dtype=np.int64)
        self._slots: list[int] = []

    def start(self, round: int) -> FloatArray:
        self._round = round
        self._owed[1:] = self._owed[:-1].copy()
        self._owed[0] = 0
        self._slots = [slot for slot in range(self._scheme.num_slots) if 0 <= round - slot < self._num_jobs]
        later = [slot for slot in self._slots if slot >= self._private]
        loads = np.full(self._scheme.n, self._load * (len(self._slots) - len(later)))
        for slot in later:
            loads += np.where(self._owed[slot] > 0, self._load, self._coded_loads)
        return loads if self._scheme.coded else np.where(loads > 0, loads, np.nan)

    def may_end_at(self, times: FloatArray) -> float:
        end, asked = -math.inf, set()
        for slot in self._slots:
            owed, group = self._owed[slot], slot - self._private
            left = self._scheme.burst - 1 - max(group, -1)
            if (owed - (group >= 0)).max() > left:
                return math.inf
            end = max(end, float(times[owed + (group < 0) > left].max(initial=-math.inf)))
            if self._scheme.coded and (key := (owed > 0).tobytes()) not in asked:
                asked.add(key)
                end = self._decode_time.at(np.where(owed == 0, times, math.inf), end)
        return end

    def end(self, arrived: Mask) -> None:
        super().end(arrived)
        for slot in self._slots:
            if slot < self._private:
                self._owed[slot] += ~arrived
            else:
                self._owed[slot] -= arrived & (self._owed[slot] > 0)


def round_times(scheme: Scheme, num_jobs: int) -> RoundTimes | None:
    """The fast form of `scheme.begin(num_jobs)`, None for a scheme that has none."""
    if isinstance(scheme, OneRound):
        return _OneRoundTimes(scheme)
    if isinstance(scheme, Uncoded):
        return _UncodedTimes(scheme)
    if isinstance(scheme, SRSGC):
        return _SRSGCTimes(scheme, num_jobs)
    return _MSGCTimes(scheme, num_jobs) if isinstance(scheme, MSGC) else None


def _when(here: Mask) -> FloatArray:
    return np.where(here, -math.inf, math.inf)


def _latest_but(times: FloatArray, count: int) -> float:
    """When all but `count` have answered."""
    if count >= len(times):
        return -math.inf
    place = len(times) - count - 1
    return float(np.partition(times, place)[place])

"""The numbers behind a coded training's `stats()` and report: who was slow, what was waited for, what coding saved.

A worker's answer to a round is in time (before the round ended), late, or never comes: the worker was busy with an
older round, is lost, or skipped the round because a newer one was there already, and says so. What waiting for
everybody would have taken is counted from the answers and words that came late to a round that the worker had the tasks
of, so `saved_s` is a lower bound: a worker that is lost costs nothing in it.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_KEPT_ROUNDS = 10_000  # for traces and plots; the counts are of all rounds
_KEPT_REASONS = 20  # of refused messages: a reason may name the round, so there is no end of them


@dataclasses.dataclass
class Arrivals:
    """One round.

    Attributes:
        round: Which.
        began_s: When, by a monotonic clock.
        seconds: (workers,) float64, from the round's start to each answer, or to when a worker that was too busy to
            answer was next heard of; NaN where nothing has come.
        compute_s: (workers,) float64, what each worker computed; NaN where no answer has come.
        ended_s: Seconds from the start to its end; NaN while it lasts.
    """

    round: int
    began_s: float
    seconds: NDArray[np.float64]
    compute_s: NDArray[np.float64]
    ended_s: float = math.nan


class Statistics:
    """Counts what the master sees.

    Args:
        num_workers: n.
    """

    def __init__(self, num_workers: int) -> None:
        self.rounds = 0
        self.steps = 0
        self.waited_s = 0.0
        self.saved_s = 0.0
        self.in_time = np.zeros(num_workers, dtype=np.int64)
        self.late = np.zeros(num_workers, dtype=np.int64)
        self.late_s = np.zeros(num_workers)
        self.unanswered = np.zeros(num_workers, dtype=np.int64)
        self.heard_late = np.zeros(num_workers, dtype=np.int64)  # late answers, and late words that a round is skipped
        self.refused: collections.Counter[str] = collections.Counter()
        self.refused_by = np.zeros(num_workers, dtype=np.int64)
        self.bytes_sent = 0
        self.bytes_received = 0
        self.amplifications: list[float] = []  # largest, sum, last
        self.waited_for_amplification = 0
        self.error_sum = self.error_max = 0.0
        self.disagreements = 0
        self.history: collections.deque[Arrivals] = collections.deque(maxlen=_KEPT_ROUNDS)
        self._recent: dict[int, Arrivals] = {}
        self._heard = np.full(num_workers, -1, dtype=np.int64)  # the newest round that each worker spoke of
        self._latest: dict[int, float] = {}  # of each recent round: the lateness of the last answer so far

    def begin(self, round: int, now_s: float) -> None:
        """A round starts, now."""
        workers = len(self.in_time)
        arrivals = Arrivals(round, now_s, np.full(workers, math.nan), np.full(workers, math.nan))
        self.history.append(arrivals)
        self._recent[round] = arrivals
        for old in [r for r in self._recent if r < round - _KEPT_ROUNDS]:
            del self._recent[old]
            self._latest.pop(old, None)

    def arrived(self, round: int, worker: int, seconds: float, compute_s: float = math.nan) -> None:
        """A worker is heard of, `seconds` after a round that it was given tasks of began.

        Rounds before it that have no answer from this worker get the same moment: it was busy until then.

        Args:
            round: Which it answers, or says that it has skipped.
            worker: Who.
            seconds: Since the round's start.
            compute_s: Seconds that it computed; NaN if it skipped the round.
        """
        arrivals = self._recent.get(round)
        if arrivals is None:
            return
        arrivals.seconds[worker] = seconds
        arrivals.compute_s[worker] = compute_s
        if math.isnan(arrivals.ended_s):
            self.in_time[worker] += 1
        else:
            self._count_late(round, worker, seconds - arrivals.ended_s, skipped=math.isnan(compute_s))
        self._fill(round, worker, arrivals.began_s + seconds)

    def _count_late(self, round: int, worker: int, lateness: float, *, skipped: bool) -> None:
        self.late_s[worker] += lateness
        self.heard_late[worker] += 1
        if not skipped:
            self.unanswered[worker] -= 1
            self.late[worker] += 1
        self.saved_s += max(0.0, lateness - self._latest.get(round, 0.0))
        self._latest[round] = max(lateness, self._latest.get(round, 0.0))

    def _fill(self, round: int, worker: int, now_s: float) -> None:
        for arrivals in reversed(self.history):
            if arrivals.round < self._heard[worker]:
                break
            if math.isnan(arrivals.seconds[worker]) and not math.isnan(arrivals.ended_s):
                arrivals.seconds[worker] = now_s - arrivals.began_s
        self._heard[worker] = max(round, self._heard[worker])

    def end(self, round: int, seconds: float) -> None:
        """The round is over; who has not answered counts as unanswered until the answer comes late."""
        arrivals = self._recent[round]
        arrivals.ended_s = seconds
        self.unanswered += np.isnan(arrivals.seconds)
        self.rounds += 1
        self.waited_s += seconds

    def decoded(self, amplification: float, error: float = 0.0) -> None:
        """A gradient was decoded.

        Args:
            amplification: Norm of the coefficients.
            error: Of an approximate code, `Code.error`.
        """
        largest, total, _ = self.amplifications or (0.0, 0.0, 0.0)
        self.amplifications = [max(largest, amplification), total + amplification, amplification]
        self.error_sum += error
        self.error_max = max(error, self.error_max)
        self.steps += 1

    def refuse(self, worker: int, reason: str) -> None:
        """A message was not what it should be."""
        known = reason in self.refused or len(self.refused) < _KEPT_REASONS
        self.refused[reason if known else "other reasons"] += 1
        self.refused_by[worker] += 1

    def report(self, gone: Mapping[int, str]) -> dict[str, Any]:
        """The cumulative numbers, with the latest round under "last". Workers count from 0.

        Args:
            gone: Workers that are lost or have failed, and what is known of it.
        """
        largest, total, last = self.amplifications or (0.0, 0.0, 0.0)
        latest = self.history[-1] if self.history else None
        return {
            "steps": self.steps,
            "rounds": self.rounds,
            "waited_s": self.waited_s,
            "saved_s": self.saved_s,
            "bytes_sent": self.bytes_sent,
            "bytes_received": self.bytes_received,
            "late_messages": int(self.late.sum()),
            "refused_messages": sum(self.refused.values()),
            "refused": dict(self.refused),
            "disagreements": self.disagreements,
            "amplification_mean": total / self.steps if self.steps else 0.0,
            "amplification_max": largest,
            "decode_error_mean": self.error_sum / self.steps if self.steps else 0.0,
            "decode_error_max": self.error_max,
            "waited_for_amplification": self.waited_for_amplification,
            "gone": dict(gone),
            "workers": [self._of_worker(worker) for worker in range(len(self.in_time))],
            "last": {
                "round": None if latest is None else latest.round,
                "waited_s": None if latest is None else latest.ended_s,
                "arrived_s": [] if latest is None else [None if math.isnan(s) else s for s in latest.seconds.tolist()],
                "amplification": last,
            },
        }

    def _of_worker(self, worker: int) -> dict[str, Any]:
        times = [a.seconds[worker] for a in self.history if not math.isnan(a.seconds[worker])]
        heard_late = int(self.heard_late[worker])
        return {
            "in_time": int(self.in_time[worker]),
            "late": int(self.late[worker]),
            "late_mean_s": float(self.late_s[worker]) / heard_late if heard_late else 0.0,
            "unanswered": int(self.unanswered[worker]),
            "refused": int(self.refused_by[worker]),
            "median_s": float(np.median(times)) if times else None,
        }

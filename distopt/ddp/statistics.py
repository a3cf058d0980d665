"""The numbers behind `stats()`: cumulative since attach and for the latest step, for this rank, no collective."""

import threading
import time
from typing import Any

_PER_STEP = (
    "bytes_sent",
    "bytes_dense",
    "link_bytes_sent",
    "link_bytes_dense",
    "seconds_selecting",
    "seconds_decoding",
    "seconds_communicating",
    "entries_sent",
    "buckets_sparse",
    "buckets_dense",
)


class Statistics:
    """Counts what the hook does. Callbacks run in threads of their own, so every change takes a lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total: dict[str, float] = dict.fromkeys(_PER_STEP, 0)
        self._current = dict(self._total)
        self._last = dict(self._total)
        self._in_flight = 0
        self._in_flight_since = 0.0
        self.steps = 0
        self.skipped_steps = 0

    def add(self, **amounts: float) -> None:
        """Adds to the step under way."""
        with self._lock:
            for name, amount in amounts.items():
                self._current[name] += amount

    def launched(self) -> None:
        """A bucket's collectives are on their way. Time counts once, however many are."""
        with self._lock:
            if self._in_flight == 0:
                self._in_flight_since = time.perf_counter()
            self._in_flight += 1

    def landed(self) -> None:
        """A bucket's collectives have completed."""
        with self._lock:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._current["seconds_communicating"] += time.perf_counter() - self._in_flight_since

    def end_step(self, *, skipped: bool) -> None:
        """Closes the step under way."""
        with self._lock:
            for name, amount in self._current.items():
                self._total[name] += amount
            self._last = self._current
            self._current = dict.fromkeys(_PER_STEP, 0)
            self.skipped_steps += skipped
            self.steps += not skipped

    def report(self) -> dict[str, Any]:
        """The cumulative numbers, with the latest step under "last"."""
        with self._lock:
            return {
                "steps": self.steps,
                "skipped_steps": self.skipped_steps,
                **self._total,
                "last": dict(self._last),
            }

"""The numbers behind `stats()`: cumulative since attach and for the latest step, for this rank, no collective."""

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

from distopt.spans import span

_PER_STEP = (
    "bytes_sent",
    "bytes_dense",
    "link_bytes_sent",
    "link_bytes_dense",
    "node_bytes_sent",
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
        self._routes: dict[str, list[float]] = {}  # buckets, predicted seconds, measured seconds
        self.steps = 0
        self.skipped_steps = 0

    def add(self, **amounts: float) -> None:
        """Adds to the step under way."""
        with self._lock:
            for name, amount in amounts.items():
                self._current[name] += amount

    @contextlib.contextmanager
    def selecting(self) -> Iterator[None]:
        """Measures, and shows in a profile, what comes before the network."""
        began = time.perf_counter()
        with span("ddp", "select"):
            yield
        self.add(seconds_selecting=time.perf_counter() - began)

    @contextlib.contextmanager
    def launching(self) -> Iterator[None]:
        """Counts a bucket as on its way, and shows the launch in a profile."""
        self.launched()
        with span("ddp", "launch"):
            yield

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

    def took_route(self, route: str, *, predicted_s: float, measured_s: float) -> None:
        """A bucket has gone from selection to update on this route."""
        with self._lock:
            totals = self._routes.setdefault(route, [0, 0.0, 0.0])
            for i, amount in enumerate((1, predicted_s, measured_s)):
                totals[i] += amount

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
                "routes": {
                    route: {
                        "buckets": int(buckets),
                        "predicted_s": None if math.isnan(predicted) else predicted / buckets,
                        "measured_s": measured / buckets,
                    }
                    for route, (buckets, predicted, measured) in self._routes.items()
                },
                "last": dict(self._last),
            }

"""A virtual clock: what arrives when, in an order that does not depend on how long anything really takes.

Arrivals at the same time come by client, then in the order in which they were scheduled. Time is counted in whole
nanoseconds, so five delays of 0.2 s end exactly when one of 1 s does, which sums of floats do not.

Limits: times closer than a nanosecond are the same.
"""

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distopt.errors import ConfigError, StateMismatchError

_NS_PER_S = 1_000_000_000
_FORMAT = 1


@dataclass(frozen=True)
class Arrival:
    """What was scheduled.

    Attributes:
        time_s: When it arrives.
        client: Whose it is.
        payload: What was given to `schedule`.
    """

    time_s: float
    client: int
    payload: Any


class VirtualClock:
    """A queue of arrivals and the time that has passed, 0 at the start."""

    def __init__(self) -> None:
        self._now_ns = 0
        self._scheduled = 0
        self._queue: list[tuple[int, int, int, Any]] = []  # time, client, order: the order is never the same, so it
        # ends the comparison before the payload

    @property
    def now_s(self) -> float:
        """The seconds that have passed."""
        return self._now_ns / _NS_PER_S

    @property
    def next_s(self) -> float:
        """When the next arrival is, inf if nothing is scheduled."""
        return self._queue[0][0] / _NS_PER_S if self._queue else math.inf

    def __len__(self) -> int:
        return len(self._queue)

    def schedule(self, client: int, delay_s: float, payload: Any = None) -> None:
        """Something of a client arrives after a delay from now.

        Args:
            client: Whose.
            delay_s: At least 0 and finite.
            payload: Handed back with the arrival. It is part of the state: plain values and tensors, to be saved.

        Raises:
            ConfigError: The delay is not a finite number of at least 0.
        """
        if not isinstance(delay_s, int | float) or not 0 <= delay_s < math.inf:
            raise ConfigError(f"delay_s must be finite and at least 0, got {delay_s!r}; nothing arrives in the past")
        heapq.heappush(self._queue, (self._now_ns + _ns(delay_s), int(client), self._scheduled, payload))
        self._scheduled += 1

    def next_arrival(self) -> Arrival:
        """Goes on to the next arrival and takes it from the queue.

        Raises:
            ConfigError: Nothing is scheduled.
        """
        if not self._queue:
            raise ConfigError("there must be a scheduled arrival, got none; schedule some client's work first")
        time_ns, client, _, payload = heapq.heappop(self._queue)
        self._now_ns = time_ns
        return Arrival(time_ns / _NS_PER_S, client, payload)

    def next_arrivals(self, until_s: float) -> list[Arrival]:
        """Goes on to a time and takes what arrives until then, at that very moment included, from the queue.

        Raises:
            ConfigError: The time is in the past or not finite.
        """
        if not isinstance(until_s, int | float) or not math.isfinite(until_s) or _ns(until_s) < self._now_ns:
            raise ConfigError(
                f"until_s must be finite and at least the time that it is, {self.now_s}, got {until_s!r}; "
                "the clock only goes forward"
            )
        until_ns = _ns(until_s)
        arrivals = []
        while self._queue and self._queue[0][0] <= until_ns:
            arrivals.append(self.next_arrival())
        self._now_ns = until_ns
        return arrivals

    def state_dict(self) -> dict[str, Any]:
        """The time and what is scheduled, as lists of plain values, payloads as they were given."""
        queue = [list(each) for each in sorted(self._queue, key=lambda each: each[:3])]
        return {"format": _FORMAT, "now_ns": self._now_ns, "scheduled": self._scheduled, "queue": queue}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the place of the clock that gave the state.

        Raises:
            StateMismatchError: It is not the state of a clock.
        """
        if state.get("format") != _FORMAT or not {"now_ns", "scheduled", "queue"} <= set(state):
            raise StateMismatchError(
                f"the state must be a clock's, of format {_FORMAT}, got {sorted(state)} of format "
                f"{state.get('format')!r}; load what its state_dict() gave"
            )
        queue = [(time_ns, client, order, payload) for time_ns, client, order, payload in state["queue"]]
        heapq.heapify(queue)
        self._queue, self._now_ns, self._scheduled = queue, state["now_ns"], state["scheduled"]


def _ns(seconds: float) -> int:
    return round(seconds * _NS_PER_S)

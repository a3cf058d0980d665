"""The time of a rank that waits for nobody, in units of that of a gradient.

A2CiD2 (Nabli, Belilovsky and Oyallon 2023) lets its momentum work for the time that has passed between two exchanges,
in units of the time that a gradient takes. Its constants are those of a graph whose exchanges come once every so many
units; where they take longer than that, time goes slower in the same proportion, which is the same as the constants of
the lower rate. With those of a rate that is far too high it would diverge.
"""

import time
from collections.abc import Callable

_KEPT = 0.5  # of the average so far, when a new measurement comes


class GradientClock:
    """See the module.

    Args:
        every: Units between two exchanges that the constants are made for.
        seconds: Tells the time.

    Attributes:
        now: The time at the last step.
    """

    def __init__(self, every: int, seconds: Callable[[], float] = time.monotonic) -> None:
        self._every, self._seconds = every, seconds
        self._last: float | None = None
        self._unit_s = 0.0
        self._since = 0.0  # units since the last exchange began
        self._interval = float(every)  # units from one exchange to the next
        self.now = 0.0

    def stepped(self) -> None:
        """The optimizer has taken a step."""
        at = self._seconds()
        passed = 1.0
        if self._last is not None and (elapsed := at - self._last) > 0:
            self._unit_s = elapsed if not self._unit_s else _KEPT * self._unit_s + (1 - _KEPT) * elapsed
            passed = elapsed / self._unit_s
        self._last = at
        self._since += passed
        self.now += passed * min(1.0, self._every / self._interval)

    def exchanged(self) -> None:
        """An exchange begins."""
        self._interval = _KEPT * self._interval + (1 - _KEPT) * self._since
        self._since = 0.0

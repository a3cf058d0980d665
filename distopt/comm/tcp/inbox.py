"""What has arrived and was not yet taken."""

import collections
import threading
import time
from collections.abc import Callable

from torch import Tensor

from distopt.comm.tcp.connection import FRAME_COST_BYTES


class Inbox:
    """Frames that have arrived, with a bound for each source.

    Args:
        max_bytes: More than that of one source never waits, but for a single frame.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._frames: collections.deque[tuple[int, Tensor]] = collections.deque()
        self._waiting_bytes: collections.Counter[int] = collections.Counter()
        self._closed = False

    def put(self, source: int, frame: Tensor, is_wanted: Callable[[], bool]) -> None:
        """Waits until there is room; drops the frame when it is not wanted any more, or after `close`."""
        cost = frame.numel() + FRAME_COST_BYTES

        def may_go_on() -> bool:
            waiting = self._waiting_bytes[source]
            return not waiting or waiting + cost <= self._max_bytes or self._closed or not is_wanted()

        with self._changed:
            self._changed.wait_for(may_go_on)
            if is_wanted():
                self.put_now(source, frame)

    def put_now(self, source: int, frame: Tensor) -> None:
        """Does not wait, whatever the bound; for frames to oneself."""
        with self._changed:
            if not self._closed:
                self._waiting_bytes[source] += frame.numel() + FRAME_COST_BYTES
                self._frames.append((source, frame))
                self._changed.notify_all()

    def get(self, timeout_s: float | None) -> tuple[int, Tensor] | None:
        """The oldest frame; None after `timeout_s`, or after `close`."""
        end = None if timeout_s is None else time.monotonic() + max(0.0, timeout_s)
        with self._changed:
            while not self._frames and not self._closed:
                if end is None:
                    self._changed.wait()
                elif not self._changed.wait(max(0.0, end - time.monotonic())) and time.monotonic() >= end:
                    break
            if self._closed or not self._frames:
                return None
            source, frame = self._frames.popleft()
            self._waiting_bytes[source] -= frame.numel() + FRAME_COST_BYTES
            self._changed.notify_all()
            return source, frame

    def wake(self) -> None:
        """Lets those who wait look again at what is wanted."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Drops what waits; wakes everybody."""
        with self._changed:
            self._closed = True
            self._frames.clear()
            self._changed.notify_all()

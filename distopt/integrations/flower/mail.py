"""Messages that are on their way to nodes, and the answers to them, each of which comes once or not at all."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

T = TypeVar("T")


class Clock(Protocol):
    """Of the module `time`."""

    def monotonic(self) -> float:
        """Seconds that only go forward."""

    def sleep(self, seconds: float, /) -> None:
        """Lets so many pass."""


REAL: Clock = time
_ON_THE_WAY = (3, 4, 5)  # Flower's codes of errors: a message, its reply, or the node was not there


@dataclass(frozen=True)
class Answer(Generic[T]):
    """The end of a message.

    Attributes:
        about: What was sent.
        message: What came back; None if nothing did.
        why: What went wrong; None if nothing did.
        may_work_later: Whether it went wrong on the way, and not with what the node does.
    """

    about: T
    message: Message | None
    why: str | None = None
    may_work_later: bool = True


class Mail(Generic[T]):
    """A grid, and what is under way in it.

    Args:
        grid: Of Flower's.
        poll_s: How long to sleep between two looks.
        clock: The real one, but in tests.
    """

    def __init__(self, grid: Grid, poll_s: float, clock: Clock = REAL) -> None:
        self._grid, self._poll_s, self._clock = grid, poll_s, clock
        self._sent: dict[str, tuple[T, float]] = {}

    @property
    def under_way(self) -> list[T]:
        """What has not come to its end."""
        return [about for about, _ in self._sent.values()]

    def send(self, messages: Sequence[tuple[T, Message]], timeout_s: float) -> list[Answer[T]]:
        """Sends them; those that could not be sent are at their end. After the timeout nobody waits for the others."""
        until = self._clock.monotonic() + timeout_s
        ids = set(self._grid.push_messages([message for _, message in messages])) if messages else set()
        refused = []
        for about, message in messages:
            if message.metadata.message_id in ids:
                self._sent[message.metadata.message_id] = about, until
            else:
                refused.append(Answer(about, None, "the SuperLink has not taken the message"))
        return refused

    def collect(self) -> list[Answer[T]]:
        """Those that have come to their end since the last look; does not wait."""
        ended = []
        for message in self._grid.pull_messages(list(self._sent)) if self._sent else ():
            sent = self._sent.pop(message.metadata.reply_to_message_id, None)
            if sent is None:
                continue  # an answer that comes twice
            if message.has_error():
                error = message.error
                why = error.reason or f"error {error.code}"
                ended.append(Answer(sent[0], None, why, may_work_later=error.code in _ON_THE_WAY))
            else:
                ended.append(Answer(sent[0], message))
        now = self._clock.monotonic()
        late = [key for key, (_, until) in self._sent.items() if now >= until]
        return ended + [Answer(self._sent.pop(key)[0], None, "no answer in time") for key in late]

    def pause(self, until: float | None = None) -> None:
        """Sleeps until the next look, or until a time of the clock if that is sooner."""
        left = self._poll_s if until is None else min(self._poll_s, until - self._clock.monotonic())
        if left > 0:
            self._clock.sleep(left)

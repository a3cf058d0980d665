"""Who is still there: collectives wait for a lost peer without saying for whom, so every rank sends heartbeats.

A thread sends this rank's table of counters (see `distopt.comm.beats`) by UDP to the ranks 1, 2, 4, ... further on and
to one more by chance, and watches whether all counters still move. The first rank that misses one spreads the verdict,
so that all end with the same names; a rank that ends normally says goodbye and is missed by nobody.

Only listening time counts: after this thread was not scheduled for a while (a busy machine, a laptop that slept) it
first reads what has arrived, and does not accuse others of its own silence.

Limits: a heartbeat says that a process runs and can be reached, not that it makes progress. A rank that holds Python's
interpreter lock for longer than the timeout, or is stopped in a debugger, is taken for lost.
"""

import atexit
import contextlib
import dataclasses
import logging
import multiprocessing.util
import os
import random
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from distopt.comm.beats import Table, decode, encode
from distopt.errors import PeerLostError

_log = logging.getLogger("distopt")

_BEATS_PER_TIMEOUT = 20
_SLOWEST_BEAT_S = 1.0
_FASTEST_BEAT_S = 0.02
_TOGETHER_BEATS = 3  # ranks that fell silent this close to each other are lost together: they shared a host or a link
_VERDICT_BEATS = 6  # so many without a word are enough where a collective has failed already
_LAST_WORDS = 3  # how often the last datagram is sent, because any may get lost
_ENDED = "it has ended"
_ALL_LISTEN = 64  # up to so many ranks, last words go to all of them


@dataclasses.dataclass(frozen=True)
class Member:
    """A rank as the others know it: how it is called in messages, and where its datagrams go."""

    rank: int
    host: str
    address: str
    port: int

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host})"


class Heartbeat:
    """Watches the other ranks from a thread of its own until `close`.

    Args:
        own: Which of the members this is.
        members: All of them, in the same order everywhere.
        nonce: 16 random bytes that the ranks of this job share; datagrams without them are dropped.
        endpoint: A bound UDP socket, at the own member's address; closed by `close`.
        timeout_s: A rank whose counter has not moved for so long is lost.
        on_loss: Is called once, in the thread, with the error that names the lost ranks. Nobody is accused before
            `watch`.
    """

    def __init__(
        self,
        own: int,
        members: Sequence[Member],
        nonce: bytes,
        endpoint: socket.socket,
        *,
        timeout_s: float,
        on_loss: Callable[[PeerLostError], None],
    ) -> None:
        self.timeout_s = timeout_s
        self.error: PeerLostError | None = None
        self._own = own
        self._members = members
        self._nonce = nonce
        self._endpoint = endpoint
        self._on_loss = on_loss
        self._beat_s = min(_SLOWEST_BEAT_S, timeout_s / _BEATS_PER_TIMEOUT)
        self._watching = False
        self._closed = False
        self._lock = threading.RLock()  # the garbage collector may close us in the very thread that holds it
        self._moved = threading.Condition(self._lock)
        self._clock = _ListeningClock(2 * self._beat_s)
        self._table = Table(own, len(members), self._clock.now)
        self._counts = {"datagrams_sent": 0, "datagrams_received": 0, "datagrams_refused": 0, "send_failures": 0}
        self._random = random.Random()  # of its own: nobody's seeds are disturbed
        self._pid = os.getpid()
        self._earlier_error = getattr(sys, "last_value", None)
        self._waker, self._wake = socket.socketpair()
        endpoint.setblocking(False)
        atexit.register(self._close_at_exit)
        # Processes that multiprocessing has started know no atexit.
        self._at_exit = multiprocessing.util.Finalize(None, self._close_at_exit, exitpriority=0)
        self._thread = threading.Thread(target=self._run, name="distopt heartbeat", daemon=True)
        self._thread.start()

    def wait_for_all(self, seconds: float) -> list[int]:
        """Waits until every rank has been heard of, but no longer than that; returns those that have not been."""
        with self._moved:
            self._moved.wait_for(self._table.is_complete, seconds)
            return self._table.unheard()

    def watch(self) -> None:
        """From now on a silent rank is a lost rank."""
        self._watching = True

    def wait_for_verdict(self) -> PeerLostError | None:
        """The error that names who has just gone, or None if all are there. Takes a few beats.

        For when a collective has failed: somebody went, and what failed does not say who, or names a rank that only
        ended because of it.
        """
        with self._moved:
            start = self._clock.now
            while self._goes_on() and self._clock.now - start < _VERDICT_BEATS * self._beat_s:
                self._moved.wait(self._beat_s)
            if self._goes_on():
                self._judge((_VERDICT_BEATS - 1) * self._beat_s, "after a collective failed")
            if self._goes_on() and self._table.left():
                self._conclude(self._table.left(), dict.fromkeys(self._table.left(), f"{_ENDED} or detached"))
            return self.error

    def stats(self) -> dict[str, Any]:
        """Datagrams sent, received, refused (not of this job) and failed; seconds in which this thread did not run."""
        with self._lock:
            return {
                **self._counts,
                "lost_ranks": list(self.error.ranks) if self.error else [],
                "stalled_s": self._clock.stalled_s,
                "timeout_s": self.timeout_s,
            }

    def close(self, *, failed: bool = False) -> None:
        """Says goodbye (or, if this rank failed, that the others need not wait for it) and ends the thread."""
        if self._closed or os.getpid() != self._pid:  # a forked child has the object but is not the rank
            return
        self._at_exit.cancel()
        atexit.unregister(self._close_at_exit)
        with self._moved:
            self._closed = True
            self._table.end(failed=failed and self.error is None)  # after a loss the lost rank is the news
            self._moved.notify_all()
        with contextlib.suppress(OSError):  # the thread has seen it already
            self._wake.send(b"x")
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=2.0)

    def _close_at_exit(self) -> None:
        # Python keeps the exception that ends a script here; an earlier one was somebody's experiment at a prompt.
        self.close(failed=getattr(sys, "last_value", None) is not self._earlier_error)

    def _run(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._endpoint, selectors.EVENT_READ)
                selector.register(self._waker, selectors.EVENT_READ)
                self._beat_until_closed(selector)
            for _ in range(_LAST_WORDS):
                self._send(self._many_listeners())
        except Exception:
            _log.exception(
                "the heartbeat has failed: lost peers are not noticed any more, and others will miss this rank"
            )
        finally:
            for end in (self._endpoint, self._waker, self._wake):
                end.close()

    def _beat_until_closed(self, selector: selectors.BaseSelector) -> None:
        next_beat = time.monotonic()
        while not self._closed:
            selector.select(max(0.0, next_beat - time.monotonic()))
            with self._moved:
                self._clock.tick()
                self._receive()
                if self._watching and self._goes_on():
                    self._judge(self.timeout_s, f"longer than peer_timeout={self.timeout_s:g}")
                self._moved.notify_all()
            if time.monotonic() >= next_beat:
                with self._lock:
                    self._table.beat()
                self._send(self._listeners())
                # Until all have been heard of, the ranks that start late wait for nothing but this.
                next_beat = time.monotonic() + (self._beat_s if self._watching else min(_FASTEST_BEAT_S, self._beat_s))

    def _listeners(self) -> set[int]:
        """The ranks 1, 2, 4, ... further on reach all in log2(N) beats; one by chance, should all of those be gone."""
        num_ranks = len(self._members)
        steps = [1 << i for i in range((num_ranks - 1).bit_length())] + [self._random.randrange(1, num_ranks)]
        return {(self._own + step) % num_ranks for step in steps}

    def _many_listeners(self) -> set[int]:
        """For what must not wait for the next beat."""
        return set(range(len(self._members))) if len(self._members) <= _ALL_LISTEN else self._listeners()

    def _send(self, to: set[int]) -> None:
        with self._lock:
            data = encode(self._table.datagram(), self._nonce)
        for position in to:
            member = self._members[position]
            if position != self._own:
                try:
                    self._endpoint.sendto(data, (member.address, member.port))
                    self._counts["datagrams_sent"] += 1
                except OSError:  # the own link is down, or the buffer full: the others will notice soon enough
                    self._counts["send_failures"] += 1

    def _receive(self) -> None:
        """Reads what has arrived; no more than a few rounds' worth, so that a flood does not keep us from beating."""
        for _ in range(64 + 4 * len(self._members)):
            try:
                data = self._endpoint.recv(65536)
            except BlockingIOError:
                return
            except OSError:
                continue
            heard = decode(data, self._nonce, len(self._members))
            self._counts["datagrams_received" if heard else "datagrams_refused"] += 1
            if heard:
                self._table.merge(heard, self._clock.now)

    def _goes_on(self) -> bool:
        return self.error is None and not self._closed

    def _judge(self, silence_s: float, when: str) -> None:
        """Gives the verdict if a rank has been silent for so long, or if others gave theirs."""
        now = self._clock.now
        reasons = {}
        if self._table.silent(now, silence_s):
            for rank in self._table.silent(now, silence_s - _TOGETHER_BEATS * self._beat_s):
                reasons[rank] = f"no heartbeat for {self._table.silent_s(rank, now):.1f} s, {when}"
            self._table.declare_lost(list(reasons))
        for rank in self._table.lost():
            reasons.setdefault(rank, self._hearsay(rank))
        if not reasons and self._table.accuser is not None:
            reasons[self._table.accuser] = f"it has not heard of this rank, {self._members[self._own]}, and gave it up"
        if reasons:
            self._conclude(sorted(reasons), reasons)

    def _hearsay(self, rank: int) -> str:
        told_by = self._table.told_by(rank)
        return f"{_ENDED} with an error" if told_by == rank else f"given up by {self._members[told_by or 0]}"

    def _conclude(self, lost: Sequence[int], reasons: dict[int, str]) -> None:
        message = "; ".join(f"lost {self._members[position]}: {reasons[position]}" for position in lost)
        if all(_ENDED in reason for reason in reasons.values()):
            cause = "The first error in the output of all ranks says why"
        elif len(lost) == len(self._members) - 1:
            cause = f"These are all the others, so perhaps it is {self._members[self._own].host} that is cut off"
        else:
            cause = "Processes died or hang, or the network is down"
        self.error = PeerLostError(
            f"{message}. {cause}; start all ranks again from the last checkpoint",
            sorted(self._members[position].rank for position in lost),
        )
        self._send(self._many_listeners())  # this process may end before the next beat
        # In a thread of its own: this one goes on telling the others.
        threading.Thread(target=self._on_loss, args=(self.error,), name="distopt peer lost", daemon=True).start()


class _ListeningClock:
    """Seconds in which this thread was there to listen: a longer gap between two ticks counts as `longest_s`."""

    def __init__(self, longest_s: float) -> None:
        self.now = 0.0
        self.stalled_s = 0.0
        self._longest_s = longest_s
        self._ticked_at = time.monotonic()

    def tick(self) -> None:
        gap = time.monotonic() - self._ticked_at
        self._ticked_at += gap
        self.now += min(gap, self._longest_s)
        self.stalled_s += max(0.0, gap - self._longest_s)

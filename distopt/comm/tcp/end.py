"""What both ends of a star have: who is connected, frames in and out, refusals, and how they end with the process."""

import atexit
import contextlib
import logging
import os
import socket
import threading
import weakref
from collections import Counter

from torch import Tensor

from distopt.comm.frame import check_frame
from distopt.comm.secret import check_secret
from distopt.comm.tcp.connection import FRAME, PROBE, Connection
from distopt.comm.tcp.inbox import Inbox
from distopt.config import check_count, check_number
from distopt.errors import ConfigError, DistoptError

log = logging.getLogger("distopt")

_EXIT_S = 1.0  # what is queued when the script ends without `close` is given so long
_PENDING_FRAMES, _PENDING_BYTES = 16, 64 << 20  # so many of the longest kind may wait, or so much if that is more

open_ends: "weakref.WeakSet[End]" = weakref.WeakSet()


class End:
    """What a server and a peer have in common."""

    def __init__(
        self,
        rank: int,
        size: int,
        secret: bytes | None,
        max_frame_bytes: int,
        max_pending_bytes: int | None,
        silence_s: float,
        handshake_s: float,
    ) -> None:
        check_count("size", size, low=2, remedy="count the server and all its peers")
        check_count("max_frame_bytes", max_frame_bytes, low=1, remedy="give the length of the longest frame")
        if max_pending_bytes is None:
            max_pending_bytes = max(_PENDING_FRAMES * max_frame_bytes, _PENDING_BYTES)
        check_count("max_pending_bytes", max_pending_bytes, low=1, remedy="leave it out")
        for name, value in (("silence_s", silence_s), ("handshake_s", handshake_s)):
            rule = "a positive number of seconds"
            check_number(name, value, rule=rule, remedy="leave it out for the default", low=0.0, high=86400.0)
        self.rank = rank
        self.size = size
        self.max_frame_bytes = max_frame_bytes
        self._secret = None if secret is None else check_secret(secret)
        self._max_pending_bytes = max_pending_bytes
        self._silence_s = silence_s
        self._handshake_s = handshake_s
        self._inbox = Inbox(max_pending_bytes)
        self._lock = threading.Lock()  # of what says who is connected
        self._links: dict[int, Connection] = {}
        self._connections: Counter[int] = Counter()
        self._refused: Counter[str] = Counter()
        self._failure: DistoptError | None = None
        self._closing = threading.Event()

    @property
    def lost(self) -> frozenset[int]:
        """Ranks that were connected and are not now; they may come back."""
        with self._lock:
            links = {rank for rank, link in self._links.items() if not link.is_broken}
            return frozenset(set(self._connections) - links)

    @property
    def closed(self) -> bool:
        """See `Transport.closed`."""
        return self._closing.is_set()

    @property
    def connected(self) -> frozenset[int]:
        """Ranks that are connected now."""
        with self._lock:
            return frozenset(rank for rank, link in self._links.items() if not link.is_broken)

    @property
    def refused(self) -> Counter[str]:
        """How many connections were refused or ended because of what they sent, by reason; a copy."""
        with self._lock:
            return Counter(self._refused)

    def connections(self, rank: int) -> int:
        """See `ReturningTransport.connections`."""
        with self._lock:
            return self._connections.get(rank, 0)

    def send(self, destination: int, frame: Tensor) -> None:
        """See `Transport.send`. A frame to a rank that is not connected is dropped, and any after `close`.

        A peer for which more would wait than `max_pending_bytes` is cut off by the server; it may connect again.
        """
        self._check()
        check_frame(frame, min_bytes=0, max_bytes=self.max_frame_bytes)
        self._check_destination(destination)
        if self._closing.is_set():
            return
        if destination == self.rank:
            self._inbox.put_now(self.rank, frame)
            return
        link = self._link(destination)
        if link is not None and not link.send(FRAME, frame):
            self._refuse("slow reader", f"rank {destination}")

    def receive(self, timeout_s: float | None) -> tuple[int, Tensor] | None:
        """See `Transport.receive`; a frame has the length that was sent."""
        self._check()
        arrived = self._inbox.get(timeout_s)
        if arrived is None:
            self._check()
        return arrived

    def pending_bytes(self, destination: int) -> int:
        """See `Transport.pending_bytes`. What the other machine has acknowledged counts as taken."""
        link = self._link(destination)
        return 0 if link is None else link.pending_bytes()

    def probe(self, destination: int) -> None:
        """See `Transport.probe`."""
        self._check()
        link = self._link(destination)
        if link is not None and not link.pending_bytes():
            link.send(PROBE)

    def close(self, timeout_s: float) -> None:
        """See `Transport.close`. Frames that arrive meanwhile are dropped."""
        raise NotImplementedError

    def _link(self, rank: int) -> Connection | None:
        with self._lock:
            return self._links.get(rank)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _check_destination(self, destination: int) -> None:
        if not 0 <= destination < self.size:
            raise ConfigError(f"destination must be a rank from 0 to {self.size - 1}, got {destination}")

    def _refuse(self, reason: str, who: str) -> None:
        with self._lock:
            self._refused[reason] += 1
            first = self._refused[reason] == 1
        # Once as a warning: who is refused may come again at once, for ever.
        log.log(logging.WARNING if first else logging.INFO, "rank %d refuses %s: %s", self.rank, who, reason)

    def _deliver(self, source: int, link: Connection, frame: Tensor) -> None:
        self._inbox.put(source, frame, lambda: self._links.get(source) is link and not self._closing.is_set())

    def _forget_after_fork(self) -> None:
        """Closes this process's copies of the sockets, without a word to the other ends."""
        raise NotImplementedError


def shut(stream: socket.socket) -> None:
    """Ends both directions, and wakes who waits for this socket."""
    with contextlib.suppress(OSError):
        stream.shutdown(socket.SHUT_RDWR)


@atexit.register
def _close_all() -> None:
    """A server that ends without a word to who is connected would lose what is queued."""
    for end in list(open_ends):
        end.close(_EXIT_S)


def _forget_all() -> None:
    for end in list(open_ends):
        end._forget_after_fork()
    open_ends.clear()


os.register_at_fork(after_in_child=_forget_all)  # a child would keep connections open that its parent's death must end

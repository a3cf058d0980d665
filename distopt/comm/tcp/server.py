"""The server of a star of TCP connections: rank 0."""

import contextlib
import itertools
import socket
import threading
import time
from collections import Counter

from distopt.comm.address import Address, keep_watch, open_listener, parse_address
from distopt.comm.session import RefusedError
from distopt.comm.tcp.connection import FRAME, REPLACED, WELCOME, Connection
from distopt.comm.tcp.end import End, log, open_ends, shut
from distopt.comm.tcp.handshake import Deadline, Met, answer
from distopt.errors import DistoptError

_MAX_STRANGERS = 64  # connections in their handshake, beside those of all peers at once
_SWEEP_S = 0.5  # between two looks at what has had its time
_PAUSE_S = 0.05  # when the system has nothing to give


class TCPServer(End):
    """Rank 0 of a star. See `distopt.comm.Transport` and `ReturningTransport`. Listens at once, and waits for nobody.

    Args:
        listen: "host:port": an address of this machine, and the only interface where peers are heard. With port 0 the
            system chooses one; `address` tells.
        size: Number of ranks, this one included. Peers that say otherwise are refused.
        max_frame_bytes: Length of the longest frame. Who announces a longer one is cut off at once.
        secret: The job secret (`read_secret`); without one `listen` must be a loopback address.
        max_pending_bytes: So much may wait for each peer, or it is cut off, and so much of each peer, or it has to
            wait; 16 of the longest frames by default, at least 64 MiB.
        silence_s: A machine that has been silent, or whose process has taken nothing that waits for it, is given up
            after so long.
        handshake_s: Who has not shown who he is after so long is ended.

    Raises:
        ConfigError: An argument breaks its rule, or the address is in use, is none of this machine, or could be reached
            by others in a job without a secret.
    """

    def __init__(
        self,
        listen: str,
        *,
        size: int,
        max_frame_bytes: int,
        secret: bytes | None = None,
        max_pending_bytes: int | None = None,
        silence_s: float = 30.0,
        handshake_s: float = 10.0,
    ) -> None:
        super().__init__(0, size, secret, max_frame_bytes, max_pending_bytes, silence_s, handshake_s)
        self._listener = open_listener(parse_address(listen), needs_loopback=secret is None)
        self.address = Address(*self._listener.getsockname()[:2])
        self._threads: set[threading.Thread] = set()
        self._strangers: dict[int, tuple[str, socket.socket]] = {}  # by number, the oldest first: host, and connection
        self._link_numbers: dict[int, int] = {}
        self._retired: list[tuple[float, Connection]] = []
        self._listener.settimeout(_SWEEP_S)
        self._acceptor = threading.Thread(target=self._accept, name="distopt-tcp-accept", daemon=True)
        self._acceptor.start()
        open_ends.add(self)

    def close(self, timeout_s: float) -> None:
        """See `Transport.close`. Waits until the connected peers have taken what is queued and ended their side."""
        if self._closing.is_set():
            return
        end = time.monotonic() + timeout_s
        self._closing.set()
        self._inbox.wake()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._acceptor.join()
        with self._lock:
            links, strangers = list(self._links.values()), [stream for _, stream in self._strangers.values()]
            retired = [link for _, link in self._retired]
        for stranger in strangers:
            shut(stranger)
        for link in links:
            link.finish()
        for link in retired:
            link.cut()
        for thread in list(self._threads):
            thread.join(max(0.0, end - time.monotonic()))
        for link in links:
            link.cut()
        for thread in list(self._threads):
            thread.join()
        self._inbox.close()
        open_ends.discard(self)

    # -- the threads -------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            with self._listener:
                for number in itertools.count(1):
                    self._sweep()
                    if self._closing.is_set():
                        break
                    try:
                        stream, place = self._listener.accept()
                    except TimeoutError:
                        continue
                    except OSError as error:  # too many open files, or it was shut
                        if not self._closing.wait(_PAUSE_S):
                            self._refuse("no resources", f"a connection ({error})")
                        continue
                    self._meet(number, stream, str(place[0]))
        except BaseException as error:
            log.exception("the TCP server has broken")
            self._failure = DistoptError(f"the TCP server at {self.address} has broken: {error}")
            self._inbox.close()

    def _meet(self, number: int, stream: socket.socket, host: str) -> None:
        """Gives a new connection a thread; ends one of too many that have not shown who they are."""
        with self._lock:
            self._strangers[number] = host, stream
            excess = len(self._strangers) > _MAX_STRANGERS + self.size
            if excess:  # the oldest of the host that has most: who floods keeps nobody else out
                crowded = Counter(origin for origin, _ in self._strangers.values()).most_common(1)[0][0]
                oldest = next(each for each, (origin, _) in self._strangers.items() if origin == crowded)
                shut(self._strangers.pop(oldest)[1])
        if excess:
            self._refuse("too many", f"the oldest connection from {crowded} that has not shown who it is")
        thread = threading.Thread(target=self._serve, args=(number, stream), name="distopt-tcp-read", daemon=True)
        self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError as error:  # the system gives no more threads
            self._threads.discard(thread)
            with self._lock:
                self._strangers.pop(number, None)
            stream.close()
            self._refuse("no resources", f"a connection ({error})")

    def _sweep(self) -> None:
        """Ends connections that were replaced and are still there."""
        now = time.monotonic()
        with self._lock:
            due = [link for end, link in self._retired if end <= now]
            self._retired = [(end, link) for end, link in self._retired if end > now]
        for link in due:
            link.cut()

    def _serve(self, number: int, stream: socket.socket) -> None:
        """One connection, from its first byte to its last."""
        try:
            met = self._shake_hands(number, stream)
            if met is not None:
                self._converse(number, stream, met)
        except Exception:
            log.exception("a connection has failed")
        finally:
            with self._lock:
                self._strangers.pop(number, None)
            stream.close()
            self._threads.discard(threading.current_thread())

    def _shake_hands(self, number: int, stream: socket.socket) -> Met | None:
        who = "a connection"
        try:
            who = f"a connection from {stream.getpeername()[0]}"
            keep_watch(stream, self._silence_s)
            return answer(
                stream,
                Deadline(self._handshake_s),
                size=self.size,
                secret=self._secret,
                is_taken=lambda rank: self._secret is None and rank in self.connected,
            )
        except (RefusedError, OSError) as error:
            reason = "too slow" if isinstance(error, TimeoutError) else "ended early"
            if number in self._strangers and not self._closing.is_set():  # else it was ended here
                self._refuse(error.reason if isinstance(error, RefusedError) else reason, who)
            return None

    def _converse(self, number: int, stream: socket.socket, met: Met) -> None:
        link = Connection(
            stream,
            met.outgoing,
            met.incoming,
            max_frame_bytes=self.max_frame_bytes,
            max_pending_bytes=self._max_pending_bytes,
        )
        try:
            if self._welcome(number, met.rank, link):
                self._read(met.rank, link)
        except RefusedError as refusal:
            self._refuse(refusal.reason, f"a record from rank {met.rank}")
        except OSError as error:
            log.info("the connection of rank %d is gone: %s", met.rank, error)
        finally:
            with self._lock:
                if self._links.get(met.rank) is link:
                    del self._links[met.rank]
            link.close()

    def _welcome(self, number: int, rank: int, link: Connection) -> bool:
        """Makes this the connection of its rank; False where it must not be."""
        with self._lock:
            was_ended = self._strangers.pop(number, None) is None
            before = self._links.get(rank)
            is_there = before is not None and not before.is_broken
            if self._closing.is_set() or was_ended or (is_there and self._secret is None):
                return False
            if number < self._link_numbers.get(rank, 0):  # somebody has held its end back until now
                return False
            link.send(WELCOME)  # before anybody else can say something on this connection
            self._links[rank] = link
            self._link_numbers[rank] = number
            self._connections[rank] += 1
            if before is not None and is_there:
                before.finish(REPLACED)
                self._retired.append((time.monotonic() + self._silence_s, before))
        self._inbox.wake()
        return True

    def _read(self, rank: int, link: Connection) -> None:
        while (got := link.read()) is not None:
            kind, frame = got
            if kind == FRAME:
                self._deliver(rank, link, frame)
            del got, frame  # belongs to whoever receives it

    def _forget_after_fork(self) -> None:
        for stream in (self._listener, *(stream for _, stream in self._strangers.values())):
            stream.close()
        for link in self._links.values():
            link.forget_after_fork()

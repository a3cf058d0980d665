"""A peer in a star of TCP connections: a rank above 0, which connects and comes back."""

import logging
import random
import socket
import threading
import time

from distopt.comm.address import is_loopback, keep_watch, need_of_secret, parse_address
from distopt.comm.session import RefusedError
from distopt.comm.tcp.connection import FRAME, REPLACED, WELCOME, Connection
from distopt.comm.tcp.end import End, log, open_ends, shut
from distopt.comm.tcp.handshake import Deadline, NotYetError, ask
from distopt.config import check_count, check_number
from distopt.errors import ConfigError, DistoptError, PeerLostError

_CONNECT_S = 5.0  # for one attempt
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 5.0  # between two attempts


class TCPPeer(End):
    """A rank above 0 of a star. See `distopt.comm.Transport` and `ReturningTransport`. Waits until it is connected.

    Args:
        server: "host:port" of the server.
        rank: Of this process, from 1 to `size` - 1.
        size: Number of ranks, as the server was told.
        max_frame_bytes: Length of the longest frame.
        secret: The job secret (`read_secret`); without one the server must be at a loopback address.
        connect_timeout_s: So long it tries to connect at first.
        patience_s: So long it tries to come back, each time that the connection breaks.
        max_pending_bytes: So much of the server may wait here; 16 of the longest frames by default, at least 64 MiB.
            What this end sends may wait without a bound, as links may be slow; `pending_bytes` tells.
        silence_s: A server whose machine has been silent, or which has taken nothing that waits, is given up after so
            long, and connected to anew.
        handshake_s: For the handshake of one attempt.

    Raises:
        ConfigError: An argument breaks its rule, or the server's job has another size.
        PeerLostError: There was no server for `connect_timeout_s`. `send`, `receive` and `probe` raise it later, when
            there was none for `patience_s`.
    """

    def __init__(
        self,
        server: str,
        *,
        rank: int,
        size: int,
        max_frame_bytes: int,
        secret: bytes | None = None,
        connect_timeout_s: float = 60.0,
        patience_s: float = 600.0,
        max_pending_bytes: int | None = None,
        silence_s: float = 30.0,
        handshake_s: float = 10.0,
    ) -> None:
        for name, value in (("connect_timeout_s", connect_timeout_s), ("patience_s", patience_s)):
            rule = "a positive number of seconds"
            check_number(name, value, rule=rule, remedy="leave it out for the default", low=0.0, high=1e9)
        check_count("rank", rank, low=1, remedy="rank 0 is the server")
        super().__init__(rank, size, secret, max_frame_bytes, max_pending_bytes, silence_s, handshake_s)
        if rank >= size:
            raise ConfigError(f"rank must be from 1 to size - 1 = {size - 1}, got {rank}; count from 1")
        self.server = parse_address(server)
        if self.server.port == 0:
            raise ConfigError(
                f"the port of a server must be from 1 to 65535, got {server!r}; see what the server prints"
            )
        self._connect_timeout_s = connect_timeout_s
        self._patience_s = patience_s
        self._random = random.Random()  # of its own: nobody's seeds are disturbed
        self._pause_s = _FIRST_PAUSE_S
        self._stream: socket.socket | None = None
        self._decided = threading.Event()  # connected for the first time, or given up
        self._thread = threading.Thread(target=self._run, name="distopt-tcp-peer", daemon=True)
        self._thread.start()
        try:
            self._decided.wait()
            self._check()
        except BaseException:
            self.close(0.0)
            raise
        open_ends.add(self)

    def close(self, timeout_s: float) -> None:
        """See `Transport.close`. Waits until the server has taken what is queued and ended its side."""
        if self._closing.is_set():
            return
        end = time.monotonic() + timeout_s
        self._closing.set()
        self._inbox.wake()
        link = self._links.get(0)
        if link is not None:
            link.finish()
            self._thread.join(max(0.0, end - time.monotonic()))
        if self._stream is not None:
            shut(self._stream)
        if link is not None:
            link.cut()
        self._thread.join(_CONNECT_S)  # a name that is being looked up cannot be given up
        self._inbox.close()
        open_ends.discard(self)

    def _check_destination(self, destination: int) -> None:
        if destination not in (0, self.rank):
            raise ConfigError(
                f"a TCP peer talks to the server, rank 0, and to itself, got destination {destination}; send to rank 0"
            )

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            patience_s = self._connect_timeout_s
            while (link := self._connect(patience_s)) is not None:
                self._decided.set()
                begin = time.monotonic()
                self._read(link)
                if time.monotonic() - begin > _LONGEST_PAUSE_S:
                    self._pause_s = _FIRST_PAUSE_S
                else:  # a server may end it again and again, because of what it is sent
                    self._pause(patience_s)
                patience_s = self._patience_s
        except DistoptError as error:
            self._failure = error
        except BaseException as error:
            log.exception("the TCP transport of rank %d has broken", self.rank)
            self._failure = DistoptError(f"the TCP transport of rank {self.rank} has broken: {error}")
        finally:
            self._decided.set()
            if self._failure is not None:
                self._inbox.close()

    def _connect(self, patience_s: float) -> Connection | None:
        """A connection that the server has welcomed; None once this end is closing."""
        end, why = time.monotonic() + patience_s, ""
        warned: set[str] = set()
        while not self._closing.is_set():
            left_s, is_refused = end - time.monotonic(), False
            try:
                return self._try_once(left_s)
            except RefusedError as refusal:
                self._refuse(refusal.reason, f"the server at {self.server}")
                why = f"what listens there does not have the job secret ({refusal.reason})"
            except (NotYetError, OSError, UnicodeError) as error:
                had_no_time = isinstance(error, TimeoutError) and left_s < self._handshake_s
                why = why if why and had_no_time else str(error) or type(error).__name__
                is_refused = isinstance(error, NotYetError)
            left_s = end - time.monotonic()
            if left_s <= 0:
                raise PeerLostError(
                    f"rank {self.rank} has not reached the server at {self.server} for {patience_s:g} s: "
                    f"{why}. Start the server, give the address that it prints, or wait longer "
                    "(connect_timeout_s at first, patience_s to come back)",
                    (0,),
                )
            level = logging.INFO
            if is_refused and why not in warned:  # that a user has to mend, while a server that is late will come
                warned.add(why)
                level = logging.WARNING
            log.log(level, "rank %d: no connection to %s yet: %s", self.rank, self.server, why)
            self._pause(left_s)
        return None

    def _pause(self, longest_s: float) -> None:
        """Random, so that the peers of a server that was restarted do not all come in the same moment."""
        self._closing.wait(min(longest_s, self._random.uniform(0.5, 1.0) * self._pause_s))
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def _try_once(self, left_s: float) -> Connection:
        deadline = Deadline(max(0.01, min(self._handshake_s, left_s)))
        stream = self._open_stream(max(0.01, min(_CONNECT_S, left_s)))
        link: Connection | None = None
        try:
            keep_watch(stream, self._silence_s)
            met = ask(stream, deadline, rank=self.rank, size=self.size, secret=self._secret)
            link = Connection(
                stream,
                met.outgoing,
                met.incoming,
                max_frame_bytes=self.max_frame_bytes,
                max_pending_bytes=None,
            )
            welcome = link.read(deadline)
            if welcome is None or welcome[0] != WELCOME:
                raise NotYetError("the server ended the connection instead of a welcome")
        except BaseException:
            if link is not None:
                link.close()
            stream.close()
            raise
        with self._lock:
            self._links[0] = link
            self._connections[0] += 1
        if self._closing.is_set():
            link.finish()
        return link

    def _open_stream(self, timeout_s: float) -> socket.socket:
        """A socket connected to the first of the host's addresses that answers."""
        failure: OSError = OSError(f"{self.server.host} has no address")
        for family, kind, protocol, _, place in socket.getaddrinfo(*self.server, type=socket.SOCK_STREAM):
            if self._secret is None and not is_loopback(str(place[0])):
                raise ConfigError(need_of_secret(self.server))
            stream = self._stream = socket.socket(family, kind, protocol)
            try:
                stream.settimeout(timeout_s)
                stream.connect(place)
                if stream.getsockname() != stream.getpeername():
                    return stream
                # The system took the server's own port for this end, while nobody listened there.
                raise ConnectionRefusedError("nothing listens there")
            except OSError as error:
                stream.close()
                failure = error
        raise failure

    def _read(self, link: Connection) -> None:
        """Takes what comes until the connection ends."""
        try:
            while (got := link.read()) is not None:
                kind, frame = got
                if kind == REPLACED:
                    raise ConfigError(
                        f"another process has connected to {self.server} as rank {self.rank} and taken its place; give "
                        "each process a rank of its own"
                    )
                if kind == FRAME:
                    self._deliver(0, link, frame)
                del got, frame  # belongs to whoever receives it
        except RefusedError as refusal:
            self._refuse(refusal.reason, f"a record from {self.server}")
        except OSError as error:
            log.info("rank %d: the connection to %s is gone: %s", self.rank, self.server, error)
        finally:
            with self._lock:
                del self._links[0]
            link.close()

    def _forget_after_fork(self) -> None:
        if self._stream is not None:
            self._stream.close()

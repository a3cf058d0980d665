"""What a TCP connection between two ranks can do: whether there is one, its latency, its rate each way, the clocks.

A rank listens on one of its addresses and serves the others' probes in threads. Who connects shows the listener's
token first; nothing else is answered. The clocks are compared as NTP does it (RFC 5905): of the fastest round trip, the
other's time against the middle of ours, wrong by no more than half of it.

Limits: one connection, so on a link of many milliseconds and gigabits the rate is that of one TCP stream.
"""

import contextlib
import hmac
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from distopt.comm import Address
from distopt.comm.address import open_listener

TOKEN_BYTES = 16
_REQUEST = struct.Struct("<cq")  # what is asked, and of how many bytes
_TIME = struct.Struct("<d")
_PINGS = 25
_FIRST_BYTES = 1 << 16
_MOST_BYTES = 1 << 28
_LONG_ENOUGH_S = 0.25  # a transfer that takes so long is not the burst that a switch lets pass
_CHUNK_BYTES = 1 << 18
_IDLE_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What a probe found.

    Attributes:
        connect_s: Until the connection was there.
        latency_s: One way, half of the fastest round trip.
        send_bandwidth: Bytes per second to the other.
        receive_bandwidth: Bytes per second from it.
        clock_offset_s: What the other's clock is ahead.
        clock_uncertainty_s: How wrong that may be.
    """

    connect_s: float
    latency_s: float
    send_bandwidth: float
    receive_bandwidth: float
    clock_offset_s: float
    clock_uncertainty_s: float


class ProbeServer:
    """Answers probes until `close`; also a context manager.

    Args:
        host: The address of this machine to listen on.
        now: The clock to tell, in seconds.

    Attributes:
        port: Where it listens.
        token: What a probe must show.
    """

    def __init__(self, host: str, now: Callable[[], float] = time.time) -> None:
        self.token = os.urandom(TOKEN_BYTES)
        self._now = now
        self._listener = open_listener(Address(host, 0), needs_loopback=False)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True, name="doctor").start()

    def close(self) -> None:
        """Stops to listen; connections that are open end by themselves."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept
        self._listener.close()

    def __enter__(self) -> "ProbeServer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(connection,), daemon=True, name="doctor").start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, EOFError):
            connection.settimeout(_IDLE_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not hmac.compare_digest(_receive(connection, TOKEN_BYTES), self.token):
                return
            while True:
                kind, nbytes = _REQUEST.unpack(_receive(connection, _REQUEST.size))
                if kind == b"t":
                    connection.sendall(_TIME.pack(self._now()))
                elif kind == b"s" and 0 <= nbytes <= _MOST_BYTES:  # the other sends
                    _drain(connection, nbytes)
                    connection.sendall(_TIME.pack(0.0))
                elif kind == b"r" and 0 <= nbytes <= _MOST_BYTES:
                    _fill(connection, nbytes)
                else:
                    return


def reach(host: str, port: int, token: bytes, *, timeout_s: float) -> float:
    """Connects and has the other answer once; seconds until the connection was there.

    Raises:
        OSError: There is no way, or no answer within `timeout_s`.
    """
    with _connect(host, port, token, time.monotonic() + timeout_s) as (connection, connect_s):
        _ask_time(connection)
        return connect_s


def probe(host: str, port: int, token: bytes, *, timeout_s: float, now: Callable[[], float] = time.time) -> Probed:
    """Measures the connection to a `ProbeServer`.

    Args:
        host: Its address.
        port: Where it listens.
        token: Of it.
        timeout_s: For all of it. A rate that is not known by then is what has passed until then.
        now: This machine's clock.

    Raises:
        OSError: There is no way, or no answer within `timeout_s`.
    """
    end = time.monotonic() + timeout_s
    with _connect(host, port, token, end) as (connection, connect_s):
        trips = [_trip(connection, now) for _ in range(_PINGS)]
        round_s, offset_s = min(trips)
        share_s = (end - time.monotonic()) / 2
        sent = _rate(lambda nbytes: _send(connection, nbytes), round_s, time.monotonic() + share_s)
        received = _rate(lambda nbytes: _fetch(connection, nbytes), round_s, time.monotonic() + share_s)
    return Probed(
        connect_s=connect_s,
        latency_s=round_s / 2,
        send_bandwidth=sent,
        receive_bandwidth=received,
        clock_offset_s=offset_s,
        clock_uncertainty_s=round_s / 2,
    )


@contextlib.contextmanager
def _connect(host: str, port: int, token: bytes, end: float) -> Iterator[tuple[socket.socket, float]]:
    began = time.monotonic()
    connection = socket.create_connection((host, port), timeout=max(0.01, end - began))
    with connection:
        connect_s = time.monotonic() - began
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(max(0.01, end - time.monotonic()))
        connection.sendall(token)
        try:
            yield connection, connect_s
        except EOFError as error:
            raise ConnectionError("the connection was ended by the other side") from error


def _trip(connection: socket.socket, now: Callable[[], float]) -> tuple[float, float]:
    """Seconds of a round trip, and what the other's clock was ahead of the middle of it."""
    began, before = time.perf_counter(), now()
    told = _ask_time(connection)
    round_s = time.perf_counter() - began
    return round_s, told - (before + round_s / 2)


def _ask_time(connection: socket.socket) -> float:
    connection.sendall(_REQUEST.pack(b"t", 0))
    (told,) = _TIME.unpack(_receive(connection, _TIME.size))
    return float(told)


def _rate(transfer: Callable[[int], None], round_s: float, end: float) -> float:
    """Bytes per second, of a transfer that takes long enough, without the round trip that every one has."""
    nbytes = _FIRST_BYTES
    while True:
        began = time.perf_counter()
        transfer(nbytes)
        took_s = max(time.perf_counter() - began - round_s, 1e-9)
        if took_s >= _LONG_ENOUGH_S or nbytes >= _MOST_BYTES or time.monotonic() + 5 * took_s > end:
            return nbytes / took_s
        nbytes = min(_MOST_BYTES, nbytes * (2 if took_s > _LONG_ENOUGH_S / 8 else 4))


def _send(connection: socket.socket, nbytes: int) -> None:
    connection.sendall(_REQUEST.pack(b"s", nbytes))
    _fill(connection, nbytes)
    _receive(connection, _TIME.size)


def _fetch(connection: socket.socket, nbytes: int) -> None:
    connection.sendall(_REQUEST.pack(b"r", nbytes))
    _drain(connection, nbytes)


def _fill(connection: socket.socket, nbytes: int) -> None:
    chunk = bytes(_CHUNK_BYTES)
    while nbytes > 0:
        connection.sendall(chunk[: min(nbytes, _CHUNK_BYTES)])
        nbytes -= _CHUNK_BYTES


def _drain(connection: socket.socket, nbytes: int) -> None:
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while nbytes > 0:
        got = connection.recv_into(buffer[: min(nbytes, _CHUNK_BYTES)])
        if not got:
            raise EOFError
        nbytes -= got


def _receive(connection: socket.socket, nbytes: int) -> bytes:
    parts = b""
    while len(parts) < nbytes:
        part = connection.recv(nbytes - len(parts))
        if not part:
            raise EOFError
        parts += part
    return parts

"""What a rank answers beside its exchanges: one question and one answer a connection, over plain TCP.

Every rank has a board, so that no single rank's death takes the only one away. Questions and answers are JSON of at
most `_MAX_BYTES`; nothing is unpickled. With a job secret (`DISTOPT_JOB_SECRET`) both are authenticated by HMAC-SHA256
under nonces of both ends, so that nothing can be replayed; without one, whoever reaches the port may ask.

Limits: nothing is encrypted, and the tensors that ranks exchange do not pass here: gloo's own connections know no
secret. A thread for each open connection, at most `_MAX_CONNECTIONS`.
"""

import contextlib
import hmac
import json
import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

from distopt.comm import Address
from distopt.comm.address import open_listener
from distopt.comm.session import derive_key, tag_of

_log = logging.getLogger("distopt")
_HEAD = struct.Struct(">BI32s")  # kind, bytes of JSON, tag
_ASK, _WAIT, _ANSWER = range(1, 4)
_NONCE_BYTES = 32
_MAX_BYTES = 1 << 22
_MAX_CONNECTIONS = 1024  # every rank holds one while it waits for a meeting: more ranks cannot meet
_CONNECT_S = 3.0  # a host that is there answers in less; one that is cut off costs so much
_QUESTION_S = 10.0  # for a question to arrive
SILENCE_S = 10.0  # of a board whose answer is waited for: it says several times in this time that it is still there


class GoneError(Exception):
    """Nobody listens there any more: the process has ended."""


class UnreachableError(Exception):
    """No answer: the process is stopped, or the network is cut, or it has another secret."""


class Line:
    """A question's connection, as the board sees it."""

    def __init__(self, connection: socket.socket, key: bytes | None, nonces: bytes) -> None:
        self._connection, self._key, self._nonces = connection, key, nonces
        self._records = 0

    def hold(self) -> bool:
        """Tells who has asked that the answer will take a while; whether he still waits for it."""
        try:
            if select.select([self._connection], [], [], 0.0)[0]:  # nothing more is asked: it is the end
                return False
            self._say(_WAIT, None)
        except OSError:
            return False
        return True

    def answer(self, value: Any) -> None:
        """Says it, if anybody still waits."""
        with contextlib.suppress(OSError):
            self._say(_ANSWER, value)

    def _say(self, kind: int, value: Any) -> None:
        self._records += 1
        _send(self._connection, kind, value, self._key, self._nonces + self._records.to_bytes(8, "big"))


class Board:
    """Listens from when it is made until `close`.

    Args:
        interface: The address of this machine to listen on; the system chooses the port.
        secret: The job's, if it has one.
        answer: Called with what is asked and the line, each time in a thread of its own; returns the answer, None for
            none.

    Raises:
        ConfigError: It is no address of this machine.
    """

    def __init__(self, interface: str, secret: bytes | None, answer: Callable[[Any, Line], Any]) -> None:
        self._key = _key(secret)
        self._answer = answer
        self._listener = open_listener(Address(interface, 0), needs_loopback=False)
        self._free = threading.Semaphore(_MAX_CONNECTIONS)
        self._closing = False
        self.address = Address(interface, int(self._listener.getsockname()[1]))
        self._thread = threading.Thread(target=self._listen, name="distopt-crew-board", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while not self._closing:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if not self._closing:
                    time.sleep(0.1)  # out of descriptors, say
                continue
            if self._closing or not self._free.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), name="distopt-crew-answer", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.settimeout(_QUESTION_S)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                own = os.urandom(_NONCE_BYTES)
                connection.sendall(own)
                nonces = own + _receive(connection, _NONCE_BYTES)
                kind, question = _read(connection, self._key, nonces)
                if kind == _ASK:
                    line = Line(connection, self._key, nonces)
                    answer = self._answer(question, line)
                    if answer is not None:
                        line.answer(answer)
        except (OSError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError, RecursionError) as error:
            _log.debug("ranks: a question was not understood: %r", error)
        finally:
            self._free.release()

    def close(self) -> None:
        """Stops to listen; answers that are under way may still be given."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()
        self._listener.close()


def ask(address: tuple[str, int], question: Any, secret: bytes | None, *, within_s: float | None = _CONNECT_S) -> Any:
    """What the board there answers.

    Args:
        address: Of the board.
        question: Anything that JSON can hold.
        secret: The job's, if it has one.
        within_s: For the answer; None for as long as the board says that it is there.

    Raises:
        GoneError: Nobody listens there.
        UnreachableError: Nobody answers.
    """
    key = _key(secret)
    end = None if within_s is None else time.monotonic() + within_s
    try:
        with socket.create_connection(address, timeout=min(_CONNECT_S, within_s or _CONNECT_S)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            own = os.urandom(_NONCE_BYTES)
            nonces = _receive(connection, _NONCE_BYTES) + own
            connection.sendall(own)
            _send(connection, _ASK, question, key, nonces)
            for number in range(1, 1 << 62):
                connection.settimeout(SILENCE_S if end is None else max(0.01, end - time.monotonic()))
                kind, value = _read(connection, key, nonces + number.to_bytes(8, "big"))
                if kind == _ANSWER:
                    return value
    except ConnectionRefusedError as error:
        raise GoneError from error
    except (OSError, ValueError, OverflowError, RecursionError) as error:  # a port beyond 65535, say
        raise UnreachableError from error
    raise AssertionError


def ask_all(
    addresses: Mapping[int, tuple[str, int]], question: Any, secret: bytes | None, *, within_s: float = _CONNECT_S
) -> dict[int, Any]:
    """The answers, or the `GoneError` or `UnreachableError`, of several boards at once, by number; see `ask`."""
    answers: dict[int, Any] = {}

    def one(number: int) -> None:
        try:
            answers[number] = ask(addresses[number], question, secret, within_s=within_s)
        except (GoneError, UnreachableError) as error:
            answers[number] = error

    threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in addresses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


# -- records -----------------------------------------------------------------------------------------------------------


def _key(secret: bytes | None) -> bytes | None:
    return None if secret is None else derive_key(secret, "crew board")


def _send(connection: socket.socket, kind: int, value: Any, key: bytes | None, nonces: bytes) -> None:
    content = json.dumps(value).encode()
    if len(content) > _MAX_BYTES:
        raise ValueError(f"{len(content)} bytes are too many")
    tag = tag_of(key, nonces + bytes([kind]), memoryview(content))
    connection.sendall(_HEAD.pack(kind, len(content), tag) + content)


def _read(connection: socket.socket, key: bytes | None, nonces: bytes) -> tuple[int, Any]:
    kind, length, tag = _HEAD.unpack(_receive(connection, _HEAD.size))
    if length > _MAX_BYTES:
        raise ValueError(f"{length} bytes are too many")
    content = _receive(connection, length)
    if not hmac.compare_digest(tag, tag_of(key, nonces + bytes([kind]), memoryview(content))):
        raise ValueError("what was said is not authenticated: the other side has another job secret, or none")
    return cast(int, kind), json.loads(content)


def _receive(connection: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = connection.recv(min(length - len(parts), 1 << 16))
        if not part:
            raise OSError("the connection has ended")
        parts += part
    return bytes(parts)

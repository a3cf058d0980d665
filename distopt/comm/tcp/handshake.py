"""How a peer and a server meet on a new TCP connection: who is it, of which job, and does it have the secret.

    peer    HELLO    rank, size, a nonce; sealed with the secret
    server  ANSWER   a nonce of its own, or why not; sealed with the secret over both
    peer    CONFIRM  a tag over both
    server  WELCOME  the first record of the connection, sent when it counts (see `connection.py`)

The HELLO shows who has the secret, the CONFIRM that he is there now and no copy; until then nothing changes on the
server. The keys of both directions are made of all bytes of HELLO and ANSWER. Every message has one fixed length, and
all of them together one deadline. Without a secret the tags are zero.
"""

import enum
import hmac
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import NamedTuple

from distopt.comm.session import NONCE_BYTES, RefusedError, Session, derive_key, tag_of
from distopt.errors import ConfigError

_VERSION = 1
_HELLO = struct.Struct("<4sHHII32s32s")  # magic, version, whether there is a secret, rank, size, nonce, tag
_ANSWER = struct.Struct("<4sHHII32s32s")  # magic, version, verdict, rank, size, nonce, tag
_MAGIC = b"DTCP"
_TAG_BYTES = 32


class Verdict(enum.IntEnum):
    """What a server answers."""

    COME = 0
    OTHER_VERSION = 1
    NO_SECRET = 2  # the server has none
    UNAUTHENTICATED = 3
    WRONG_SIZE = 4
    WRONG_RANK = 5
    RANK_TAKEN = 6


_REASONS = {  # words that refusals are counted by
    Verdict.OTHER_VERSION: "other version",
    Verdict.NO_SECRET: "unauthenticated",
    Verdict.UNAUTHENTICATED: "unauthenticated",
    Verdict.WRONG_SIZE: "wrong size",
    Verdict.WRONG_RANK: "wrong rank",
    Verdict.RANK_TAKEN: "rank taken",
}


class Met(NamedTuple):
    """Who the other end is, and the sessions of the connection."""

    rank: int
    outgoing: Session
    incoming: Session


class NotYetError(Exception):
    """The server cannot be spoken to, for a reason that may pass. Internal."""


class Deadline:
    """Lets a socket wait until a moment, however many calls that takes."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left_s(self) -> float:
        """Seconds that are left.

        Raises:
            TimeoutError: None.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time for the handshake is over")
        return left


def read_exactly(connection: socket.socket, view: memoryview, deadline: Deadline | None) -> int:
    """Fills `view`, or returns how many bytes came before the other side ended."""
    at = 0
    while at < len(view):
        if deadline is not None:
            connection.settimeout(deadline.left_s())
        got = connection.recv_into(view[at:])
        if not got:
            break
        at += got
    return at


def answer(
    connection: socket.socket,
    deadline: Deadline,
    *,
    size: int,
    secret: bytes | None,
    is_taken: Callable[[int], bool],
) -> Met:
    """The server's side, up to WELCOME.

    Raises:
        RefusedError: The other end may not come in; it is told why, where it asked in the right form.
        OSError: The connection broke, or the deadline has passed.
    """
    hello = _read(connection, _HELLO.size, deadline)
    magic, version, has_secret, rank, its_size, _, _ = _HELLO.unpack(hello)
    if magic != _MAGIC:
        raise RefusedError("garbage")
    if version != _VERSION:
        verdict = Verdict.OTHER_VERSION
    elif secret is None and has_secret:
        verdict = Verdict.NO_SECRET
    elif not _is_sealed(secret, "hello", b"", hello):
        verdict = Verdict.UNAUTHENTICATED
    elif its_size != size:
        verdict = Verdict.WRONG_SIZE
    elif not 0 < rank < size:
        verdict = Verdict.WRONG_RANK
    elif is_taken(rank):
        verdict = Verdict.RANK_TAKEN
    else:
        verdict = Verdict.COME
    # Who has not shown that he has the secret gets nothing that is made with it.
    known = verdict not in (Verdict.OTHER_VERSION, Verdict.NO_SECRET, Verdict.UNAUTHENTICATED)
    fields = (_MAGIC, _VERSION, verdict, rank, size, os.urandom(NONCE_BYTES))
    said = _sealed(secret if known else None, "answer", hello, _ANSWER, fields)
    connection.settimeout(deadline.left_s())
    connection.sendall(said)
    if verdict != Verdict.COME:
        raise RefusedError(_REASONS[verdict])
    confirmation = _read(connection, _TAG_BYTES, deadline)
    if not hmac.compare_digest(confirmation, _tag(secret, "confirm", hello + said)):
        raise RefusedError("unauthenticated")
    return Met(rank, _session(secret, "to peer", hello + said), _session(secret, "to server", hello + said))


def ask(connection: socket.socket, deadline: Deadline, *, rank: int, size: int, secret: bytes | None) -> Met:
    """The peer's side, up to WELCOME.

    Raises:
        ConfigError: The server does not let this rank in, and never will.
        NotYetError: It does not now, or is not believed.
        OSError: The connection broke, or the deadline has passed.
    """
    fields = (_MAGIC, _VERSION, secret is not None, rank, size, os.urandom(NONCE_BYTES))
    hello = _sealed(secret, "hello", b"", _HELLO, fields)
    connection.settimeout(deadline.left_s())
    connection.sendall(hello)
    try:
        said = _read(connection, _ANSWER.size, deadline)
    except RefusedError as error:
        raise NotYetError("what listens there does not answer as a server of this job") from error
    magic, version, verdict, its_rank, its_size, _, _ = _ANSWER.unpack(said)
    if magic != _MAGIC:
        raise NotYetError("what listens there is not a server of distopt")
    if not _is_sealed(secret, "answer", hello, said) or (verdict == Verdict.COME and its_rank != rank):
        raise NotYetError(_hint(verdict, version, secret is not None))
    if verdict == Verdict.WRONG_SIZE:
        raise ConfigError(f"the server has a job of size {its_size}, rank {rank} one of {size}; give both the same")
    if verdict == Verdict.WRONG_RANK:
        raise ConfigError(f"a peer's rank must be from 1 to {its_size - 1}, got {rank}; rank 0 is the server")
    if verdict != Verdict.COME:
        raise NotYetError(_hint(verdict, version, secret is not None))
    connection.settimeout(deadline.left_s())
    connection.sendall(_tag(secret, "confirm", hello + said))
    return Met(0, _session(secret, "to server", hello + said), _session(secret, "to peer", hello + said))


def _hint(verdict: int, version: int, has_secret: bool) -> str:
    """What an answer that cannot be believed, or that may change, is to a user."""
    if verdict == Verdict.UNAUTHENTICATED and not has_secret:
        return "it has a job secret, and this process has none; give both the same, or neither"
    hints: dict[int, str] = {
        Verdict.OTHER_VERSION: f"it speaks version {version} of the protocol and this process {_VERSION}; install the "
        "same distopt on both",
        Verdict.NO_SECRET: "it has no job secret, and this process has one; give both the same, or neither",
        Verdict.UNAUTHENTICATED: "it has another job secret than this process; give both the same",
        Verdict.RANK_TAKEN: "another process is connected as this rank; give each a rank of its own",
    }
    return hints.get(verdict, "what listens there does not have the job secret of this process; give both the same")


def _read(connection: socket.socket, num_bytes: int, deadline: Deadline) -> bytes:
    got = bytearray(num_bytes)
    if read_exactly(connection, memoryview(got), deadline) < num_bytes:
        raise RefusedError("ended early")
    return bytes(got)


def _sealed(
    secret: bytes | None, purpose: str, before: bytes, form: struct.Struct, fields: tuple[bytes | int, ...]
) -> bytes:
    start = form.pack(*fields, b"")[:-_TAG_BYTES]
    return start + _tag(secret, purpose, before + start)


def _is_sealed(secret: bytes | None, purpose: str, before: bytes, said: bytes) -> bool:
    return hmac.compare_digest(said[-_TAG_BYTES:], _tag(secret, purpose, before + said[:-_TAG_BYTES]))


def _tag(secret: bytes | None, purpose: str, content: bytes) -> bytes:
    key = None if secret is None else derive_key(secret, f"tcp {purpose}")
    return tag_of(key, content, memoryview(b""))


def _session(secret: bytes | None, direction: str, transcript: bytes) -> Session:
    return Session(None if secret is None else derive_key(secret, f"tcp {direction}", transcript))

"""Authenticated records: HMAC-SHA256 (RFC 2104) over header and payload, under a key of one session and direction.

A record is a header of 64 bytes and the payload: a 1-D frame of the transport. The key is made from the job secret and
from nonces of both ends, and the record's number is part of what is authenticated, so that a record of another session,
another direction or another time, a copy, and one out of order are refused. Payloads are read in place, never copied.

Without a key the tag is zero, and a record is only checked for its form and its number.

Limits: nothing is encrypted. What is cut off at the end of a session is for the roles to miss.
"""

import hashlib
import hmac
import struct
from typing import NamedTuple

from distopt.errors import DistoptError

_HEADER = struct.Struct("<4sB3xQQQ32s")  # magic, kind, session, number, payload bytes, tag
_MAGIC = b"DREC"
_TAG_BYTES = 32
HEADER_BYTES = _HEADER.size  # a multiple of 64: tensors in the payload stay aligned
NONCE_BYTES = 32


class RefusedError(DistoptError):
    """What arrived is not to be believed. Internal: it ends in a counter.

    Attributes:
        reason: One of the few words that refusals are counted by.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Header(NamedTuple):
    """What a record says of itself."""

    kind: int
    session: int
    number: int
    payload_bytes: int


def read_header(header: bytes, max_payload_bytes: int) -> Header:
    """The fields of a record's first bytes, which nothing vouches for yet.

    Raises:
        RefusedError: "garbage" or "too long".
    """
    if len(header) != HEADER_BYTES:
        raise RefusedError("garbage")
    magic, kind, session, number, payload_bytes, _ = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise RefusedError("garbage")
    if payload_bytes > max_payload_bytes:
        raise RefusedError("too long")
    return Header(kind, session, number, payload_bytes)


def derive_key(secret: bytes, purpose: str, *parts: bytes) -> bytes:
    """A key for one purpose. The parts of a purpose have lengths of their own that never change."""
    return hmac.digest(secret, b"distopt " + purpose.encode() + b"\0" + b"".join(parts), "sha256")


def tag_of(key: bytes | None, start: bytes, payload: memoryview) -> bytes:
    """HMAC-SHA256 of both parts; zeros without a key."""
    if key is None:
        return bytes(_TAG_BYTES)
    mac = hmac.new(key, start, hashlib.sha256)
    mac.update(payload)
    return mac.digest()


def seal(key: bytes | None, header: Header, payload: memoryview) -> bytes:
    """The first bytes of the record that carries this payload."""
    fields = (_MAGIC, header.kind, header.session, header.number, header.payload_bytes)
    start = _HEADER.pack(*fields, b"")[:-_TAG_BYTES]
    return start + tag_of(key, start, payload)


def verify(key: bytes | None, header: bytes, payload: memoryview) -> None:
    """Nothing, if the record was sealed with this key.

    Raises:
        RefusedError: "unauthenticated".
    """
    expected = tag_of(key, header[:-_TAG_BYTES], payload)
    if not hmac.compare_digest(expected, header[-_TAG_BYTES:]):
        raise RefusedError("unauthenticated")


class Session:
    """One direction of a conversation: seals records one after the other at its one end, and opens them at the other.

    Args:
        key: Of this session and direction alone; None for records that nobody vouches for.
    """

    def __init__(self, key: bytes | None) -> None:
        self._key = key
        self.id = 0 if key is None else int.from_bytes(hmac.digest(key, b"id", "sha256")[:8], "little")
        self.number = 0  # of the last record

    def seal(self, kind: int, payload: memoryview) -> bytes:
        """The header of the next record."""
        self.number += 1
        return seal(self._key, Header(kind, self.id, self.number, payload.nbytes), payload)

    def open(self, header: bytes, payload: memoryview) -> None:
        """Accepts a record, if it is of this session and later than all before it.

        Raises:
            RefusedError: "unknown session", "unauthenticated" or "replayed".
        """
        said = _HEADER.unpack(header)
        if said[2] != self.id:
            raise RefusedError("unknown session")
        verify(self._key, header, payload)
        if said[3] <= self.number:
            raise RefusedError("replayed")
        self.number = said[3]

"""A transport whose frames are authenticated with the job secret, on any other transport (see `distopt.comm.session`).

Each direction between two ranks has a session of its own, which begins with three records:

1. The sender asks with a nonce of its own (ASK).
2. The receiver offers one of its own, drawn for this (OFFER, which repeats the sender's).
3. The sender confirms both, under the key that is made of them (CONFIRM). Then its frames follow.

The receiver keeps the session it has until a confirmed one replaces it, and a nonce is good for one session: so nobody
who lacks the secret can end or replay one, whatever he sends or sends again. A receiver that has lost its sessions,
because its process is a new one, says which it does not know (STALE), and its sender asks again.

What does not authenticate is dropped and counted, never handed on. TCP needs no such layer: its transport seals every
connection by itself (`distopt.comm.tcp`).

Limits: nothing is encrypted, and all who have the secret are trusted alike. A record is copied once, and hashed twice,
once at each end. Frames that were sent under a session that the receiver has lost are lost with it.
"""

import collections
import dataclasses
import logging
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from distopt.comm.frame import bytes_of, check_frame
from distopt.comm.secret import check_secret
from distopt.comm.session import (
    HEADER_BYTES,
    NONCE_BYTES,
    Header,
    RefusedError,
    Session,
    derive_key,
    read_header,
    seal,
    verify,
)
from distopt.comm.transport import ReturningTransport, Transport
from distopt.errors import ConfigError, DistoptError

_log = logging.getLogger("distopt")

_FRAME, _ASK, _OFFER, _CONFIRM, _STALE = range(1, 6)
_LONGEST = 2**62  # where the transport has no limit of its own
_POLL_S = 0.1
_ASK_AGAIN_S = 0.5  # the other end may not have been there
_TELL_AGAIN_S = 0.5  # a sender may not have heard that its session is not known


@dataclasses.dataclass
class _Peer:
    """What this end knows of another."""

    ask_key: bytes  # of what is said outside of sessions, by this end
    answer_key: bytes  # and by the other
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)  # of the next five
    outgoing: Session | None = None
    asked: bytes | None = None  # nonce of the session that this end wants
    asked_at: float = 0.0
    connection: int = 0  # of the transport below, when the outgoing session began
    waiting: "collections.deque[Tensor]" = dataclasses.field(default_factory=collections.deque)
    waiting_bytes: int = 0
    incoming: Session | None = None  # from here on for the thread alone
    offered: bytes | None = None  # nonce for the next session of the other
    told: int = 0  # session of which the other was told that it is not known
    told_at: float = 0.0


class Sealed:
    """One end of a transport, with every frame authenticated. See `distopt.comm.Transport`.

    Args:
        transport: Carries the records, which are `OVERHEAD_BYTES` longer than the frames. This end alone receives from
            it now, and closes it.
        secret: The job secret, the same on all ranks (`read_secret`, `agree_on_secret`).

    Raises:
        ConfigError: The secret is too short, or the transport's longest frame.
    """

    OVERHEAD_BYTES = HEADER_BYTES

    def __init__(self, transport: Transport, secret: bytes) -> None:
        self._secret = check_secret(secret)
        self._inner = transport
        longest = getattr(transport, "max_frame_bytes", _LONGEST)
        self.max_frame_bytes: int = longest - self.OVERHEAD_BYTES
        if self.max_frame_bytes < 2 * NONCE_BYTES:
            shortest = self.OVERHEAD_BYTES + 2 * NONCE_BYTES
            raise ConfigError(
                f"sealed frames need a transport with max_frame_bytes of at least {shortest}, got {longest}; add "
                "Sealed.OVERHEAD_BYTES to the longest frame"
            )
        self._number_of_connection: Callable[[int], int] = (
            transport.connections if isinstance(transport, ReturningTransport) else lambda rank: 1
        )
        self.rank = transport.rank
        self.size = transport.size
        self._peers = {rank: self._new_peer(rank) for rank in range(self.size) if rank != self.rank}
        self._inbox: queue.SimpleQueue[tuple[int, Tensor] | None] = queue.SimpleQueue()
        self._refused: Counter[str] = Counter()
        self._failure: BaseException | None = None
        self._closed = False
        self._ended = False
        self._asked_at = 0.0
        self._thread = threading.Thread(target=self._run, name="distopt-sealed", daemon=True)
        self._thread.start()

    # -- for any thread ----------------------------------------------------------------------------------------------

    @property
    def lost(self) -> frozenset[int]:
        """See `Transport.lost`."""
        return self._inner.lost

    @property
    def closed(self) -> bool:
        """See `Transport.closed`."""
        return self._closed

    @property
    def refused(self) -> Counter[str]:
        """How many records were dropped, by reason; a copy."""
        return Counter(self._refused)

    def connections(self, rank: int) -> int:
        """See `ReturningTransport.connections`."""
        return self._number_of_connection(rank)

    def send(self, destination: int, frame: Tensor) -> None:
        """See `Transport.send`. Hashes the frame, where there is a session; else that is done when there is one."""
        self._check()
        check_frame(frame, min_bytes=0, max_bytes=self.max_frame_bytes)
        if destination == self.rank:
            self._inbox.put((self.rank, frame))
            return
        if destination not in self._peers:
            raise ConfigError(f"destination must be a rank from 0 to {self.size - 1}, got {destination}")
        peer = self._peers[destination]
        with peer.lock:
            if self._closed or destination in self._inner.lost:
                return
            if peer.outgoing is not None and peer.connection == self._number_of_connection(destination):
                self._send_sealed(destination, peer.outgoing, _FRAME, frame)
                return
            peer.outgoing = None
            peer.waiting.append(frame)
            peer.waiting_bytes += frame.numel()
            if peer.asked is None:
                self._ask(destination, peer)

    def receive(self, timeout_s: float | None) -> tuple[int, Tensor] | None:
        """See `Transport.receive`; a frame has the length that was sent."""
        self._check()
        if self._closed:
            return None
        try:
            arrived = self._inbox.get(timeout=None if timeout_s is None else max(0.0, timeout_s))
        except queue.Empty:
            return None
        if arrived is None:
            self._inbox.put(None)  # the end is for every thread that waits, and for good
            self._check()
        return arrived

    def pending_bytes(self, destination: int) -> int:
        """See `Transport.pending_bytes`; what waits for a session counts."""
        peer = self._peers.get(destination)
        return 0 if peer is None else peer.waiting_bytes + self._inner.pending_bytes(destination)

    def probe(self, destination: int) -> None:
        """See `Transport.probe`."""
        self._check()
        self._inner.probe(destination)

    def close(self, timeout_s: float) -> None:
        """See `Transport.close`. Waits for the sessions that frames wait for; a closed peer begins none."""
        if self._closed:
            return
        self._closed = True
        begin = time.monotonic()
        end = begin + timeout_s
        while any(peer.waiting for peer in self._peers.values()) and self._thread.is_alive():
            if time.monotonic() >= begin + timeout_s / 2:  # the transport needs time for its own end
                break
            time.sleep(0.01)
        self._ended = True
        self._inner.close(max(0.0, end - time.monotonic()))
        self._thread.join()
        self._inbox.put(None)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _new_peer(self, rank: int) -> _Peer:
        return _Peer(
            ask_key=self._key("outside", self.rank, rank, b""), answer_key=self._key("outside", rank, self.rank, b"")
        )

    def _key(self, purpose: str, sender: int, receiver: int, nonces: bytes) -> bytes:
        ends = sender.to_bytes(4, "little") + receiver.to_bytes(4, "little")
        return derive_key(self._secret, f"sealed {purpose}", ends, nonces)

    # -- what is sent; with the peer's lock --------------------------------------------------------------------------

    def _ask(self, rank: int, peer: _Peer) -> None:
        if peer.asked is None:
            peer.asked = os.urandom(NONCE_BYTES)
        peer.asked_at = time.monotonic()
        self._say(rank, peer, _ASK, peer.asked)

    def _say(self, rank: int, peer: _Peer, kind: int, content: bytes) -> None:
        """Sends a record that belongs to no session."""
        header = seal(peer.ask_key, Header(kind, 0, 0, len(content)), memoryview(content))
        self._inner.send(rank, torch.frombuffer(bytearray(header + content), dtype=torch.uint8))

    def _send_sealed(self, rank: int, session: Session, kind: int, payload: Tensor) -> None:
        record = torch.empty(HEADER_BYTES + payload.numel(), dtype=torch.uint8)
        record[HEADER_BYTES:] = payload
        header = session.seal(kind, bytes_of(payload))
        record[:HEADER_BYTES] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        self._inner.send(rank, record)

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._ended:
                got = self._inner.receive(_POLL_S)
                if got is not None and got[0] in self._peers:
                    self._take(*got)
                del got  # belongs to whoever receives it
                self._ask_again()
        except BaseException as error:
            if isinstance(error, DistoptError):
                self._failure = error
            else:
                _log.exception("the sealed transport of rank %d has broken", self.rank)
                self._failure = DistoptError(f"the sealed transport of rank {self.rank} has broken: {error}")
            self._inbox.put(None)

    def _take(self, source: int, record: Tensor) -> None:
        try:
            self._open(source, record)
        except RefusedError as refusal:
            self._refused[refusal.reason] += 1
            _log.info("rank %d: a record from rank %d is refused: %s", self.rank, source, refusal.reason)

    def _open(self, source: int, record: Tensor) -> None:
        if record.dtype != torch.uint8 or record.dim() != 1 or record.numel() < HEADER_BYTES:
            raise RefusedError("garbage")
        header = record[:HEADER_BYTES].numpy().tobytes()
        said = read_header(header, record.numel() - HEADER_BYTES)
        payload = record[HEADER_BYTES : HEADER_BYTES + said.payload_bytes]
        content = bytes_of(payload)
        peer = self._peers[source]
        if said.kind == _FRAME:
            self._open_frame(source, peer, header, said, content)
            if not self._closed:
                self._inbox.put((source, payload))
        elif said.kind == _CONFIRM:
            self._begin(source, peer, header, content)
        else:
            self._hear(source, peer, header, said, content)

    def _open_frame(self, source: int, peer: _Peer, header: bytes, said: Header, content: memoryview) -> None:
        if peer.incoming is None or peer.incoming.id != said.session:
            now = time.monotonic()
            if peer.told != said.session or now - peer.told_at >= _TELL_AGAIN_S:
                peer.told, peer.told_at = said.session, now
                self._say(source, peer, _STALE, said.session.to_bytes(8, "little"))
            raise RefusedError("unknown session")
        peer.incoming.open(header, content)

    def _begin(self, source: int, peer: _Peer, header: bytes, content: memoryview) -> None:
        """Replaces the incoming session by one that its sender has confirmed."""
        nonces = bytes(content[: 2 * NONCE_BYTES])
        if len(content) != 2 * NONCE_BYTES:
            raise RefusedError("garbage")
        if peer.offered is None or nonces[NONCE_BYTES:] != peer.offered:
            raise RefusedError("replayed")
        session = Session(self._key("session", source, self.rank, nonces))
        session.open(header, content)
        peer.incoming, peer.offered = session, None

    def _hear(self, source: int, peer: _Peer, header: bytes, said: Header, content: memoryview) -> None:
        """What is said outside of sessions: it may be a copy, and changes nothing unless it answers this very end."""
        lengths = {_ASK: NONCE_BYTES, _OFFER: 2 * NONCE_BYTES, _STALE: 8}
        if lengths.get(said.kind) != len(content):
            raise RefusedError("garbage")
        verify(peer.answer_key, header, content)
        if said.kind == _ASK:
            if peer.offered is None:
                peer.offered = os.urandom(NONCE_BYTES)
            self._say(source, peer, _OFFER, bytes(content) + peer.offered)
            return
        with peer.lock:
            if said.kind == _OFFER:
                if peer.asked is None or content[:NONCE_BYTES] != peer.asked:
                    raise RefusedError("replayed")
                self._confirm(source, peer, bytes(content))
            elif peer.outgoing is None or peer.outgoing.id != int.from_bytes(content, "little"):
                raise RefusedError("replayed")
            else:
                peer.outgoing = None
                self._ask(source, peer)

    def _confirm(self, rank: int, peer: _Peer, nonces: bytes) -> None:
        peer.outgoing = Session(self._key("session", self.rank, rank, nonces))
        peer.connection = self._number_of_connection(rank)
        peer.asked = None
        self._send_sealed(rank, peer.outgoing, _CONFIRM, torch.frombuffer(bytearray(nonces), dtype=torch.uint8))
        while peer.waiting:
            self._send_sealed(rank, peer.outgoing, _FRAME, peer.waiting[0])
            peer.waiting_bytes -= peer.waiting.popleft().numel()  # not before: `close` looks whether anything waits

    def _ask_again(self) -> None:
        now = time.monotonic()
        if now - self._asked_at < _POLL_S:
            return
        self._asked_at = now
        for rank, peer in self._peers.items():
            if peer.asked is None or now - peer.asked_at < _ASK_AGAIN_S:
                continue
            with peer.lock:
                if rank in self._inner.lost:
                    peer.asked = None
                    peer.waiting.clear()
                    peer.waiting_bytes = 0
                elif peer.asked is not None:
                    self._ask(rank, peer)

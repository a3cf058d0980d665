"""A transport on torch.distributed's gloo backend, for ranks that torchrun (or any launcher) has started.

What works there with torch 2.13, as measured: one thread per peer that receives, and one that sends. Polling a receive
never sees it complete, a wait with a timeout closes the connection for good, and a pending send cannot be told from a
finished one. A receive from any source would need one thread for all peers, but when a peer dies in the middle of a
frame, that receive waits for the rest of it forever, and nobody else is heard any more; with a receive per peer only
that peer's is lost. A death may leave a send, too, waiting in the middle of a frame; what it always ends is a receive
that nothing has come for. So each pair has a second connection on which nothing is said before the end, and one thread
per peer waits there for its death.

Limits: gloo receives into a buffer of known size, so frames have a largest size, and every receive allocates it anew
(memory that is not written to is not used); CPU tensors only.
"""

import atexit
import queue
import threading
import time
from collections.abc import Collection, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.comm.abandon import leak_process_groups
from distopt.errors import CompatibilityError, ConfigError

_TAG = 7
_PROBE, _CLOSE = 0, 1  # first byte of a frame of the transport itself; messages begin with a letter
_HEAD_BYTES = 64
_POLL_S = 0.01
_LAST_S = 1.0  # for threads to end: one that comes back while Python shuts down would abort the process
_EXIT_S = 3.0  # and when the script ends
_FOREVER = timedelta(days=365)


class GlooTransport:
    """One end of a gloo group. See `distopt.comm.Transport`. Making one is a collective over `process_group`.

    Args:
        process_group: The ranks; the group is only asked who they are, messages take groups of their own.
        max_frame_bytes: Length of the longest frame that anybody sends.
        peers: Group ranks that this rank exchanges frames with; all others by default. The peers of a rank must have
            it among theirs.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        *,
        max_frame_bytes: int,
        peers: Collection[int] | None = None,
    ) -> None:
        members = dist.get_process_group_ranks(process_group or dist.group.WORLD)
        groups = [dist.new_group(members, backend="gloo", timeout=_FOREVER) for _ in range(2)]
        if not all(isinstance(group, dist.ProcessGroup) for group in groups):
            raise CompatibilityError("this process is not in the group; make the transport on the group's ranks only")
        group, self._quiet_group = groups
        self._group: dist.ProcessGroup = group
        self.rank = group.rank()
        self.size = group.size()
        self.max_frame_bytes = max_frame_bytes
        self._peers = sorted(set(range(self.size)) - {self.rank} if peers is None else set(peers) - {self.rank})
        self._inbox: queue.SimpleQueue[tuple[int, Tensor] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._lost: set[int] = set()
        self._silent: set[int] = set()  # peers that have closed their end
        self._pending = dict.fromkeys(self._peers, 0)
        self._outboxes: dict[int, queue.SimpleQueue[Tensor | None]] = {}
        self._senders: dict[int, threading.Thread] = {}
        self._closed = False
        self._receivers = [
            threading.Thread(target=self._receive_from, args=(peer,), name=f"distopt-receive-{peer}", daemon=True)
            for peer in self._peers
        ]
        self._watchers = {
            peer: threading.Thread(target=self._watch, args=(peer,), name=f"distopt-watch-{peer}", daemon=True)
            for peer in self._peers
        }
        for thread in (*self._receivers, *self._watchers.values()):
            thread.start()

    @property
    def lost(self) -> frozenset[int]:
        """Ranks whose connection is known to be gone."""
        return frozenset(self._lost)

    @property
    def closed(self) -> bool:
        """See `Transport.closed`."""
        return self._closed

    def send(self, destination: int, frame: Tensor) -> None:
        """See `Transport.send`."""
        if frame.numel() > self.max_frame_bytes:
            raise ConfigError(
                f"a frame may have {self.max_frame_bytes} bytes, got {frame.numel()}; give max_frame_bytes when the "
                "transport is made"
            )
        if destination == self.rank:  # gloo cannot send to itself
            self._inbox.put((self.rank, frame))
        elif destination in self._pending:
            self._post(destination, frame)
        else:
            raise ConfigError(f"destination must be one of the peers {self._peers}, got {destination}")

    def receive(self, timeout_s: float | None) -> tuple[int, Tensor] | None:
        """See `Transport.receive`; the frame may be longer than what was sent."""
        try:
            return self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def pending_bytes(self, destination: int) -> int:
        """See `Transport.pending_bytes`."""
        return self._pending.get(destination, 0)

    def probe(self, destination: int) -> None:
        """See `Transport.probe`."""
        if destination in self._pending and not self._pending[destination] and not self._closed:
            self._post(destination, _signal(_PROBE))

    def close(self, timeout_s: float) -> None:
        """See `Transport.close`. A thread that a frozen or lost peer keeps waiting is left behind with the groups."""
        if self._closed:
            return
        self._closed = True
        end = time.monotonic() + timeout_s
        for peer in self._peers:
            self._post(peer, _signal(_CLOSE))
            if peer in self._outboxes:  # a peer that was lost before anything was sent to it has none
                self._outboxes[peer].put(None)
        while not self._is_quiet() and time.monotonic() < end:
            time.sleep(_POLL_S)
        self._inbox.put(None)
        threads = (*self._receivers, *self._senders.values(), *self._watchers.values())
        _join(threads, _LAST_S)  # those that have nothing left to wait for end now, on a busy machine a little later
        if alive := [thread for thread in threads if thread.is_alive()]:
            leak_process_groups()  # destroying the groups would wait for these threads' operations
            atexit.register(_join, alive, _EXIT_S)  # which may end when the other ranks do
        else:
            dist.destroy_process_group(self._group)
            dist.destroy_process_group(self._quiet_group)

    def _is_quiet(self) -> bool:
        """Whether every peer has closed its end or is lost, and the others have taken everything."""
        return all(
            peer in self._lost
            or (peer in self._silent and not self._pending[peer] and not self._watchers[peer].is_alive())
            for peer in self._peers
        )

    def _post(self, destination: int, frame: Tensor) -> None:
        with self._lock:
            if destination in self._lost:
                return
            self._pending[destination] += frame.numel()
            if destination not in self._senders:
                outbox = self._outboxes[destination] = queue.SimpleQueue()
                name = f"distopt-send-{destination}"
                thread = threading.Thread(target=self._send_all, args=(destination, outbox), name=name, daemon=True)
                self._senders[destination] = thread
                thread.start()
        self._outboxes[destination].put(frame)

    def _send_all(self, destination: int, outbox: "queue.SimpleQueue[Tensor | None]") -> None:
        while (frame := outbox.get()) is not None:
            if destination not in self._lost:
                try:
                    if frame[0] == _CLOSE:  # first where a death is looked for: after this it is an end like any other
                        dist.send(frame, group=self._quiet_group, group_dst=destination, tag=_TAG)
                    dist.send(frame, group=self._group, group_dst=destination, tag=_TAG)
                except RuntimeError:  # gloo's way to say that the connection is gone
                    self._lose(destination)
            with self._lock:
                self._pending[destination] -= frame.numel()
            del frame  # large, and not needed while waiting for the next

    def _receive_from(self, peer: int) -> None:
        while peer not in self._lost:
            buffer = torch.empty(self.max_frame_bytes, dtype=torch.uint8)
            buffer[:_HEAD_BYTES] = 0  # memory used before could hold an old header
            try:
                dist.recv(buffer, group=self._group, group_src=peer, tag=_TAG)
            except RuntimeError:
                self._lose(peer)
                return
            if buffer[0] == _CLOSE:
                self._silent.add(peer)
                return
            if buffer[0] != _PROBE:
                self._inbox.put((peer, buffer))
            del buffer  # belongs to whoever receives it

    def _watch(self, peer: int) -> None:
        try:
            dist.recv(_signal(_PROBE), group=self._quiet_group, group_src=peer, tag=_TAG)
        except RuntimeError:
            self._lose(peer)

    def _lose(self, rank: int) -> None:
        with self._lock:
            self._lost.add(rank)


def _join(threads: Sequence[threading.Thread], timeout_s: float) -> None:
    """Waits for all of them, for so long altogether."""
    end = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))


def _signal(which: int) -> Tensor:
    return torch.tensor([which], dtype=torch.uint8)

"""A transport on mpi4py, for ranks that mpirun (or srun, or any MPI launcher) has started.

One thread makes all MPI calls. A frame is matched first (`Improbe`) and then received into fresh memory of its own
length, so no frame has to fit a buffer that waits for it, and a peer that freezes in the middle of a frame occupies
nothing that the frames of others need; receives posted ahead would be taken up one by one by such peers. Sends are
synchronous (`Issend`): one is complete when the other side has taken it, which is what `pending_bytes` promises.

The thread polls, and sleeps in between, up to two milliseconds when nothing happens. `Waitsome` would answer sooner but
occupies a core in every rank, does not see that this rank has something to send, and knows no deadline.

Lost peers. MPI says so itself where it was started for that: `mpirun --with-ft ulfm`. With `--enable-recovery` alone it
does not: through shared memory a send to a dead process waits for ever, so the kernel is asked too (see
`distopt.comm.neighbours`, and `distopt.comm.mpi_runtime` for how such a job ends). Over TCP it ends all ranks with the
first. Without either option mpirun ends the job.

Limits: frames shorter than 2 GiB. A rank that is stopped is not lost: at the end of the script `MPI_Finalize` waits for
it, as mpirun does.
"""

import atexit
import collections
import dataclasses
import logging
import queue
import threading
import time
import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from distopt.comm.frame import check_frame
from distopt.comm.mpi_runtime import Deaths, load_mpi
from distopt.config import check_count
from distopt.errors import ConfigError, DistoptError

_log = logging.getLogger("distopt")

_FRAME, _PROBE, _GOODBYE = 7, 8, 9  # one tag for all messages, whatever their round; the others carry nothing
_MAX_FRAME_BYTES = 2**31 - 1  # MPI counts in C ints
_SPIN_S = 5e-5  # for so long after something happened the thread does not sleep
_ATTENTIVE_S = 5e-4  # longest sleep while somebody waits for a frame
_IDLE_S = 2e-3  # and while nobody does
_BATCH = 64  # frames that are matched in one go
_WATCH_S = 0.05  # between two looks at the processes on this machine
_EXIT_S = 1.0  # what is queued when the script ends without `close` is given so long
_LINGER_S = 0.5  # what peers that have closed their ends have not taken so long after `close`, they never will

_open: "weakref.WeakSet[MPITransport]" = weakref.WeakSet()
_leaked: list[object] = []  # memory that MPI may still read or write, until the process ends


@dataclasses.dataclass
class _Transfer:
    """A frame on its way, in or out."""

    request: Any
    frame: Tensor
    tag: int


class MPITransport:
    """One end of an MPI communicator. See `distopt.comm.Transport`. Making one is a collective over `comm`.

    Args:
        comm: The ranks, an `mpi4py.MPI.Comm`; all of the job by default. Messages take a duplicate of it.
        max_frame_bytes: Length of the longest frame that anybody sends.
        peers: Ranks that this rank exchanges frames with; all others by default. The peers of a rank must have it
            among theirs.

    Raises:
        CompatibilityError: mpi4py is missing, or MPI was started without support for threads, or has ended.
        ConfigError: An argument breaks its rule.
    """

    def __init__(self, comm: Any = None, *, max_frame_bytes: int, peers: Collection[int] | None = None) -> None:
        check_count("max_frame_bytes", max_frame_bytes, low=1, remedy="give the length of the longest frame")
        if max_frame_bytes > _MAX_FRAME_BYTES:
            raise ConfigError(
                f"max_frame_bytes must be at most {_MAX_FRAME_BYTES}, got {max_frame_bytes}; send several frames"
            )
        self._mpi = load_mpi()
        comm = self._mpi.COMM_WORLD if comm is None else comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.max_frame_bytes = max_frame_bytes
        others = set(range(self.size)) - {self.rank}
        self._peers = frozenset(others if peers is None else set(peers) - {self.rank})
        if unknown := sorted(self._peers - others):
            raise ConfigError(f"peers must be ranks from 0 to {self.size - 1}, got {unknown}; leave them out")
        self._comm = comm.Dup()
        self._comm.Set_errhandler(self._mpi.ERRORS_RETURN)
        self._deaths = Deaths(self._mpi, self._comm)

        self._inbox: queue.SimpleQueue[tuple[int, Tensor] | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[tuple[int, Tensor, int]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of the next four
        self._lost: frozenset[int] = frozenset()
        self._unsent_bytes = dict.fromkeys(self._peers, 0)
        self._unsent_frames = dict.fromkeys(self._peers, 0)
        self._receivers = 0  # threads that wait in `receive`
        self._silent: set[int] = set()  # peers that have closed their end
        self._outgoing: dict[int, collections.deque[_Transfer]] = {r: collections.deque() for r in others}
        self._incoming: dict[int, collections.deque[_Transfer]] = {r: collections.deque() for r in others}
        self._failure: BaseException | None = None
        self._closed = False
        self._end_at: float | None = None
        self._linger_until = 0.0
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="distopt-mpi", daemon=True)
        self._thread.start()
        _open.add(self)

    # -- for any thread ----------------------------------------------------------------------------------------------

    @property
    def lost(self) -> frozenset[int]:
        """Ranks whose connection is known to be gone."""
        return self._lost

    @property
    def closed(self) -> bool:
        """See `Transport.closed`."""
        return self._closed

    def send(self, destination: int, frame: Tensor) -> None:
        """See `Transport.send`. A frame to a peer that has closed its end is dropped, and any after `close`."""
        self._check()
        if destination != self.rank and destination not in self._peers:
            raise ConfigError(f"destination must be one of the peers {sorted(self._peers)}, got {destination}")
        check_frame(frame, min_bytes=1, max_bytes=self.max_frame_bytes)
        if self._closed:
            return
        if destination == self.rank:
            self._inbox.put((self.rank, frame))
        else:
            self._post(destination, frame, _FRAME)

    def receive(self, timeout_s: float | None) -> tuple[int, Tensor] | None:
        """See `Transport.receive`; a frame has the length that was sent."""
        self._check()
        if self._closed:
            return None
        with self._lock:
            self._receivers += 1
        self._wake.set()  # sleeps are short while somebody waits
        try:
            arrived = self._inbox.get(timeout=None if timeout_s is None else max(0.0, timeout_s))
        except queue.Empty:
            return None
        finally:
            with self._lock:
                self._receivers -= 1
        if arrived is None:
            self._inbox.put(None)  # the end is for every thread that waits, and for good
            self._check()
        return arrived

    def pending_bytes(self, destination: int) -> int:
        """See `Transport.pending_bytes`."""
        return self._unsent_bytes.get(destination, 0)

    def probe(self, destination: int) -> None:
        """See `Transport.probe`."""
        self._check()
        if not self._unsent_frames.get(destination, 1) and not self._closed:
            self._post(destination, _nothing(), _PROBE)

    def close(self, timeout_s: float) -> None:
        """See `Transport.close`. Waits until the peers have closed their ends too, or are lost.

        Frames that arrive meanwhile are dropped. What a frozen peer has not taken after `timeout_s` stays with MPI.
        """
        if self._closed:
            return
        self._closed = True
        for peer in self._peers:
            self._post(peer, _nothing(), _GOODBYE)
        self._linger_until = time.monotonic() + _LINGER_S
        self._end_at = time.monotonic() + timeout_s
        self._wake.set()
        self._thread.join()
        self._inbox.put(None)
        _open.discard(self)

    def _check(self) -> None:
        if self._failure is not None:
            raise DistoptError(f"the MPI transport of rank {self.rank} has broken: {self._failure}") from self._failure

    def _post(self, destination: int, frame: Tensor, tag: int) -> None:
        with self._lock:
            if destination in self._lost or (destination in self._silent and tag != _GOODBYE):
                return
            self._unsent_bytes[destination] += frame.numel()
            self._unsent_frames[destination] += 1
        self._outbox.put((destination, frame, tag))
        self._wake.set()

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._carry()
        except BaseException as error:
            self._failure = error
            _log.exception("the MPI transport of rank %d has broken", self.rank)
            self._inbox.put(None)
        finally:
            for transfers in (*self._outgoing.values(), *self._incoming.values()):
                _leaked.extend(transfers)

    def _carry(self) -> None:
        now = time.monotonic()
        active_at, look_at = now, now
        while not self._is_done(now):
            self._wake.clear()
            moved = self._start_sends() + self._finish_sends() + self._match() + self._finish_receives()
            now = time.monotonic()
            if now >= look_at:
                self._lose(self._deaths.ended())
                look_at = now + _WATCH_S
            if moved:
                active_at = now
            elif now - active_at < _SPIN_S:
                time.sleep(0)  # lets another rank on this core go on
            else:
                longest = _ATTENTIVE_S if self._receivers else _IDLE_S
                self._wake.wait(min(longest, (now - active_at) / 8))

    def _is_done(self, now: float) -> bool:
        if self._end_at is None:
            return False
        left = self._peers - self._lost
        if now >= self._end_at or not left:
            return True
        if not left <= self._silent:
            return False
        return now >= self._linger_until or not any(self._unsent_frames[r] for r in left)

    def _start_sends(self) -> int:
        started = 0
        while True:
            try:
                destination, frame, tag = self._outbox.get_nowait()
            except queue.Empty:
                return started
            started += 1
            if destination in self._lost:
                continue
            try:
                request = self._comm.Issend(frame.numpy(), destination, tag)
            except self._mpi.Exception as error:
                self._blame(destination, error)
            else:
                self._outgoing[destination].append(_Transfer(request, frame, tag))

    def _finish_sends(self) -> int:
        finished = 0
        for destination, transfers in self._outgoing.items():
            while transfers and self._is_complete(destination, transfers[0]):
                transfer = transfers.popleft()
                finished += 1
                with self._lock:
                    self._unsent_bytes[destination] -= transfer.frame.numel()
                    self._unsent_frames[destination] -= 1
        return finished

    def _match(self) -> int:
        """Starts to receive what has come in."""
        matched = 0
        status = self._mpi.Status()
        for _ in range(_BATCH):  # no flood of frames keeps this rank from sending
            try:
                message = self._comm.Improbe(self._mpi.ANY_SOURCE, self._mpi.ANY_TAG, status)
            except self._mpi.Exception as error:
                failed = self._deaths.acknowledge()
                if not failed:
                    raise DistoptError(f"cannot look for messages: {error}") from error
                self._lose(failed)
                return matched
            if message is None:
                break
            matched += 1
            source = status.Get_source()
            frame = torch.empty(status.Get_count(self._mpi.BYTE), dtype=torch.uint8)
            try:
                request = message.Irecv(frame.numpy())
            except self._mpi.Exception as error:  # its sender has died since
                self._blame(source, error)
            else:
                self._incoming[source].append(_Transfer(request, frame, status.Get_tag()))
        return matched

    def _finish_receives(self) -> int:
        finished = 0
        for source, transfers in self._incoming.items():
            while transfers and self._is_complete(source, transfers[0]):  # one after the other: that is their order
                transfer = transfers.popleft()
                finished += 1
                if transfer.tag == _GOODBYE:
                    self._silent.add(source)
                elif transfer.tag == _FRAME and not self._closed:
                    self._inbox.put((source, transfer.frame))
        return finished

    def _is_complete(self, peer: int, transfer: _Transfer) -> bool:
        try:
            return bool(transfer.request.Test())
        except self._mpi.Exception as error:
            self._blame(peer, error)
            return False

    def _blame(self, peer: int, error: BaseException) -> None:
        _log.info("rank %d: rank %d is lost: %s", self.rank, peer, error)
        self._deaths.acknowledge()
        self._lose({peer})
        self._leak(self._incoming[peer])

    def _lose(self, ranks: Collection[int]) -> None:
        for rank in self._peers.intersection(ranks) - self._lost:
            with self._lock:
                self._lost |= {rank}
                self._unsent_bytes[rank] = self._unsent_frames[rank] = 0
            self._leak(self._outgoing[rank])

    def _leak(self, transfers: "collections.deque[_Transfer]") -> None:
        """Forgets transfers that will never complete. Their memory stays: MPI could still come back to it."""
        _leaked.extend(transfers)
        transfers.clear()


def _nothing() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)


@atexit.register
def _close_all() -> None:
    """A thread that still calls MPI when Python shuts MPI down would crash the process."""
    for transport in list(_open):
        transport.close(_EXIT_S)

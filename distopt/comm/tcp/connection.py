"""One TCP connection after its handshake: sealed records in both directions, with a thread that writes.

What waits to be written, and what was read and not yet taken, can be bounded: who does not read is cut off when too
much waits for him, and who is not read from any more has to wait, as TCP has it.
"""

import collections
import contextlib
import fcntl
import socket
import struct
import termios
import threading

import torch
from torch import Tensor

from distopt.comm.frame import bytes_of
from distopt.comm.session import HEADER_BYTES, RefusedError, Session, read_header
from distopt.comm.tcp.handshake import Deadline, read_exactly

FRAME, PROBE, WELCOME, REPLACED = range(1, 5)
_NOTHING = torch.empty(0, dtype=torch.uint8)
FRAME_COST_BYTES = 1024  # what the frame itself takes in Python, counted so that empty frames are bounded too


class Connection:
    """A connected socket with a peer whose rank is known.

    Args:
        stream: The socket; closed by `close`.
        outgoing: Seals what is sent.
        incoming: Opens what arrives.
        max_frame_bytes: A record that announces more is refused before any of it is read.
        max_pending_bytes: More than that never waits to be written, but for a single frame; None: any number.
    """

    def __init__(
        self,
        stream: socket.socket,
        outgoing: Session,
        incoming: Session,
        *,
        max_frame_bytes: int,
        max_pending_bytes: int | None,
    ) -> None:
        self.is_broken = False
        self._stream = stream
        self._outgoing = outgoing
        self._incoming = incoming
        self._max_frame_bytes = max_frame_bytes
        self._max_pending_bytes = max_pending_bytes
        self._changed = threading.Condition()  # of the next three
        self._queue: collections.deque[tuple[int, Tensor]] = collections.deque()
        self._queued_bytes = 0  # with what is being written
        self._finishing = False
        stream.settimeout(None)
        self._writer = threading.Thread(target=self._write_all, name="distopt-tcp-write", daemon=True)
        self._writer.start()

    def send(self, kind: int, frame: Tensor = _NOTHING) -> bool:
        """Queues a record. False if too much waits already: then the connection is cut."""
        with self._changed:
            if self._finishing or self.is_broken:
                return True
            waiting_bytes = self._queued_bytes + len(self._queue) * FRAME_COST_BYTES
            limit = self._max_pending_bytes
            fits = limit is None or not waiting_bytes or waiting_bytes + frame.numel() <= limit
            if fits:
                self._queue.append((kind, frame))
                self._queued_bytes += frame.numel()
                self._changed.notify_all()
        if not fits:
            self.cut()
        return fits

    def pending_bytes(self) -> int:
        """Bytes that are queued, or that the machine of the other end has not acknowledged."""
        with self._changed:
            queued = self._queued_bytes
        with contextlib.suppress(OSError, ValueError):  # it has been closed
            answer = fcntl.ioctl(self._stream.fileno(), termios.TIOCOUTQ, bytes(4))
            queued += int(struct.unpack("i", answer)[0])
        return queued

    def read(self, deadline: Deadline | None = None) -> tuple[int, Tensor] | None:
        """The next record, its kind and its payload; None when the other end has ended in good order.

        Raises:
            RefusedError: It is not to be believed; nothing behind it is either.
            OSError: The connection broke.
        """
        header = bytearray(HEADER_BYTES)
        got = read_exactly(self._stream, memoryview(header), deadline)
        if got < HEADER_BYTES:
            _check_end(got)
            return None
        said = read_header(bytes(header), self._max_frame_bytes)
        payload = torch.empty(said.payload_bytes, dtype=torch.uint8)
        content = bytes_of(payload)
        got = read_exactly(self._stream, content, deadline)
        if got < said.payload_bytes:
            _check_end(got + HEADER_BYTES)
            return None
        if deadline is not None:
            self._stream.settimeout(None)
        before = self._incoming.number
        self._incoming.open(bytes(header), content)
        if self._incoming.number != before + 1:
            raise RefusedError("missing")  # somebody has taken records out of the stream
        return said.kind, payload

    def finish(self, kind: int | None = None) -> None:
        """Lets go what is queued, then ends this direction; what comes from the other end can still be read.

        Args:
            kind: A last record, which takes the place of all that is queued.
        """
        with self._changed:
            if kind is not None:
                self._queued_bytes -= sum(frame.numel() for _, frame in self._queue)
                self._queue.clear()
                self._queue.append((kind, _NOTHING))
            self._finishing = True
            self._changed.notify_all()

    def cut(self) -> None:
        """Ends both directions at once, and wakes who reads or writes."""
        with self._changed:
            self.is_broken = True
            self._queue.clear()
            self._queued_bytes = 0
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            self._stream.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Cuts, and gives the socket back. For the thread that reads."""
        self.cut()
        self._writer.join()
        self._stream.close()

    def forget_after_fork(self) -> None:
        """Closes a child's copy of the socket, without a word to the other end."""
        self._stream.close()

    def _write_all(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._queue or self._finishing or self.is_broken)
                    if self.is_broken or not self._queue:
                        break
                    kind, frame = self._queue.popleft()
                self._write(kind, bytes_of(frame))
                with self._changed:
                    self._queued_bytes = max(0, self._queued_bytes - frame.numel())  # 0 once it was cut
                del frame  # large, and not needed while waiting for the next
            with contextlib.suppress(OSError):
                self._stream.shutdown(socket.SHUT_WR)
        except OSError:
            self.cut()
        except BaseException:
            self.cut()
            raise

    def _write(self, kind: int, payload: memoryview) -> None:
        header = self._outgoing.seal(kind, payload)
        sent = self._stream.sendmsg([header, payload])
        if sent < HEADER_BYTES:
            self._stream.sendall(header[sent:])
        self._stream.sendall(payload[max(0, sent - HEADER_BYTES) :])


def _check_end(num_bytes: int) -> None:
    if num_bytes:
        raise ConnectionResetError("it ended in the middle of a record")

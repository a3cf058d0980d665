"""A transport between threads of one process: the roles of a job without ranks, for tests and trials."""

import queue

from torch import Tensor

from distopt.errors import ConfigError


class InProcess:
    """One end of a set of queues; `connect` makes all ends. See `distopt.comm.Transport`."""

    def __init__(self, rank: int, inboxes: "list[queue.Queue[tuple[int, Tensor] | None]]", lost: set[int]) -> None:
        self.rank = rank
        self.size = len(inboxes)
        self._inboxes = inboxes
        self._lost = lost  # one set for all ends
        self._closed = False

    @classmethod
    def connect(cls, size: int) -> "list[InProcess]":
        """The ends of a transport between `size` ranks, in rank order."""
        inboxes: list[queue.Queue[tuple[int, Tensor] | None]] = [queue.Queue() for _ in range(size)]
        lost: set[int] = set()
        return [cls(rank, inboxes, lost) for rank in range(size)]

    @property
    def lost(self) -> frozenset[int]:
        """Ranks that `die` was called on."""
        return frozenset(self._lost)

    @property
    def closed(self) -> bool:
        """See `Transport.closed`."""
        return self._closed

    def send(self, destination: int, frame: Tensor) -> None:
        """See `Transport.send`."""
        if not 0 <= destination < self.size:
            raise ConfigError(f"destination must be a rank from 0 to {self.size - 1}, got {destination}")
        if destination not in self._lost and self.rank not in self._lost:
            self._inboxes[destination].put((self.rank, frame))

    def receive(self, timeout_s: float | None) -> tuple[int, Tensor] | None:
        """See `Transport.receive`."""
        if self._closed:
            return None
        try:
            return self._inboxes[self.rank].get(timeout=timeout_s)
        except queue.Empty:
            return None

    def pending_bytes(self, destination: int) -> int:
        """Always 0: what is sent is there."""
        return 0

    def probe(self, destination: int) -> None:
        """Nothing to find out: `lost` is always up to date."""

    def die(self) -> None:
        """Plays the death of this end: what it sends from now on vanishes, and the others see it as lost."""
        self._lost.add(self.rank)

    def close(self, timeout_s: float = 0.0) -> None:
        """See `Transport.close`; wakes a `receive` that waits."""
        self._closed = True
        self._inboxes[self.rank].put(None)

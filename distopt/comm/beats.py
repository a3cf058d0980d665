"""What ranks tell each other about who is alive: a table of heartbeat counters, and the datagram that carries it.

Every rank counts up its own entry and sends its whole table to a few others, which keep the larger of each pair of
entries: so a counter travels through ranks that never talk to its owner, and all that has to be watched is whether it
still moves (the gossip-style failure detection of van Renesse, Minsky and Hayden, Middleware 1998). Two values above
all counts say how a rank ended; they travel the same way.

Pure: no socket and no clock. A datagram that does not fit is refused as a whole, whatever its bytes are.

Limits: at most 16,000 ranks, which is what a datagram holds.
"""

import dataclasses
import struct
from collections.abc import Sequence

LOST = 2**32 - 1  # a verdict: the rank is silent or has failed; nothing takes it back
LEFT = 2**32 - 2  # the rank has said goodbye
NONCE_BYTES = 16
MAX_RANKS = 16_000

_HEAD = struct.Struct(f"!4s{NONCE_BYTES}sII")  # magic and version, nonce of the job, sender, number of ranks
_MAGIC = b"dsb1"


@dataclasses.dataclass(frozen=True)
class Datagram:
    """The table of a rank: `counters[r]` is the highest count it knows of rank r, or how r ended."""

    sender: int
    counters: tuple[int, ...]


def encode(datagram: Datagram, nonce: bytes) -> bytes:
    """The bytes of a datagram: 28, and 4 for each rank."""
    head = _HEAD.pack(_MAGIC, nonce, datagram.sender, len(datagram.counters))
    return head + struct.pack(f"!{len(datagram.counters)}I", *datagram.counters)


def decode(data: bytes, nonce: bytes, num_ranks: int) -> Datagram | None:
    """The datagram in `data`, or None if it is not one of this job. Never raises."""
    if len(data) != _HEAD.size + 4 * num_ranks:
        return None
    magic, theirs, sender, count = _HEAD.unpack_from(data)
    if magic != _MAGIC or theirs != nonce or sender >= num_ranks or count != num_ranks:
        return None
    return Datagram(sender, struct.unpack_from(f"!{num_ranks}I", data, _HEAD.size))


class Table:
    """What one rank knows of all.

    Args:
        rank: Whose table it is.
        num_ranks: How many there are.
        now: Seconds on a clock of the caller's choice; later calls use the same.

    Attributes:
        accuser: The rank that has given up the owner of this table, or None.
    """

    def __init__(self, rank: int, num_ranks: int, now: float) -> None:
        self.rank = rank
        self.accuser: int | None = None
        self._counters = [0] * num_ranks
        self._moved_at = [now] * num_ranks
        self._told_by: dict[int, int] = {}

    def datagram(self) -> Datagram:
        """What to send."""
        return Datagram(self.rank, tuple(self._counters))

    def beat(self) -> None:
        """Counts up the own entry, unless it says how this rank ended."""
        if self._counters[self.rank] < LEFT - 1:
            self._counters[self.rank] += 1

    def end(self, *, failed: bool) -> None:
        """The own entry becomes final: a goodbye, or the word that this rank cannot go on."""
        self._counters[self.rank] = max(self._counters[self.rank], LOST if failed else LEFT)

    def merge(self, heard: Datagram, now: float) -> None:
        """Keeps the larger of each pair of entries. The own entry is nobody else's to say."""
        for rank, (known, count) in enumerate(zip(self._counters, heard.counters, strict=True)):
            if rank == self.rank:
                if count == LOST and known < LEFT and self.accuser is None:
                    self.accuser = heard.sender
            elif count > known:
                self._counters[rank] = count
                self._moved_at[rank] = now
                if count == LOST:
                    self._told_by[rank] = heard.sender

    def declare_lost(self, ranks: Sequence[int]) -> None:
        """A verdict of the owner; the next datagrams spread it."""
        for rank in ranks:
            self._counters[rank] = LOST

    def is_complete(self) -> bool:
        """Whether every other rank has been heard of."""
        return not self.unheard()

    def unheard(self) -> list[int]:
        """The other ranks that have never been heard of."""
        return [rank for rank, count in enumerate(self._counters) if count == 0 and rank != self.rank]

    def silent_s(self, rank: int, now: float) -> float:
        """How long the entry of another rank has not moved."""
        return now - self._moved_at[rank]

    def silent(self, now: float, seconds: float) -> list[int]:
        """The ranks whose entries have not moved for longer than that; never the own, nor those that have ended."""
        return [
            rank
            for rank, count in enumerate(self._counters)
            if rank != self.rank and count < LEFT and self.silent_s(rank, now) > seconds
        ]

    def lost(self) -> list[int]:
        """The ranks with a verdict, the owner aside."""
        return [rank for rank, count in enumerate(self._counters) if count == LOST and rank != self.rank]

    def left(self) -> list[int]:
        """The other ranks that have said goodbye."""
        return [rank for rank, count in enumerate(self._counters) if count == LEFT and rank != self.rank]

    def told_by(self, rank: int) -> int | None:
        """Who told of the loss of this rank: the rank itself, another, or None for the owner's own verdict."""
        return self._told_by.get(rank)

"""Which ranks on this machine have ended: the kernel knows at once, where a transport may never say so.

MPI without fault tolerance sends through shared memory to a process that is dead as if it were there. Each rank says
which process it is, and the others hold a file descriptor of that process (`pidfd_open`), which becomes readable when
it ends; a process number that is used again confuses nobody.

Limits: Linux; only processes that share this one's kernel and process namespace are seen, the others count as alive.
"""

import contextlib
import os
import select
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Self

_CARD = struct.Struct("<36sQQ")  # boot id of the machine, process namespace, process number
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = "/proc/self/ns/pid"


class Neighbours:
    """Processes that are watched until they end.

    Args:
        cards: What the ranks said of themselves with `own_card`, by rank; those on other machines are left out here.
    """

    CARD_BYTES = _CARD.size

    def __init__(self, cards: Mapping[int, bytes]) -> None:
        self._poll = select.poll()
        self._watched: dict[int, int] = {}  # descriptor -> rank
        self._ended: set[int] = set()
        machine, namespace, _ = _CARD.unpack(self.own_card())
        for rank, card in cards.items():
            its_machine, its_namespace, process = _CARD.unpack(card)
            if machine.strip(b"\0") and (its_machine, its_namespace) == (machine, namespace):
                self._watch(rank, process)

    @staticmethod
    def own_card() -> bytes:
        """`CARD_BYTES` bytes by which processes on the same machine know this one; zeros where that is not possible."""
        try:
            return _CARD.pack(_BOOT_ID.read_bytes().strip(), os.stat(_NAMESPACE).st_ino, os.getpid())
        except OSError:
            return bytes(_CARD.size)

    def _watch(self, rank: int, process: int) -> None:
        try:
            descriptor = os.pidfd_open(process)
        except ProcessLookupError:
            self._ended.add(rank)
        except OSError:  # an old kernel, or it is forbidden here
            return
        else:
            self._watched[descriptor] = rank
            self._poll.register(descriptor, select.POLLIN)

    def ended(self) -> frozenset[int]:
        """Ranks whose process is known to have ended; never waits."""
        for descriptor, _ in self._poll.poll(0):
            self._ended.add(self._watched[descriptor])
            self._release(descriptor)
        return frozenset(self._ended)

    def close(self) -> None:
        """Stops watching."""
        for descriptor in list(self._watched):
            self._release(descriptor)

    def _release(self, descriptor: int) -> None:
        self._poll.unregister(descriptor)
        del self._watched[descriptor]
        with contextlib.suppress(OSError):
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

"""Who is known to a rank, shared by its main thread, its board and the thread that leads meetings."""

import threading
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

Address = tuple[str, int]


class Roster:
    """See the module. All methods may be called by any thread.

    Args:
        number: Of this rank; -1 for one that gets a number with its first crew.
        address: Of its board.
        job: What tells this job from others whose boards had the same address.
        facts: What all members must agree in.

    Attributes:
        called: Set while a meeting is called that this rank has not come to.
    """

    def __init__(self, number: int, address: Address, job: str, facts: Mapping[str, Any] | None) -> None:
        self.number, self.address, self.job, self.facts = number, address, job, facts
        self.called = threading.Event()
        self._lock = threading.Lock()
        self._known: dict[int, Address] = {number: address}
        self._left: set[int] = set()
        self._members: tuple[int, ...] = (number,) if number >= 0 else ()
        self._lead: int | None = None

    @property
    def known(self) -> dict[int, Address]:
        """Where the boards are of all that have not said goodbye; a copy."""
        with self._lock:
            return dict(self._known)

    @property
    def left(self) -> set[int]:
        """Who has said goodbye; a copy."""
        with self._lock:
            return set(self._left)

    @property
    def members(self) -> tuple[int, ...]:
        """Of the crew."""
        with self._lock:
            return self._members

    @property
    def lead(self) -> int | None:
        """At whose board the crew has met; None before the first."""
        with self._lock:
            return self._lead

    def learn(self, known: Mapping[Any, Any] = MappingProxyType({}), left: Iterable[int] = ()) -> None:
        """Adds what others know."""
        with self._lock:
            self._left.update(int(number) for number in left)
            self._left.discard(self.number)
            for number, (host, port) in known.items():
                if int(number) != self.number:
                    self._known[int(number)] = (str(host), int(port))
            for number in self._left:
                self._known.pop(number, None)

    def expect(self, members: tuple[int, ...]) -> None:
        """These are to be the first crew."""
        with self._lock:
            self._members = members

    def settle(self, number: int, lead: int, members: tuple[int, ...]) -> None:
        """This rank has this number now, and is in this crew."""
        with self._lock:
            self._known.pop(self.number, None)
            self.number = number
            self._known[number] = self.address
            self._lead, self._members = lead, members

    def told(self) -> dict[str, Any]:
        """As JSON can hold it."""
        with self._lock:
            return {
                "number": self.number,
                "address": self.address,
                "job": self.job,
                "members": self._members,
                "known": {str(number): address for number, address in self._known.items() if number >= 0},
                "left": sorted(self._left),
            }

"""Who takes part: the ranks that exchange with each other now, and how they agree on others.

The ranks of a crew share a gloo group of their own. When one of them finds a connection broken, or somebody new comes,
all leave the group, which breaks the connections of the rest, and meet at the board of the lowest rank that answers.
Its process collects who has come, for as long as somebody is missing whom nobody has seen die, at most `grace_s`, and
announces the next crew. Who is late is left out and comes to the one after.

A crew whose lead is not the lowest rank that anybody knows looks for lower ones now and then: so the parts of a network
that was cut find each other again.
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, ProcessGroupGloo  # type: ignore[attr-defined]

from distopt.comm import parse_address
from distopt.errors import DesyncError, PeerLostError
from distopt.gossip.ranks.board import Board, GoneError, UnreachableError

_log = logging.getLogger("distopt")
_POLL_S = 0.05
_LOOK_S = 1.0  # between two looks for meetings elsewhere
_MEET_S = 15.0  # for a group's connections

Address = tuple[str, int]


@dataclass
class Crew:
    """Those that exchange.

    Attributes:
        lead: At whose board they have met.
        members: Their numbers, ascending.
        group: Their gloo group, in this order; None once this rank has left, which breaks its connections.
        round: Number of its first exchange.
        new: Those that have no model yet and take the average.
        left: Who has said goodbye.
    """

    lead: int
    members: tuple[int, ...]
    group: Any
    round: int
    new: tuple[int, ...] = ()
    left: tuple[int, ...] = ()


@dataclass
class _Window:
    """A meeting, as the process that leads it sees it."""

    began: float = 0.0
    posts: dict[int, Any] = field(default_factory=dict)
    taken: int = 0
    gone: set[int] = field(default_factory=set)


class Assembly:
    """This rank's way into a crew, and into the next ones.

    Args:
        number: Of this rank.
        interface: The address of this machine that the others reach.
        facts: What all members must agree in, for those that come later.
        patience_s: How long an exchange may wait for a member that is connected and says nothing.
        grace_s: How long a meeting waits for those who are missing.
    """

    def __init__(
        self, number: int, interface: str, *, facts: Mapping[str, Any] | None, patience_s: float, grace_s: float
    ) -> None:
        self.number = number
        self._interface = interface
        self._patience_s, self._grace_s = patience_s, grace_s
        self._board = Board.host(interface)
        self.address: Address = (interface, self._board.port)
        self._known: dict[int, Address] = {number: self.address}
        self._members: tuple[int, ...] = (number,)
        self._lead = number
        self._window = -1  # in which the crew met
        self._gone: set[int] = set()
        self._called = threading.Event()
        self._closing = threading.Event()
        self._board.write("window", 0)
        self._board.write("facts", facts)
        self._thread = threading.Thread(target=self._watch, name="distopt-gossip-meetings", daemon=True)
        self._lock = threading.Lock()  # of who is known and gone

    @classmethod
    def to_join(
        cls, address: str, interface: str, *, facts: Mapping[str, Any] | None, patience_s: float, grace_s: float
    ) -> tuple["Assembly", dict[int, Address]]:
        """One of a process that comes later, with a new number, and where the others are.

        Args:
            address: "host:port" of any of them.
            interface: See the class.
            facts: See the class.
            patience_s: See the class.
            grace_s: See the class.

        Raises:
            PeerLostError: Nobody answers there.
            DesyncError: The others run something else.
        """
        host, port = parse_address(address)
        try:
            board = Board.connect(host, port)
            theirs, known = board.read("facts"), board.read("known")
            number = board.count("joined") + max(map(int, known))
        except (GoneError, UnreachableError) as error:
            raise PeerLostError(
                f"there must be a rank of the job at {address}, got no answer; take the address that a running rank's "
                "attachment.address says"
            ) from error
        for key, value in (facts or {}).items():
            if theirs[key] != json.loads(json.dumps(value)):
                raise DesyncError(
                    f"who joins must have the same {key} as the others, got {value!r} and {theirs[key]!r}; start "
                    "it from the same code and settings"
                )
        assembly = cls(number, interface, facts=facts, patience_s=patience_s, grace_s=grace_s)
        return assembly, {int(each): (str(place[0]), int(place[1])) for each, place in known.items()}

    def start(self, addresses: Mapping[int, Address]) -> None:
        """Learns where the others' boards are, and begins to lead meetings at its own."""
        with self._lock:
            self._known.update(addresses)
            self._members = tuple(sorted(self._known))
        self._publish()
        self._thread.start()

    def _publish(self) -> None:
        """Who is known, for those that come later; they get numbers behind all of these."""
        with self._lock:
            known = {str(number): address for number, address in self._known.items()}
        self._board.write("known", known)

    @property
    def called(self) -> bool:
        """Whether a meeting is called: leave the crew and `meet`."""
        return self._called.is_set()

    def meet(self, round_: int, *, new: bool = False, dead: Sequence[int] = (), leaving: bool = False) -> Crew:
        """The next crew. Blocks until it is there.

        Args:
            round_: The number of the next exchange of this rank.
            new: Whether this rank has no model yet.
            dead: Whom it has seen die.
            leaving: Tells the others not to wait; the crew that comes of it is without this rank.

        Raises:
            PeerLostError: No meeting came about.
        """
        with self._lock:
            self._gone.update(dead)
        end = time.monotonic() + self._patience_s + 4 * self._grace_s
        while time.monotonic() < end:
            lead, board = self._lowest()
            try:
                told = self._attend(lead, board, round_, new)
            except UnreachableError:
                continue  # the lead has gone meanwhile, or is stopped
            if told is None:
                continue  # too late for this one
            with contextlib.suppress(RuntimeError):
                return self._found(lead, board, told)
        raise PeerLostError(
            f"rank {self.number} has found no crew for {self._patience_s + 4 * self._grace_s:.0f} s: the others change "
            "faster than they can meet; use a longer grace_s",
            sorted(self._gone),
        )

    def _lowest(self) -> tuple[int, Board]:
        for number in sorted(self._known):
            if number == self.number:
                return number, Board.connect(*self.address)
            if number in self._gone:
                continue
            try:
                return number, Board.connect(*self._known[number])
            except GoneError:
                with self._lock:
                    self._gone.add(number)
            except UnreachableError:
                continue
        raise AssertionError  # this rank's own is there

    def _attend(self, lead: int, board: Board, round_: int, new: bool) -> Any:
        window = int(board.read("window"))
        place = board.count(f"{window}/count") - 1
        post = {
            "number": self.number, "address": self.address, "round": round_, "new": new, "gone": sorted(self._gone),
            "known": {str(number): address for number, address in self._known.items()},
        }  # fmt: skip
        board.write(f"{window}/{place}", post)
        told = board.read(f"{window}/crew", self._grace_s + 10.0)
        return {**told, "window": window} if self.number in told["members"] else None

    def _found(self, lead: int, board: Board, told: Any) -> Crew:
        members = tuple(told["members"])
        epoch = f"{lead}/{told['window']}"
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=_MEET_S)
        options._devices = [ProcessGroupGloo.create_device(hostname=self._interface)]
        place = PrefixStore(f"gloo/{epoch}", board.store)
        board.store.set_timeout(timedelta(seconds=_MEET_S))
        self._called.clear()
        group = ProcessGroupGloo(place, members.index(self.number), len(members), options)
        group._set_default_timeout(timedelta(seconds=self._patience_s))
        with self._lock:
            self._lead, self._members = lead, members
            self._known.update({int(number): tuple(address) for number, address in told["known"].items()})
            self._gone |= set(told["gone"])
            self._gone -= set(members)
            self._window = int(told["window"])
        self._publish()
        return Crew(lead, members, group, int(told["round"]), tuple(told["new"]), tuple(told["left"]))

    # -- the thread that leads meetings at this rank's board ---------------------------------------------------------

    def _watch(self) -> None:
        board = self._own_board()
        number, window, looked = 0, _Window(), time.monotonic()
        lead: tuple[int, Board] | None = None
        while not self._closing.wait(_POLL_S):
            while board.has(f"{number}/{window.taken}"):
                post = board.read(f"{number}/{window.taken}")
                window.taken += 1
                window.posts[int(post["number"])] = post
                if not window.began:
                    window.began = time.monotonic()
                self._called.set()
            if window.began and self._complete(window):
                board.write("window", number + 1)
                self._announce(board, number, window)
                number, window = number + 1, _Window()
            elif time.monotonic() - looked > _LOOK_S:
                looked = time.monotonic()
                self._look_for_lower()
                lead = self._listen_to_lead(lead)

    def _own_board(self) -> Board:
        """Another connection to it: one that waits keeps all that share it waiting."""
        while True:
            try:
                return Board.connect(*self.address)
            except UnreachableError:
                self._closing.wait(_POLL_S)

    def _complete(self, window: _Window) -> bool:
        for post in window.posts.values():
            window.gone |= set(post["gone"])
        with self._lock:
            missing = {number: self._known[number] for number in set(self._members) - set(window.posts) - window.gone}
        waited = time.monotonic() - window.began
        for number, address in missing.items():
            with contextlib.suppress(UnreachableError):
                window.gone |= _gone(number, address)
        missing = {number: address for number, address in missing.items() if number not in window.gone}
        if missing and waited < self._grace_s:
            return False
        # A moment for those that nobody expects: the other part of a network, or somebody new.
        return waited > 2 * _POLL_S

    def _announce(self, board: Board, number: int, window: _Window) -> None:
        posts = window.posts
        known: dict[str, Any] = {}
        for post in posts.values():
            known.update(post["known"])
        known.update({str(each): post["address"] for each, post in posts.items()})
        gone = window.gone - set(posts)
        board.write(
            f"{number}/crew",
            {
                "members": sorted(posts),
                "round": max(post["round"] for post in posts.values()),
                "new": sorted(each for each, post in posts.items() if post["new"]),
                "known": known,
                "gone": sorted(gone),
                "left": [each for each in sorted(gone) if board.has(f"left/{each}")],
            },
        )

    def _look_for_lower(self) -> None:
        with self._lock:
            lower = [number for number in sorted(self._known) if number < self._lead and number not in self._gone]
        for number in lower:
            try:
                Board.connect(*self._known[number])
            except GoneError:
                with self._lock:
                    self._gone.add(number)
            except UnreachableError:
                continue
            else:
                self._called.set()
                return

    def _listen_to_lead(self, before: tuple[int, Board] | None) -> tuple[int, Board] | None:
        """Hears whether another meeting has begun where the crew has met: somebody is on his way back, or new."""
        with self._lock:
            lead, next_window = self._lead, self._window + 1
            address = self._known[lead]
        if lead == self.number:
            return None
        try:
            board = before[1] if before is not None and before[0] == lead else Board.connect(*address)
        except (GoneError, UnreachableError):
            return None  # who exchanges with it will notice
        if board.has(f"{next_window}/0"):
            self._called.set()
        return lead, board

    def close(self) -> None:
        """Ends the thread."""
        if self._closing.is_set():
            return
        with contextlib.suppress(GoneError, UnreachableError, RuntimeError):
            Board.connect(*self._known[self._lead]).write(f"left/{self.number}", True)
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        del self._board  # and with it the store: nobody is to wait for a meeting here


def _gone(number: int, address: Address) -> set[int]:
    """The number, if nobody listens at that address any more."""
    try:
        Board.connect(*address)
    except GoneError:
        return {number}
    return set()

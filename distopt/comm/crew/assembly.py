"""Who takes part: the ranks that exchange with each other now, and how they agree on others.

The ranks of a crew share a gloo group of their own. When one of them finds a connection broken, or somebody new comes,
all leave the group, which breaks the connections of the rest, and meet at the board of the lowest rank that answers
(`distopt.comm.crew.meetings`).

A crew whose lead is not the lowest rank that anybody knows looks for lower ones now and then: so the parts of a network
that was cut find each other again.
"""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distopt.comm import parse_address, read_secret
from distopt.comm.crew.board import Board, GoneError, UnreachableError, ask, ask_all
from distopt.comm.crew.group import BoardStore, form_group
from distopt.comm.crew.meetings import Meetings, say_goodbye
from distopt.comm.crew.roster import Address, Roster
from distopt.comm.secret import SECRET
from distopt.errors import DesyncError, PeerLostError

_ASKED_AT_ONCE = 4  # of the lowest ranks, when a lead is looked for
_GREETINGS = 3  # of a rank that must be there, before it counts as out of reach
_AGAIN_S = 0.1


class VoidError(Exception):
    """The crew is no more."""


@dataclass
class Crew:
    """Those that exchange.

    Attributes:
        lead: At whose board they have met.
        window: The number of that meeting there.
        members: Their numbers, ascending.
        place: Of this rank among them, and in the group.
        group: Their gloo group, in this order; None once this rank has left, which breaks its connections.
        round: Number of its first exchange.
        behind: How many exchanges this rank has not made that others of its last crew have.
        new: Those that have no model yet and take the average.
        left: Who has said goodbye.
        states: What each has said of itself, by number; see `Assembly.meet`.
        asked: How often the members have asked each other for something.
    """

    lead: int
    window: int
    members: tuple[int, ...]
    place: int
    group: Any
    round: int
    behind: int = 0
    new: tuple[int, ...] = ()
    left: tuple[int, ...] = ()
    states: dict[int, Any] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)

    @property
    def identity(self) -> list[int]:
        """What tells it from the other crews of a job, as JSON can hold it."""
        return [self.lead, self.window]

    def leave(self) -> None:
        """Breaks the connections, when nothing works on them any more; the others notice when they next use theirs."""
        self.group = None  # neither its `abort` nor its `shutdown` closes them


class Assembly:
    """This rank's way into a crew, and into the next ones.

    Args:
        number: Of this rank; -1 for one that comes later and gets its number with its first crew.
        interface: The address of this machine that the others reach.
        facts: What all members must agree in, for those that come later.
        patience_s: How long an exchange may wait for a member that is connected and says nothing.
        grace_s: How long a meeting waits for those that do not answer.
        job: What tells the job from others.

    Raises:
        ConfigError: The interface is no address of this machine, or the job secret is none.
    """

    def __init__(
        self,
        number: int,
        interface: str,
        *,
        facts: Mapping[str, Any] | None,
        patience_s: float,
        grace_s: float,
        job: str,
    ) -> None:
        self._interface = interface
        self._patience_s, self._grace_s = patience_s, grace_s
        self._secret = read_secret()
        self._meetings: Meetings | None = None
        self._board = Board(interface, self._secret, lambda question, line: self._answer(question, line))
        self._roster = Roster(number, (self._board.address.host, self._board.address.port), job, facts)
        self._meetings = Meetings(self._roster, self._secret, patience_s=patience_s, grace_s=grace_s)
        self._before: list[int] | None = None  # lead and meeting of the last crew
        self._closed = False

    def _answer(self, question: Any, line: Any) -> Any:
        return None if self._meetings is None else self._meetings.answer(question, line)

    @classmethod
    def to_join(
        cls, address: str, interface: str, *, facts: Mapping[str, Any] | None, patience_s: float, grace_s: float
    ) -> "Assembly":
        """One of a process that comes later.

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
        try:
            said = ask(parse_address(address), {"kind": "hello"}, read_secret())
        except (GoneError, UnreachableError) as error:
            raise PeerLostError(
                f"there must be a rank of the job at {address}, got no answer; take the address that a running rank's "
                "attachment.address says, and the job's DISTOPT_JOB_SECRET if it has one"
            ) from error
        for key, value in (facts or {}).items():
            if said["facts"][key] != json.loads(json.dumps(value)):
                raise DesyncError(
                    f"who joins must have the same {key} as the others, got {value!r} and {said['facts'][key]!r}; "
                    "start it from the same code and settings"
                )
        assembly = cls(-1, interface, facts=facts, patience_s=patience_s, grace_s=grace_s, job=said["job"])
        assembly.learn({**said["known"], said["number"]: said["address"]}, said["left"])
        return assembly

    @property
    def number(self) -> int:
        """Of this rank."""
        return self._roster.number

    @property
    def address(self) -> Address:
        """Of this rank's board."""
        return self._roster.address

    @property
    def patience_s(self) -> float:
        """How long an exchange may wait for a member that is connected and says nothing."""
        return self._patience_s

    @property
    def called(self) -> bool:
        """Whether a meeting is called: leave the crew and `meet`."""
        return self._roster.called.is_set()

    def await_call(self, timeout_s: float) -> bool:
        """Waits for a meeting to be called; whether one is."""
        return self._roster.called.wait(timeout_s)

    def wake(self) -> None:
        """Ends `await_call`."""
        self._roster.called.set()

    def learn(self, addresses: Mapping[Any, Any], left: Sequence[int] = ()) -> None:
        """Where the others' boards are."""
        self._roster.learn(addresses, left)

    def begin(self, addresses: Mapping[int, Address]) -> None:
        """All of these are there, and the first crew is to be of them."""
        self._roster.learn(addresses)
        self._roster.expect(tuple(sorted(addresses)))

    def greet(self) -> None:
        """Asks the lowest rank and the next one, so that each rank is asked: a rank out of reach would go on alone.

        Raises:
            PeerLostError: One of them does not answer, or is of another job.
        """
        known = self._roster.known
        numbers = sorted(known)
        following = numbers[(numbers.index(self.number) + 1) % len(numbers)]
        for number in sorted({numbers[0], following} - {self.number}):
            if not self._hears(known[number]):
                host, port = known[number]
                raise PeerLostError(
                    f"rank {self.number} must reach rank {number} at {host}:{port}, got no answer; let attach there "
                    "have interface= the address of its machine that the others reach, and all ranks the same "
                    f"{SECRET}, or none",
                    [number],
                )

    def _hears(self, place: Address) -> bool:
        for _ in range(_GREETINGS):
            try:
                said = ask(place, self._question("hello"), self._secret)
            except GoneError:
                return False
            except UnreachableError:
                continue
            return isinstance(said, dict) and said.get("job") == self._roster.job
        return False

    def meet(self, round_: int, *, new: bool = False, silent: Sequence[int] = (), state: Any = None) -> Crew:
        """The next crew. Blocks until it is there.

        Args:
            round_: The number of the next exchange of this rank.
            new: Whether this rank has no model yet.
            silent: For whom it has waited in vain.
            state: Anything that JSON can hold, for `Crew.states`.

        Raises:
            PeerLostError: No meeting came about.
        """
        end = time.monotonic() + self._patience_s + 4 * self._grace_s
        while time.monotonic() < end:
            lead, place = self._lowest()
            post = {
                **self._question("post"),
                **self._roster.told(),
                "round": round_,
                "new": new,
                "silent": [*silent],
                "from": self._before,
                "state": state,
            }
            try:
                told = ask(place, post, self._secret, within_s=None)
            except (GoneError, UnreachableError):
                continue  # the lead has gone meanwhile, or is stopped
            if "members" in told:
                with contextlib.suppress(RuntimeError, VoidError, GoneError, UnreachableError):
                    return self._found(lead, place, told)
            time.sleep(_AGAIN_S)
        raise PeerLostError(
            f"rank {self.number} has found no crew for {self._patience_s + 4 * self._grace_s:.0f} s: the others change "
            "faster than they can meet, or only some of them can be reached from here; use a longer grace",
        )

    def _lowest(self) -> tuple[int, Address]:
        """The lowest rank whose board answers, and where that is; this rank's own always does."""
        assert self._meetings is not None
        known = self._roster.known
        own = self._roster.number
        lower = sorted(number for number in known if number >= 0 and (number < own or own < 0))
        for start in range(0, len(lower), _ASKED_AT_ONCE):
            some = lower[start : start + _ASKED_AT_ONCE]
            said = ask_all({number: known[number] for number in some}, self._question("hello"), self._secret)
            for number in some:
                if isinstance(said[number], dict) and said[number]["job"] == self._roster.job:
                    self._meetings.send_elsewhere()
                    return number, known[number]
        return own, self._roster.address

    def _found(self, lead: int, place: Address, told: Any) -> Crew:
        members, number = tuple(told["members"]), int(told["you"])
        self._roster.learn(told["known"], told["left"])
        self._roster.called.clear()  # the lead of a later meeting calls again, as long as this rank is missing
        store = BoardStore(lambda question: self._ask_of(place, question), int(told["window"]))
        group = form_group(store, members.index(number), len(members), self._interface)
        self._roster.settle(number, lead, members)
        before = self._before
        same = [round_ for came_from, round_ in told["rounds"].values() if came_from == before]
        return Crew(
            lead=lead,
            window=int(told["window"]),
            members=members,
            place=members.index(number),
            group=group,
            round=max(round_ for _, round_ in told["rounds"].values()),
            behind=max(same) - int(told["rounds"][str(number)][1]) if before is not None else 0,
            new=tuple(told["new"]),
            left=tuple(told["left"]),
            states={int(number): state for number, state in told["states"].items()},
        )

    def settle(self, crew: Crew) -> None:
        """This rank has done what its next crew asks for: in later meetings, that is where it comes from."""
        self._before = crew.identity

    def largest(self, crew: Crew, what: str, value: float) -> float:
        """The largest of the members' values. All of them ask at the same time, and block until all have.

        Raises:
            VoidError: The crew is no more.
            UnreachableError: Its lead is not.
        """
        place = self._roster.known.get(crew.lead)
        if place is None:
            raise UnreachableError
        store = BoardStore(lambda question: self._ask_of(place, question), crew.window, self._patience_s)
        count = crew.asked[what] = crew.asked.get(what, 0) + 1
        prefix = f"{what}/{count}"
        # Who asks for this has heard all the values before these: nobody waits any more for those before them.
        store.lay_down({f"{prefix}/{self.number}": value}, forget=f"{what}/{count - 2}/{self.number}")
        try:
            return max(map(float, store.await_all([f"{prefix}/{number}" for number in crew.members])))
        except VoidError:
            crew.asked[what] = count - 1  # it is asked for again: of others who come late, say
            raise

    def _ask_of(self, place: Address, question: Mapping[str, Any]) -> Any:
        said = ask(place, {**self._question(""), **question}, self._secret, within_s=None)
        if said is False or (isinstance(said, dict) and "void" in said):
            raise VoidError
        return said

    def _question(self, kind: str) -> dict[str, Any]:
        return {"kind": kind, "job": self._roster.job}

    def close(self, *, farewell: bool = True) -> None:
        """Ends the threads.

        Args:
            farewell: Whether this rank leaves on purpose; if not, the others count it as lost.
        """
        if self._closed:
            return
        self._closed = True
        if farewell:
            say_goodbye(self._roster, self._secret)
        self._board.close()
        assert self._meetings is not None
        self._meetings.close()

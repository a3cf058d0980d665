"""Exchanges among the ranks that are there: who is lost is left out, who comes is taken in.

A meeting that is called while this rank exchanges nothing is attended by a thread, so that nobody waits for ranks that
compute; what changes with the crew is then done before the next exchange.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.comm.crew.assembly import Assembly, Crew, VoidError
from distopt.comm.crew.board import UnreachableError
from distopt.comm.crew.interruption import BrokenError, SilentError
from distopt.errors import PeerLostError

_log = logging.getLogger("distopt")
_POLL_S = 0.02
_CALL_S = 0.5  # a thread looks so often whether it is to end


@dataclass
class Changes:
    """What has happened to the crew.

    Attributes:
        lost: Ranks that were members and are not now, without having said goodbye.
        joined: Ranks that have come since the start and had never been members.
        meetings: How often the crew has met anew.
        waiting_s: Seconds spent in exchanges and meetings.
    """

    lost: set[int] = field(default_factory=set)
    joined: set[int] = field(default_factory=set)
    meetings: int = 0
    waiting_s: float = 0.0


class Exchange:
    """See the module. Meets at once.

    Args:
        assembly: This rank's.
        changed: Called after each meeting but the first of ranks that all have models, with the new crew, before
            anything is exchanged in it; in the thread that exchanges.
        is_new: Whether this rank has no model yet; `changed` gives it one.
        state: See the attribute.

    Attributes:
        round: Number of the next exchange.
        state: What the others hear of this rank when they meet, as JSON can hold it; see `Crew.states`.
        changes: Since the start.

    Raises:
        PeerLostError: Nobody is there, or the others change faster than they can meet.
    """

    def __init__(
        self,
        assembly: Assembly,
        changed: Callable[[Crew], None],
        *,
        is_new: bool,
        state: Any = None,
    ) -> None:
        self._assembly, self._changed, self._is_new = assembly, changed, is_new
        self._turn = threading.RLock()  # of whoever exchanges or meets
        self._closing = threading.Event()
        self.changes = Changes()
        self.state = state
        crew = assembly.meet(0, new=is_new, state=state)
        self._crew: Crew | None = crew
        self._is_fresh = bool(crew.new)  # whether `changed` is still to be called
        self._members, self.round = crew.members, crew.round
        if not self._is_fresh:
            assembly.settle(crew)
        self._seen = set(crew.members)
        self._thread = threading.Thread(target=self._attend, name="distopt-crew-attendance", daemon=True)

    def begin(self) -> None:
        """Gives newcomers of the first crew their models. After the construction, as `changed` may need this object.

        Raises:
            PeerLostError: Nobody is there who has a model.
        """
        self._get_ready()
        self._thread.start()

    @property
    def members(self) -> tuple[int, ...]:
        """Who took part in the last exchange, or will in the next."""
        return self._members

    def go_to(self, round_: int) -> None:
        """The next exchange has this number, for all members alike: that of a checkpoint."""
        with self._turn:
            self.round = round_
            if self._crew is not None:
                self._crew.round = round_  # which may be later: nothing of this crew is to be left out

    def perform(self, act: Callable[[Crew, int], None]) -> None:
        """One exchange: `act` with the crew and the round's number.

        It is called again, with those that are left, if it raises `BrokenError` or `SilentError`.

        Where some had made it before that and this rank had not, it is left out here: a rank that made it up would be
        an exchange behind the others for ever, and wait for them at the end.
        """
        began = time.monotonic()
        try:
            with self._turn:
                while (silent := self._perform_once(act, self._get_ready())) is not None:
                    self._find_crew(silent)
        finally:
            self.changes.waiting_s += time.monotonic() - began

    def _perform_once(self, act: Callable[[Crew, int], None], crew: Crew) -> list[int] | None:
        """None if it is done; else somebody has gone: for whom this rank has waited in vain.

        It returns before the crew is left: connections last for as long as anything that works on them.
        """
        if self.round < crew.round:  # others have made it without this rank: all stay in step
            self.round += 1
            return None
        try:
            act(crew, self.round)
        except BrokenError as error:
            seen = [crew.members[each] for each in error.places]
            _log.info("ranks: rank %d: connections to ranks %s broke", self._assembly.number, seen)
            return []
        except SilentError as error:
            _log.info("ranks: rank %d has waited in vain for rank %d", self._assembly.number, crew.members[error.place])
            return [crew.members[error.place]]
        self.round += 1
        return None

    def _get_ready(self) -> Crew:
        """The crew to exchange in, with all done that its changes ask for.

        Raises:
            PeerLostError: The others change faster than they can meet, or those that are left cannot go on; or this
                rank has left.
        """
        while True:
            if self._closing.is_set():
                raise PeerLostError("a rank must be attached to exchange, and this one has left; attach it again")
            if self._crew is None or self._assembly.called:
                self._find_crew()
            crew = self._crew
            assert crew is not None
            if self._is_fresh:
                if len(crew.new) == len(crew.members):
                    raise PeerLostError("there must be ranks that have a model, got none: all have gone; join others")
                kept, self.round = self.round, crew.round - crew.behind
                silent = self._have_changed(crew)
                if silent is not None:
                    self.round = kept
                    self._find_crew(silent)
                    continue
                self._is_fresh = self._is_new = False
                self._assembly.settle(crew)
            return crew

    def _have_changed(self, crew: Crew) -> list[int] | None:
        """None if all is done; else somebody has gone again, or is stopped; see `_perform_once`."""
        try:
            self._changed(crew)
        except BrokenError:
            return []
        except SilentError as error:
            return [crew.members[error.place]]
        return None

    def _find_crew(self, silent: Sequence[int] = ()) -> None:
        """Leaves the crew, which makes the others leave it, and finds the next."""
        self._leave()
        crew = self._assembly.meet(self.round, new=self._is_new, silent=silent, state=self.state)
        self._crew, self._is_fresh = crew, True
        self._note(crew)

    def _attend(self) -> None:
        """Goes to the meetings that are called while nothing is exchanged here."""
        while not self._closing.is_set():
            if not self._assembly.await_call(_CALL_S):
                continue
            with self._turn:
                if not self._assembly.called or self._closing.is_set():
                    continue
                try:
                    self._find_crew()
                except PeerLostError:  # the next exchange tries again, and says it
                    self._leave()
                    self._closing.wait(_CALL_S)

    def _note(self, crew: Crew) -> None:
        before, now = set(self._members), set(crew.members)
        changes = self.changes
        lost = before - now - set(crew.left)
        back = (now - before) & self._seen
        joined = now - self._seen
        left = before - now - lost
        self._members = crew.members
        self._seen |= now
        changes.meetings += 1
        changes.lost = (changes.lost | lost) - now - set(crew.left)
        changes.joined |= joined
        said = [
            f"{what}: {', '.join(map(str, sorted(ranks)))}"
            for what, ranks in (("lost", lost), ("left", left), ("joined", joined), ("back", back))
            if ranks
        ]
        if said:
            log = _log.warning if lost else _log.info
            log("training goes on with ranks %s; %s", ", ".join(map(str, crew.members)), "; ".join(said))

    def in_crew(self, act: Callable[[Crew], None]) -> None:
        """Does something with all members, which is no exchange. All of them call it, between two exchanges.

        Raises:
            PeerLostError: Somebody has gone meanwhile.
        """
        with self._turn:
            if self._have_done(act, self._get_ready()):
                return
            self._leave()
        raise PeerLostError("a rank has gone while the ranks did something together; try again")

    @staticmethod
    def _have_done(act: Callable[[Crew], None], crew: Crew) -> bool:
        try:
            act(crew)
        except (BrokenError, SilentError):
            return False
        return True

    @property
    def is_changing(self) -> Crew | None:
        """The crew that has met since the last exchange, before this rank has done what that asks for."""
        crew = self._crew
        return crew if crew is not None and self._is_fresh else None

    def average_of_old(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """After a meeting with newcomers: the average of the others' rows. All members call it.

        Raises:
            BrokenError: Somebody has gone meanwhile.
        """
        crew = self._crew
        assert crew is not None
        old = len(crew.members) - len(crew.new)
        averages = []
        for row in rows:
            total = torch.zeros_like(row, device="cpu") if self._is_new else row.detach().cpu().clone()
            self._add_up(crew, total)
            averages.append((total / old).to(row.device))
        return averages

    def _add_up(self, crew: Crew, tensor: Tensor) -> None:
        options = dist.AllreduceOptions()
        options.timeout = timedelta(seconds=self._assembly.patience_s)
        try:
            crew.group.allreduce([tensor], options).wait()
        except RuntimeError as error:
            raise BrokenError(range(len(crew.members))) from error

    def add_up(self, tensor: Tensor) -> int:
        """Sums a CPU tensor over the members, in place. All of them call it, between two exchanges.

        Returns:
            Over how many.

        Raises:
            PeerLostError: Somebody has gone meanwhile.
        """
        with self._turn:
            crew = self._get_ready()
            try:
                self._add_up(crew, tensor)
            except BrokenError as error:
                self._leave()
                raise PeerLostError("a rank has gone while numbers were added up; try again") from error
            return len(crew.members)

    def largest(self, what: str, value: Callable[[], float], is_busy: Callable[[], bool]) -> float:
        """The largest of the members' values. All members ask, at the same time, for the same.

        Not in the group, where an exchange may be under way: at the lead's board. If that is gone, it is this rank's.

        Args:
            what: Is asked for.
            value: Of this rank.
            is_busy: Whether this rank has an exchange under way, in another thread.
        """
        while True:
            if not is_busy():
                with self._turn:
                    self._get_ready()
            crew = self._crew
            if crew is not None:
                try:
                    return self._assembly.largest(crew, what, value())
                except VoidError:
                    pass
                except UnreachableError:  # who is lost has taken along what was under way
                    return value()
            time.sleep(_POLL_S)  # the exchange that is under way finds the next crew

    def close(self, *, farewell: bool = True) -> None:
        """Leaves for good; see `Assembly.close`."""
        self._closing.set()
        self._assembly.wake()
        with self._turn:
            self._leave()
        if self._thread.is_alive():
            self._thread.join()
        self._assembly.close(farewell=farewell)

    def _leave(self) -> None:
        crew, self._crew = self._crew, None
        if crew is not None:
            crew.leave()

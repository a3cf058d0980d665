"""Exchanges among the ranks that are there: who is lost is left out, who comes is taken in."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.errors import PeerLostError
from distopt.gossip.mixing.mixer import Mixer
from distopt.gossip.ranks.crew import Assembly, Crew
from distopt.gossip.ranks.rank_mixer import BrokenError, RankMixer, SilentError, Staging
from distopt.gossip.topology import Topology

_log = logging.getLogger("distopt")


@dataclass
class Changes:
    """What has happened to the crew.

    Attributes:
        lost: Ranks that were members and are not now.
        joined: Ranks that have come since the start.
        meetings: How often the crew has met anew.
        waiting_s: Seconds spent in exchanges and meetings.
        bytes_sent: By this rank, in exchanges.
    """

    lost: set[int] = field(default_factory=set)
    joined: set[int] = field(default_factory=set)
    meetings: int = 0
    waiting_s: float = 0.0
    bytes_sent: int = 0


class Exchange:
    """See the module.

    Args:
        assembly: This rank's.
        crew: The first one.
        topology: Of the members.
        changed: Called after each meeting with the new crew, before anything is exchanged in it.

    Attributes:
        round: Number of the next exchange.
        changes: Since the start.
    """

    def __init__(self, assembly: Assembly, crew: Crew, topology: Topology, changed: Callable[[Crew], None]) -> None:
        self._assembly, self._topology, self._changed = assembly, topology, changed
        self._staging = Staging()
        self._crew: Crew | None = crew
        self._members = crew.members
        self.round = crew.round
        self.changes = Changes()

    @property
    def members(self) -> tuple[int, ...]:
        """Who took part in the last exchange, or will in the next."""
        return self._members

    def perform(self, act: Callable[[Mixer], None]) -> None:
        """One exchange: `act` with the round's mixer, again with those that are left if somebody goes meanwhile."""
        began = time.monotonic()
        try:
            while not self._perform_once(act):
                pass
        finally:
            self.changes.waiting_s += time.monotonic() - began

    def _perform_once(self, act: Callable[[Mixer], None]) -> bool:
        if self._crew is None or self._assembly.called:
            self.meet()
        crew = self._crew
        assert crew is not None
        assert crew.group is not None
        place = crew.members.index(self._assembly.number)
        mixer = RankMixer(
            crew.group, place, self._topology.graph(len(crew.members), self.round), self.round, self._staging
        )
        try:
            act(mixer)
        except BrokenError as error:
            seen = [crew.members[each] for each in error.places]
            _log.info("rank %d: connections to ranks %s broke", self._assembly.number, seen)
            self._leave()
            return False
        except SilentError as error:
            rank = crew.members[error.place]
            raise PeerLostError(
                f"rank {rank} is connected and has said nothing for as long as it may; give a larger peer_timeout if "
                "ranks pause for that long",
                [rank],
            ) from None
        finally:
            self.changes.bytes_sent += mixer.bytes_sent
        self.round += 1
        return True

    def meet(self, *, new: bool = False) -> None:
        """Leaves the crew, which makes the others leave it, and finds the next."""
        self._leave()
        self._crew = self._assembly.meet(self.round, new=new)
        before, self._members = set(self._members), self._crew.members
        self.round = self._crew.round
        self.changes.meetings += 1
        lost = before - set(self._members) - set(self._crew.left)
        joined = set(self._members) - before
        self.changes.lost = (self.changes.lost | lost) - set(self._members)
        self.changes.joined |= joined
        if lost or joined:
            _log.warning(
                "gossip goes on with ranks %s%s%s", ", ".join(map(str, self._members)),
                f"; lost: {', '.join(map(str, sorted(lost)))}" if lost else "",
                f"; joined: {', '.join(map(str, sorted(joined)))}" if joined else "",
            )  # fmt: skip
        try:
            self._changed(self._crew)
        except BrokenError:  # somebody has gone again
            self._leave()

    def average_of_old(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """After a meeting with newcomers: the average of the others' rows, float64 sums. All members call it."""
        crew = self._crew
        assert crew is not None
        assert crew.group is not None
        is_new = self._assembly.number in crew.new
        old = len(crew.members) - len(crew.new)
        averages = []
        for row in rows:
            total = torch.zeros_like(row, device="cpu") if is_new else row.detach().cpu().clone()
            self._add_up(crew, total)
            averages.append((total / old).to(row.device))
        return averages

    @staticmethod
    def _add_up(crew: Crew, tensor: Tensor) -> None:
        try:
            crew.group.allreduce([tensor], dist.AllreduceOptions()).wait()
        except RuntimeError as error:
            raise BrokenError(range(len(crew.members))) from error

    def add_up(self, tensor: Tensor) -> None:
        """Sums a CPU tensor over the members, in place. All of them call it, between two exchanges.

        Raises:
            PeerLostError: Somebody has gone meanwhile.
        """
        if self._crew is None:
            self.meet()
        assert self._crew is not None
        try:
            self._add_up(self._crew, tensor)
        except BrokenError as error:
            self._leave()
            raise PeerLostError("a rank has gone while numbers were added up; try again") from error

    def close(self) -> None:
        """Leaves for good."""
        self._leave()
        self._assembly.close()

    def _leave(self) -> None:
        if self._crew is not None:
            self._crew.group = None
            self._crew = None

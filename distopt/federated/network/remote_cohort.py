"""The clients of other processes, as the server sees them: broadcasts go out, replies come in until the round ends.

When a round ends is the algorithm's pacing, on a real clock: when all that were asked have answered, when an interval
is over, or when enough have answered. Who is lost, or has not answered by the deadline, does not take part, and what he
says later is refused as late. A reply counts if it was asked for: of that client, at that site, for that version, once.

A synchronous round's replies do not depend on who is faster, so its result is the simulation's to the bit.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from distopt.comm import Transport
from distopt.errors import CompatibilityError, DecodeError, PeerLostError
from distopt.federated.algorithm import FederatedAlgorithm
from distopt.federated.cohort import Answers
from distopt.federated.exchange import HERE, Exchange
from distopt.federated.messages import Broadcast, Reply
from distopt.federated.network import letters
from distopt.federated.network.letters import SERVER, Answer, End, Failed, Hello, Letter, Ready, Saving, Task
from distopt.federated.network.packing import unpack
from distopt.federated.network.roster import OTHER_SESSION, Roster
from distopt.federated.pacing import AfterArrivals, EveryInterval, Synchronous
from distopt.federated.participation import ParticipationProcess
from distopt.federated.randomness import stream, stream_key
from distopt.federated.uplink import UplinkCompression
from distopt.spans import span

_log = logging.getLogger("distopt")
_LOOK_S = 0.1  # longest wait before losses are looked for
_GIVE_UP_S = 0.05  # least time between two looks
_BATCH = 10_000  # messages that are read in one go
_WINDOW = 2  # tasks that a site may owe an answer to: one that it computes, and a newer one to skip to


@dataclass(frozen=True)
class _Work:
    """What a client was asked for."""

    version: int
    rank: int
    connection: int
    since_s: float


class RemoteCohort:
    """See the module and `Cohort`.

    Args:
        transport: To the sites.
        roster: Of the sites.
        algorithm: Its pacing, and what replies hold.
        participation: Who may begin in a round.
        uplink: How the clients' vectors travel.
        num_trained: d.
        dtype: Of the vectors.
        seed: Of who works where not all may.
        deadline_s: How long a client may take to answer.
        wait_s: How long sites may take to say hello at the start.
        fewest_sites: How many must have by then.
        leaders: The ranks that speak for a site.
        may_return: Whether sites that are lost may come back.
        count_batches: Told how many batches the sites have trained on, after each round.
        described: What a checkpoint's run and this one must agree in.
    """

    exchange: Exchange = HERE

    def __init__(
        self,
        transport: Transport,
        roster: Roster,
        *,
        algorithm: FederatedAlgorithm,
        participation: ParticipationProcess,
        uplink: UplinkCompression | None,
        num_trained: int,
        dtype: torch.dtype,
        seed: int,
        deadline_s: float,
        wait_s: float,
        fewest_sites: int,
        leaders: Sequence[int],
        may_return: bool,
        count_batches: Callable[[int], None],
        described: Mapping[str, Any],
    ) -> None:
        self.described = described
        self.bytes_received = 0
        self._transport, self._roster = transport, roster
        self._algorithm, self._pacing = algorithm, algorithm.pacing
        self._participation = participation
        self._num_trained, self._dtype = num_trained, dtype
        self._uplink = uplink
        self._key = stream_key(seed, "concurrency")
        self._deadline_s, self._wait_s = deadline_s, wait_s
        self._leaders = frozenset(leaders)
        self._fewest_sites, self._may_return = fewest_sites, may_return
        self._count_batches = count_batches
        self._saved = 0
        self._work: dict[int, _Work] = {}  # by client
        self._owed: dict[int, set[int]] = {}  # versions that were sent, by rank
        self._done: set[tuple[int, int]] = set()  # (client, version) of replies that have come
        self._came: list[Reply] = []
        self._version = 0
        self._looked_s = 0.0
        self._began_s = time.monotonic()
        self._passed_s = 0.0  # in sessions before this one
        self._boundary_s = 0.0  # end of the last interval
        self._end_s = 0.0  # of the last round

    @property
    def time_s(self) -> float | None:
        """Real seconds since the first round began, without those between two sessions; None if all are waited for."""
        return None if isinstance(self._pacing, Synchronous) else self._end_s

    @property
    def num_at_work(self) -> int:
        """How many clients have been asked and have not answered."""
        return len(self._work)

    # -- the sites -----------------------------------------------------------------------------------------------------

    def begin(self, version: int) -> None:
        """Waits for the sites.

        Raises:
            CompatibilityError: One does not fit, and cannot come back as another.
            PeerLostError: Too few have come in time.
        """
        self._version = self._saved = version
        self._roster.open(version)
        self._work, self._owed, self._done, self._came = {}, {}, set(), []
        end = time.monotonic() + self._wait_s
        while len(self._roster.ready) < self._fewest_sites:
            self._take(min(_LOOK_S, max(0.0, end - time.monotonic())))
            if self._roster.refusals and not self._may_return:
                rank, reason = next(iter(self._roster.refusals.items()))
                raise CompatibilityError(f"rank {rank} cannot take part: {reason}")
            self._check_start(over=time.monotonic() >= end)
        if unhosted := self._roster.unhosted:
            _log.warning(
                "%d of the clients are at no site and take no part until one comes for them, %d first",
                len(unhosted), unhosted[0],
            )  # fmt: skip
        self._began_s, self._boundary_s = time.monotonic(), time.monotonic()

    def _check_start(self, *, over: bool) -> None:
        sites = set(self._leaders)
        lost = sorted(self._transport.lost & sites)
        hopeless = not self._may_return and len(sites) - len(lost) < self._fewest_sites
        if len(self._roster.ready) < self._fewest_sites and (over or hopeless):
            missing = sorted(sites - set(self._roster.ready))
            told = "; ".join(f"rank {rank}: {why}" for rank, why in self._roster.refusals.items())
            raise PeerLostError(
                f"{self._fewest_sites} sites must be ready within {self._wait_s:g} s, got {len(self._roster.ready)}; "
                f"missing are ranks {', '.join(map(str, missing))}{f' ({told})' if told else ''}: do they call "
                "take_part, and can they reach this process?",
                missing,
            )

    def end(self, reason: str = "") -> None:
        """Tells all sites that nothing more comes; a reason makes it an error there."""
        for rank in self._leaders - self._transport.lost:
            self._roster.tell(rank, End(sender=SERVER, session=self._roster.session, reason=reason))

    # -- a round -------------------------------------------------------------------------------------------------------

    def answers(self, broadcast: Broadcast) -> Answers:
        """See `Cohort.answers`.

        Raises:
            PeerLostError: All sites are gone.
        """
        self._version = broadcast.version
        with span("federated", "wait"):
            return self._answers(broadcast)

    def _answers(self, broadcast: Broadcast) -> Answers:
        self._hear_all()
        self._wait_for_somebody()
        drawn = [int(client) for client in self._participation.next_round()]
        busy = set(self._work) | {reply.client for reply in self._came}
        willing = [client for client in drawn if client not in busy and self._may_ask(client)]
        match self._pacing:
            case EveryInterval(seconds=seconds):
                started = self._interval(broadcast, willing, seconds)
            case AfterArrivals():
                started = self._arrivals(broadcast, willing, self._pacing)
            case _:
                started = self._synchronous(broadcast, willing)
        most = self._pacing.count if isinstance(self._pacing, AfterArrivals) else len(self._came)
        came, self._came = self._came[:most], self._came[most:]  # the rest is for the next aggregation
        self._count_batches(sum(reply.num_steps for reply in came))
        refused = self._roster.refused_in_round()
        self._end_s = self._passed_s + time.monotonic() - self._began_s
        self._done = {(client, version) for client, version in self._done if version >= self._version - 1}
        return Answers(
            started=started,
            participants=sorted(reply.client for reply in came),
            replies=came,
            refused=refused,
        )

    def _synchronous(self, broadcast: Broadcast, willing: Sequence[int]) -> list[int]:
        self._ask(broadcast, willing)
        while self._work:
            self._take(_LOOK_S)
            self._give_up()
        return list(willing)

    def _interval(self, broadcast: Broadcast, willing: Sequence[int], seconds: float) -> list[int]:
        self._ask(broadcast, willing)
        self._boundary_s = max(self._boundary_s + seconds, time.monotonic())
        while (left := self._boundary_s - time.monotonic()) > 0:
            self._take(min(left, _LOOK_S))
            self._give_up()
        self._hear_all()
        return list(willing)

    def _arrivals(self, broadcast: Broadcast, willing: list[int], pacing: AfterArrivals) -> list[int]:
        places = math.inf if pacing.concurrency is None else pacing.concurrency
        if len(self._work) + len(willing) > places:
            willing = stream(self._key, self._version, 0).permutation(np.array(willing)).tolist()
        waiting, started = deque(willing), []
        while len(self._came) < pacing.count:
            free = min(len(waiting), places - len(self._work))
            begin = [waiting.popleft() for _ in range(int(max(0, free)))]
            self._ask(broadcast, begin)
            started += begin
            if not self._work:
                break
            self._take(_LOOK_S)
            self._give_up()
        return started

    def _ask(self, broadcast: Broadcast, clients: Sequence[int]) -> None:
        by_site: dict[int, list[int]] = {}
        for client in clients:
            rank = self._roster.host_of(client)
            if rank is not None:
                by_site.setdefault(rank, []).append(client)
        for rank, asked in by_site.items():
            self._owed.setdefault(rank, set()).add(broadcast.version)
            connection = self._roster.connections(rank)
            work = _Work(broadcast.version, rank, connection, time.monotonic())
            self._work.update(dict.fromkeys(asked, work))
            self._roster.tell(
                rank,
                Task(
                    sender=SERVER,
                    session=self._roster.session,
                    saved=self._saved,
                    overrules=isinstance(self._pacing, Synchronous),
                    clients=asked,
                    broadcast=broadcast,
                ),
            )

    def _may_ask(self, client: int) -> bool:
        """Whether its site is there, and not busy with what nobody waits for any more."""
        rank = self._roster.host_of(client)
        if rank is None:
            return False
        return not isinstance(self._pacing, Synchronous) or len(self._owed.get(rank, ())) < _WINDOW

    def _give_up(self) -> None:
        """Forgets the work of those who are lost or late."""
        now = time.monotonic()
        if now - self._looked_s < _GIVE_UP_S:
            return
        self._looked_s = now
        self._roster.look_after()
        for client, work in list(self._work.items()):
            gone = not self._roster.is_ready(work.rank) or self._roster.connections(work.rank) != work.connection
            if gone:
                self._owed.pop(work.rank, None)
            if gone or now - work.since_s > self._deadline_s:
                del self._work[client]
                _log.info(
                    "client %d of rank %d does not take part in version %d: %s",
                    client, work.rank, work.version, "its site is gone" if gone else "the deadline is over",
                )  # fmt: skip

    def _wait_for_somebody(self) -> None:
        end = time.monotonic() + self._deadline_s
        while not self._roster.ready:
            if not self._may_return or time.monotonic() >= end:
                told = "; ".join(f"rank {rank}: {why}" for rank, why in self._roster.refusals.items())
                raise PeerLostError(
                    f"all sites are gone after {self._version} rounds{f' ({told})' if told else ''}; start them again"
                    f"{'' if self._may_return else ', with the server, which goes on from its checkpoint'}",
                    sorted(self._leaders),
                )
            self._take(_LOOK_S)

    # -- letters -------------------------------------------------------------------------------------------------------

    def _hear_all(self) -> None:
        for _ in range(_BATCH):
            if not self._take(0.0):
                return

    def _take(self, timeout_s: float) -> bool:
        got = self._transport.receive(timeout_s)
        if got is None:
            return False
        rank, frame = got
        try:
            letter = letters.decode(frame)
            self.bytes_received += letters.length(frame)
            if letter.sender != rank:
                raise DecodeError(f"it says that it is of rank {letter.sender}")
            self._read(letter)
        except DecodeError as error:
            self._roster.refuse(rank, "no letter", error)
        return True

    def _read(self, letter: Letter) -> None:
        match letter:
            case Hello():
                self._owed.pop(letter.sender, None)
                self._roster.greet(letter)
            case Ready():
                self._roster.take_ready(letter)
            case Failed():
                self._roster.take_failure(letter)
            case Answer():
                self._take_answer(letter)
            case _:
                raise DecodeError(f"a server is not told {type(letter).__name__}")

    def _take_answer(self, answer: Answer) -> None:
        rank, client, version = answer.sender, answer.reply.client, answer.reply.version
        if answer.session != self._roster.session:
            self._roster.refuse(rank, OTHER_SESSION, f"of client {client}")
            return
        if not self._roster.hosts(rank, client):
            self._roster.refuse(rank, "not its client", client)
            return
        self._owed[rank] = {owed for owed in self._owed.get(rank, ()) if owed > version}
        work = self._work.get(client)
        if work is None or work.version != version:
            reason = "duplicate" if (client, version) in self._done else "late"
            self._roster.refuse(rank, reason if version <= self._version else "another version", f"of client {client}")
            return
        del self._work[client]
        self._done.add((client, version))
        try:
            self._came.append(
                unpack(answer, self._algorithm, self._uplink, num_trained=self._num_trained, dtype=self._dtype)
            )
        except DecodeError as error:
            self._roster.refuse(rank, "payload", error)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def saving(self, version: int) -> None:
        """See `Cohort.saving`; comes to the sites before any task of this version."""
        self._roster.tell_all(Saving(sender=SERVER, session=self._roster.session, version=version))

    def saved(self, version: int) -> None:
        """See `Cohort.saved`."""
        self._saved = version

    def state_dict(self) -> dict[str, Any]:
        """See `Cohort.state_dict`; what clients keep stays with them."""
        return {"participation_state": self._participation.state_dict(), "time_s": self._end_s}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Cohort.load_state_dict`; nobody is at work."""
        self._participation.load_state_dict(state["participation_state"])
        self._passed_s = self._end_s = state["time_s"]

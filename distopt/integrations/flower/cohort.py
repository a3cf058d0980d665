"""The clients of a job as nodes of Flower: who is asked when, on a real clock, for each pacing of a server.

Who takes part is drawn by distopt's models from the seed, never by Flower. A client whose node is not there, fails or
does not answer in time counts as not participating.

Limits: a client whose answer is late begins anew when it is drawn again, and its late answer is dropped.
"""

import json
import logging
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import numpy as np
from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid
from torch import nn

from distopt.errors import CompatibilityError, DecodeError
from distopt.federated import AfterArrivals, Broadcast, EveryInterval, Layout, Participation, Reply, Synchronous
from distopt.federated.cohort import Answers
from distopt.federated.exchange import HERE, Exchange
from distopt.federated.network.facts import facts_of
from distopt.federated.randomness import stream, stream_key
from distopt.federated.simulation import settings_of
from distopt.integrations.flower.app import ACTION
from distopt.integrations.flower.job import Job
from distopt.integrations.flower.mail import REAL, Answer, Clock, Mail
from distopt.integrations.flower.records import read_reply, write_broadcast
from distopt.integrations.flower.roll import Roll

_log = logging.getLogger("distopt")
CONFIG = "config"


@dataclass(frozen=True)
class Work:
    """What a client was asked for."""

    client: int
    version: int


Ended = Answer[Work]


class FlowerCohort:
    """See the module and `distopt.federated.cohort.Cohort`.

    Args:
        job: Of all clients.
        model: The server's.
        layout: Of the model.
        num_clients: How many are registered.
        participation: Who takes part in which round; of an algorithm that does not wait, who may begin.
        connect_s: How long to wait for nodes.
        poll_s: Between two looks at what has come.
        clock: The real one, but in tests.
    """

    def __init__(
        self,
        *,
        job: Job,
        model: nn.Module,
        layout: Layout,
        num_clients: int,
        participation: Participation,
        connect_s: float,
        poll_s: float,
        clock: Clock = REAL,
    ) -> None:
        self.job, self.layout = job, layout
        self._facts = facts_of(model=model, layout=layout, settings={}, data=None, num_clients=None)
        self._num_clients = num_clients
        self._participation = participation.begin(num_clients, job.seed)
        self._settings = settings_of(participation)
        self._connect_s, self._poll_s, self._clock = connect_s, poll_s, clock
        self._order_key = stream_key(job.seed, "concurrency")
        self._rounds = {Synchronous: self._everybody, EveryInterval: self._interval, AfterArrivals: self._arrivals}
        if type(job.algorithm.pacing) not in self._rounds:
            raise CompatibilityError(
                f"the pacing of an algorithm must be one of {', '.join(kind.__name__ for kind in self._rounds)}, got "
                f"{job.algorithm.pacing} of {job.algorithm.name!r}; distopt.federated.Simulation runs it, Flower cannot"
            )
        self._run = uuid4().hex  # what clients keep in Flower's context belongs to it
        self._saved = 0
        self._time_s = 0.0  # at the end of the last round
        self._offset_s = 0.0  # of the clock
        self.lost: Counter[str] = Counter()

    # -- of a run ------------------------------------------------------------------------------------------------------

    def connect(
        self, grid: Grid, *, timeout_s: float, config: ConfigRecord | None = None, remember: Iterable[int] = ()
    ) -> None:
        """The grid of the run to come.

        Args:
            grid: Of Flower's.
            timeout_s: After which nobody waits for an answer.
            config: Travels with each broadcast, for the nodes' mods.
            remember: The clients that must still have what they kept in an earlier run.
        """
        self._timeout_s, self._config, self._gathered = timeout_s, config, False
        self._mail: Mail[Work] = Mail(grid, self._poll_s, self._clock)
        self._came: deque[Ended] = deque()  # waits for the next aggregation
        self._roll = Roll(
            Mail(grid, self._poll_s, self._clock),
            grid,
            question=ConfigRecord(
                {
                    "job": self.job.to_text(),
                    "run": self._run,
                    "facts": json.dumps(self._facts),
                    "clients": self._num_clients,
                }
            ),
            num_clients=self._num_clients,
            connect_s=self._connect_s,
            clock=self._clock,
            remember=frozenset(remember),
        )

    @property
    def exchange(self) -> Exchange:
        """All replies are here."""
        return HERE

    @property
    def described(self) -> Mapping[str, Any]:
        """See `Cohort.described`."""
        return {
            "engine": "flower",
            "local": self.job.local.to_dict(),
            "seed": self.job.seed,
            "uplink": None if self.job.uplink is None else self.job.uplink.to_dict(),
            "participation": self._settings,
        }

    @property
    def time_s(self) -> float | None:
        """Seconds on the clock since the first round; None where everybody is waited for."""
        return None if isinstance(self.job.algorithm.pacing, Synchronous) else self._time_s

    def begin(self, version: int) -> None:
        """See `Cohort.begin`."""
        self._saved = version

    def saving(self, version: int) -> None:
        """See `Cohort.saving`."""

    def saved(self, version: int) -> None:
        """See `Cohort.saved`: what clients kept for rounds before this version is not needed any more."""
        self._saved = version

    def state_dict(self) -> dict[str, Any]:
        """See `Cohort.state_dict`; who was at work begins anew after it is taken back."""
        return {"drawn": self._participation.state_dict(), "clock_s": self._time_s, "run": self._run}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Cohort.load_state_dict`."""
        self._participation.load_state_dict(state["drawn"])
        self._time_s, self._run = float(state["clock_s"]), str(state["run"])

    # -- rounds --------------------------------------------------------------------------------------------------------

    def answers(self, broadcast: Broadcast) -> Answers:
        """See `Cohort.answers`."""
        willing = self._willing()
        started, ended = self._rounds[type(self.job.algorithm.pacing)](broadcast, willing)
        self._time_s = self._clock.monotonic() - self._offset_s
        return self.read(started, ended)

    def ask(self, broadcast: Broadcast) -> list[tuple[Work, Message]]:
        """The messages of a synchronous round, for hosts that send them themselves."""
        return self._messages(broadcast, self._willing())

    def read(self, started: list[int], ended: Sequence[Ended]) -> Answers:
        """What the ends of messages amount to."""
        replies: list[Reply] = []
        refused: Counter[str] = Counter()
        for answer in sorted(ended, key=lambda each: (each.about.client, each.about.version)):
            if answer.message is None:
                self.lost[answer.why or "no answer"] += 1
                _log.warning("client %d counts as not participating: %s", answer.about.client, answer.why)
                continue
            try:
                replies.append(read_reply(answer.message.content, self.job, self.layout, answer.about.client))
            except DecodeError as error:
                refused["unreadable"] += 1
                _log.warning("the reply of client %d is refused: %s", answer.about.client, error)
        return Answers(
            started=started, participants=sorted(reply.client for reply in replies), replies=replies, refused=refused
        )

    def _willing(self) -> list[int]:
        """Those drawn for this round that are there and not at work, in ascending order; waits for all at first."""
        if not self._gathered:
            self._roll.gather()
            self._gathered = True
            self._offset_s = self._clock.monotonic() - self._time_s
        self._node_of = self._roll.refresh()
        busy = {work.client for work in self._mail.under_way} | {answer.about.client for answer in self._came}
        drawn = map(int, self._participation.next_round())
        return [client for client in drawn if client in self._node_of and client not in busy]

    def _messages(self, broadcast: Broadcast, clients: Sequence[int]) -> list[tuple[Work, Message]]:
        content = write_broadcast(broadcast, self.job, saved=self._saved, run=self._run)
        if self._config:
            content[CONFIG] = self._config
        return [
            (
                Work(client, broadcast.version),
                Message(
                    content,
                    dst_node_id=self._node_of[client],
                    message_type=f"train.{ACTION}",
                    ttl=self._timeout_s,
                    group_id=str(broadcast.version),
                ),
            )
            for client in clients
        ]

    def _send(self, broadcast: Broadcast, clients: Sequence[int]) -> list[Ended]:
        return self._mail.send(self._messages(broadcast, clients), self._timeout_s)

    def _everybody(self, broadcast: Broadcast, willing: list[int]) -> tuple[list[int], list[Ended]]:
        ended = self._send(broadcast, willing)
        while self._mail.under_way:
            ended += self._mail.collect()
            if self._mail.under_way:
                self._mail.pause()
        return willing, ended

    def _interval(self, broadcast: Broadcast, willing: list[int]) -> tuple[list[int], list[Ended]]:
        pacing = self.job.algorithm.pacing
        assert isinstance(pacing, EveryInterval)
        until = self._offset_s + self._time_s + pacing.seconds
        ended = self._send(broadcast, willing)
        while self._clock.monotonic() < until:
            self._mail.pause(until)
            ended += self._mail.collect()
        return willing, ended

    def _arrivals(self, broadcast: Broadcast, willing: list[int]) -> tuple[list[int], list[Ended]]:
        pacing = self.job.algorithm.pacing
        assert isinstance(pacing, AfterArrivals)
        places = np.inf if pacing.concurrency is None else pacing.concurrency
        if self._at_work + len(willing) > places:
            willing = stream(self._order_key, broadcast.version, 0).permutation(willing).tolist()
        waiting, started = deque(willing), list[int]()
        ended: list[Ended] = []
        while sum(answer.message is not None for answer in ended) < pacing.count:
            # An answer has its place until it is taken, so two that come between two looks are one after the other.
            begin = [waiting.popleft() for _ in range(int(min(places - self._at_work, len(waiting))))]
            started += begin
            self._came.extend(self._send(broadcast, begin))
            while not self._came and self._mail.under_way:
                self._came.extend(self._mail.collect())
                if not self._came:
                    self._mail.pause()
            if not self._came:
                break
            ended.append(self._came.popleft())
        return started, ended

    @property
    def _at_work(self) -> int:
        return len(self._mail.under_way) + len(self._came)

"""Who works on what and when: the rounds of a simulation on a virtual clock, for each pacing of a server.

A client computes when its answer is aggregated, from the broadcast that it was sent: until then only the version needs
to be remembered.

Limits: a synchronous round lasts as long as the slowest of its clients takes, one that nobody takes part in no time.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from distopt.errors import ConfigError, StateMismatchError
from distopt.federated.clock import VirtualClock
from distopt.federated.delays import DelayProcess
from distopt.federated.pacing import AfterArrivals, EveryInterval, Pacing, Synchronous
from distopt.federated.participation import ParticipationProcess
from distopt.federated.randomness import stream, stream_key


@dataclass(frozen=True)
class Round:
    """What happens between two aggregations.

    Attributes:
        started: The clients that are sent this round's broadcast.
        answers: (client, version that it was sent) of those whose replies the aggregation at the end takes.
    """

    started: list[int]
    answers: list[tuple[int, int]]


class Schedule(ABC):
    """A sequence of rounds.

    Args:
        participation: Which clients may begin in a round, if they are not at work.
        delays: How long each takes; None if no time is counted.
    """

    def __init__(self, participation: ParticipationProcess, delays: DelayProcess | None) -> None:
        self.participation = participation
        self.delays = delays
        self.clock = VirtualClock()
        self._at_work: dict[int, int] = {}  # client, version

    @property
    def time_s(self) -> float | None:
        """Virtual seconds at the end of the last round; None if no time is counted."""
        return None if self.delays is None else self.clock.now_s

    @property
    def versions_at_work(self) -> set[int]:
        """Of the broadcasts that somebody still has to answer."""
        return set(self._at_work.values())

    def next_round(self, version: int) -> Round:
        """What happens until the aggregation that ends this version.

        Args:
            version: The server's, one more in each round.
        """
        willing = [int(client) for client in self.participation.next_round() if int(client) not in self._at_work]
        return self._round(version, willing)

    @abstractmethod
    def _round(self, version: int, willing: list[int]) -> Round:
        """Of the clients that may begin, in ascending order, none of them at work."""

    def _start(self, client: int, version: int) -> None:
        assert self.delays is not None
        self.clock.schedule(client, self.delays.next(client), version)
        self._at_work[client] = version

    def _finish(self, client: int) -> tuple[int, int]:
        return client, self._at_work.pop(client)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {
            "participation": self.participation.state_dict(),
            "delays": None if self.delays is None else self.delays.state_dict(),
            "clock": self.clock.state_dict(),
            "at_work": dict(self._at_work),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a schedule of the same configuration was.

        Raises:
            StateMismatchError: The participation or the delays were others.
        """
        if (state["delays"] is None) != (self.delays is None):
            have, had = ("none" if each is None else "some" for each in (self.delays, state["delays"]))
            raise StateMismatchError(f"delays of the checkpoint must be {have}, got {had}; resume as the run began")
        self.participation.load_state_dict(state["participation"])
        if self.delays is not None:
            self.delays.load_state_dict(state["delays"])
        self.clock.load_state_dict(state["clock"])
        self._at_work = dict(state["at_work"])


class CohortSchedule(Schedule):
    """Everybody who begins is waited for."""

    def _round(self, version: int, willing: list[int]) -> Round:
        for client in willing if self.delays is not None else ():
            self._start(client, version)
        while len(self.clock):
            self._finish(self.clock.next_arrival().client)
        return Round(willing, [(client, version) for client in willing])


class IntervalSchedule(Schedule):
    """The round ends after an interval; who has arrived by then begins anew in the next."""

    def __init__(self, participation: ParticipationProcess, delays: DelayProcess, pacing: EveryInterval) -> None:
        super().__init__(participation, delays)
        self._interval_s = pacing.seconds

    def _round(self, version: int, willing: list[int]) -> Round:
        for client in willing:
            self._start(client, version)
        arrivals = self.clock.next_arrivals(self.clock.now_s + self._interval_s)
        return Round(willing, [self._finish(arrival.client) for arrival in arrivals])


class ArrivalSchedule(Schedule):
    """The round ends when enough have arrived, or when nobody is at work any more."""

    def __init__(
        self, participation: ParticipationProcess, delays: DelayProcess, pacing: AfterArrivals, seed: int
    ) -> None:
        super().__init__(participation, delays)
        self._pacing = pacing
        self._key = stream_key(seed, "concurrency")

    def _round(self, version: int, willing: list[int]) -> Round:
        started: list[int] = []
        answers: list[tuple[int, int]] = []
        places = np.inf if self._pacing.concurrency is None else self._pacing.concurrency
        if len(self._at_work) + len(willing) > places:
            willing = stream(self._key, version, 0).permutation(willing).tolist()
        waiting = deque(willing)
        while len(answers) < self._pacing.count:  # the place of the last one is for the next version
            while waiting and len(self._at_work) < places:
                started.append(waiting.popleft())
                self._start(started[-1], version)
            if not len(self.clock):
                break
            answers.append(self._finish(self.clock.next_arrival().client))
        return Round(started, answers)


def make_schedule(
    pacing: Pacing, participation: ParticipationProcess, delays: DelayProcess | None, seed: int
) -> Schedule:
    """The schedule of a pacing.

    Raises:
        ConfigError: The pacing needs delays, or more clients than there are.
    """
    if isinstance(pacing, Synchronous):
        return CohortSchedule(participation, delays)
    if delays is None:
        raise ConfigError(
            "delays must be given for an algorithm that does not wait for everybody, got None; use "
            "distopt.federated.ConstantDelays(mean_s=1.0), say"
        )
    if isinstance(pacing, EveryInterval):
        return IntervalSchedule(participation, delays, pacing)
    if pacing.count > participation.num_clients:
        raise ConfigError(
            f"the server must not wait for more answers than there are clients, {participation.num_clients}, got "
            f"{pacing.count}; lower buffer_size"
        )
    return ArrivalSchedule(participation, delays, pacing, seed)

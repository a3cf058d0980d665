"""The clients of a simulation: a schedule on the virtual clock says who works when, a trainer computes them.

A client is computed when its answer is aggregated, from the broadcast that it was sent: until then the broadcast is
kept, and nothing else.
"""

from collections.abc import Mapping
from typing import Any

from distopt.federated.cohort import Answers
from distopt.federated.exchange import Exchange
from distopt.federated.execution import Trainer
from distopt.federated.messages import Broadcast, Reply
from distopt.federated.schedule import Round, Schedule
from distopt.spans import span


class SimulatedCohort:
    """See the module and `Cohort`.

    Args:
        trainer: Computes the clients.
        schedule: Says which.
        described: What a checkpoint's run and this one must agree in.
    """

    def __init__(self, trainer: Trainer, schedule: Schedule, described: Mapping[str, Any]) -> None:
        self.trainer, self.schedule, self.described = trainer, schedule, described
        self._at_work: dict[int, Broadcast] = {}  # by version, what somebody still has to answer

    @property
    def exchange(self) -> Exchange:
        """Of the trainer."""
        return self.trainer.exchange

    @property
    def time_s(self) -> float | None:
        """Virtual seconds; None without delays."""
        return self.schedule.time_s

    def begin(self, version: int) -> None:
        """See `Cohort.begin`: the clients are here."""

    def answers(self, broadcast: Broadcast) -> Answers:
        """See `Cohort.answers`."""
        planned = self.schedule.next_round(broadcast.version)
        replies = self._replies(broadcast, planned)
        participants = sorted(client for client, _ in planned.answers)
        return Answers(started=planned.started, participants=participants, replies=replies)

    def _replies(self, broadcast: Broadcast, planned: Round) -> list[Reply]:
        self._at_work[broadcast.version] = broadcast
        replies = []
        for version, sent in self._at_work.items():
            clients = sorted(client for client, answered in planned.answers if answered == version)
            if clients:
                with span("federated", "train"):
                    replies += self.trainer.train(sent, clients)
        wanted = self.schedule.versions_at_work
        self._at_work = {version: sent for version, sent in self._at_work.items() if version in wanted}
        return replies

    def saving(self, version: int) -> None:
        """See `Cohort.saving`: all that clients keep is in the state."""

    def saved(self, version: int) -> None:
        """See `Cohort.saved`."""

    def state_dict(self) -> dict[str, Any]:
        """See `Cohort.state_dict`."""
        return {
            "schedule": self.schedule.state_dict(),
            "at_work": {v: {"model": sent.model, "extras": dict(sent.extras)} for v, sent in self._at_work.items()},
            "clients": self.trainer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Cohort.load_state_dict`."""
        self.schedule.load_state_dict(state["schedule"])
        self._at_work = {version: Broadcast(version=version, **sent) for version, sent in state["at_work"].items()}
        self.trainer.load_state_dict(state["clients"])

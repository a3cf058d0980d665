"""Federated training in one process: the server and all clients, one round after the other.

The same seed gives the same history to the bit, within an execution mode. Everything random comes from the seed, the
round and the client, or from the models of participation and delays, whose states a checkpoint holds.

Time is virtual: with `delays`, each client's work takes as long as they say, and the history has "time_s".
"""

import os
from collections.abc import Mapping
from types import NoneType
from typing import Any, get_args

from torch import nn

from distopt.errors import ConfigError
from distopt.federated.algorithm import FederatedAlgorithm
from distopt.federated.data import ClientData
from distopt.federated.delays import Delays
from distopt.federated.execution import make_trainer
from distopt.federated.functional import Loss, cross_entropy
from distopt.federated.history import History
from distopt.federated.layout import Layout
from distopt.federated.local_training import LocalTraining
from distopt.federated.participation import Everybody, Participation
from distopt.federated.privacy.job import JobFacts, check_job
from distopt.federated.rounds import Evaluate, Progress, Rounds, check_settings
from distopt.federated.schedule import make_schedule
from distopt.federated.simulated_cohort import SimulatedCohort
from distopt.federated.uplink import UplinkCompression


class Simulation:
    """A federated job.

    Args:
        model: Its initial parameters are the first model; afterwards it holds the last one.
        clients: Their data.
        algorithm: Both sides' rule.
        local: What a client does in a round.
        loss: `loss(model, batch)`, the mean over a batch; cross-entropy of (inputs, labels) if left out.
        participation: Who takes part in which round; everybody if left out. For an algorithm that does not wait: who
            may begin, if they are not at work.
        delays: How long a client's work takes, in virtual seconds; needed by algorithms that do not wait.
        evaluate: `evaluate(model)` gives named numbers; called in evaluation mode, without gradients, and once before
            the first round to see whether it works.
        evaluate_every: In rounds; the last round always is.
        exclude: Names of tensors that are not averaged, see `Layout`.
        seed: Of everything random.
        mode: How clients are computed, see `distopt.federated.execution`.
        uplink: How the clients' vectors travel; None sends them as they are.
        folder: Where vectors of clients lie in memory-mapped files; in memory if left out.
        checkpoint: A file that holds the run's state, written beside and renamed.
        checkpoint_every: In rounds; 0 for never.
        progress: Called after each round with its row.
        stop_at_epsilon: Of a private algorithm: the run ends before a round that would pass it; the epsilon that the
            algorithm's settings promise is never passed.

    Raises:
        ConfigError: A value breaks its rule, or does not fit the others.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        clients: ClientData,
        algorithm: FederatedAlgorithm,
        local: LocalTraining | None = None,
        loss: Loss | None = None,
        participation: Participation | None = None,
        delays: Delays | None = None,
        evaluate: Evaluate | None = None,
        evaluate_every: int = 1,
        exclude: tuple[str, ...] = (),
        seed: int = 0,
        mode: str = "auto",
        uplink: UplinkCompression | None = None,
        folder: str | os.PathLike[str] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 0,
        progress: Progress | None = None,
        stop_at_epsilon: float | None = None,
    ) -> None:
        check_settings(evaluate_every=evaluate_every, checkpoint=checkpoint, checkpoint_every=checkpoint_every)
        check_kinds(
            ("clients", clients, ClientData),
            ("algorithm", algorithm, FederatedAlgorithm),
            ("local", local, LocalTraining | None),
            ("participation", participation, Participation | None),
            ("delays", delays, Delays | None),
            ("uplink", uplink, UplinkCompression | None),
        )
        self.model, self.clients, self.algorithm = model, clients, algorithm
        self.local = local or LocalTraining(steps=5)
        self.layout = Layout(model, exclude)
        facts = JobFacts(
            model=model,
            layout=self.layout,
            num_clients=clients.num_clients,
            sample_counts=[len(part) for part in clients.parts],
            local=local,
            participation=participation,
            uplink=uplink,
            checkpoint_every=checkpoint_every,
            simulated=True,
            stop_at_epsilon=stop_at_epsilon,
        )
        check_job(algorithm, facts)
        self._trainer = make_trainer(
            mode,
            model=model,
            layout=self.layout,
            algorithm=algorithm,
            local=self.local,
            data=clients,
            loss=loss or cross_entropy,
            seed=seed,
            uplink=uplink,
            folder=folder,
        )
        count = clients.num_clients
        schedule = make_schedule(
            algorithm.pacing,
            (participation or Everybody()).begin(count, seed),
            None if delays is None else delays.begin(count, seed),
            seed,
        )
        described = {
            "local": self.local.to_dict(),
            "seed": seed,
            "uplink": None if uplink is None else uplink.to_dict(),
            "data": clients.fingerprint,
            "mode": self.mode,
            "participation": settings_of(participation),
            "delays": settings_of(delays),
        }
        self._cohort = SimulatedCohort(self._trainer, schedule, described)
        self._rounds = Rounds(
            model=model,
            layout=self.layout,
            algorithm=algorithm,
            cohort=self._cohort,
            num_clients=count,
            evaluate=evaluate,
            evaluate_every=evaluate_every,
            folder=folder,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            progress=progress,
            stop_at_epsilon=stop_at_epsilon,
        )

    @property
    def mode(self) -> str:
        """How clients are computed."""
        return self._trainer.mode

    @property
    def why_mode(self) -> str:
        """Why they are computed so."""
        return self._trainer.why

    @property
    def history(self) -> History:
        """Of all rounds that are done."""
        return self._rounds.history

    @property
    def refused(self) -> Mapping[str, int]:
        """How many replies did not count, by reason."""
        return self._rounds.refused

    @property
    def round(self) -> int:
        """How many rounds are done."""
        return self._rounds.round

    @property
    def time_s(self) -> float | None:
        """Virtual seconds that have passed; None without delays."""
        return self._cohort.time_s

    def run(self, rounds: int) -> History:
        """Trains until `rounds` rounds are done, those of a checkpoint included; the history of all of them.

        Raises:
            ConfigError: More rounds are done already, or `evaluate` does not give numbers.
        """
        return self._rounds.run(rounds)

    def state_dict(self) -> dict[str, Any]:
        """The whole run: tensors and plain values."""
        return self._rounds.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a run of the same configuration was.

        Raises:
            StateMismatchError: The state belongs to another algorithm, seed, execution mode, data or model.
        """
        self._rounds.load_state_dict(state)

    def save(self) -> None:
        """Writes the checkpoint; with several ranks they must all call it, and the first one writes."""
        self._rounds.save()

    def resume(self) -> bool:
        """Takes the checkpoint back, if there is one; whether there was. Several ranks must all see the file.

        Raises:
            StateMismatchError: It belongs to another run, or is damaged.
        """
        return self._rounds.resume()


def settings_of(part: Participation | Delays | None) -> Mapping[str, Any] | None:
    """Its settings, but for where a trace lies."""
    return None if part is None else {key: value for key, value in part.to_dict().items() if key != "path"}


def check_kinds(*arguments: tuple[str, object, Any]) -> None:
    """Raises `ConfigError` unless each (name, value, class or classes) is of its class."""
    for name, value, kind in arguments:
        if not isinstance(value, kind):
            raise ConfigError(f"{name} must be of {_kind(kind)}, got {value!r:.200}; make an object of that class")


def _kind(kind: Any) -> str:
    return " or ".join("None" if each is NoneType else each.__name__ for each in get_args(kind) or (kind,))

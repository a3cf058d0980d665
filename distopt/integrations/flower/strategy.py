"""The server app's side: a Message-API strategy whose rounds are `distopt.federated.Server`'s.

    result = FederatedStrategy(model=model, num_clients=10, algorithm=FedAU(cutoff=50)).start(grid, num_rounds=100)

All clients are waited for before the first round, so everybody can take part in it. Algorithms that do not wait
(FedFix, FedBuff, FedAsync, asynchronous FedAvg) run on the real clock. What a reply may be and what is refused is the
server's to say; messages that fail, or do not come in time, count as not participating.

Limits: `configure_train` and `aggregate_train` are there for other strategies around this one, and for synchronous
algorithms only; a reply has changes of the model, so Flower's strategies and mods that clip whole models do not fit.
"""

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import nn

from distopt.config import check_count, check_number
from distopt.errors import CompatibilityError, ConfigError
from distopt.federated import (
    Everybody,
    FederatedAlgorithm,
    History,
    Layout,
    LocalTraining,
    Participation,
    Synchronous,
    UplinkCompression,
)
from distopt.federated.client import kept_names
from distopt.federated.network.facts import difference
from distopt.federated.privacy.job import JobFacts, check_job
from distopt.federated.rounds import Rounds, check_settings
from distopt.federated.simulation import check_kinds
from distopt.integrations.flower.cohort import FlowerCohort, Work
from distopt.integrations.flower.job import Job
from distopt.integrations.flower.mail import Answer
from distopt.integrations.flower.records import from_arrays, to_arrays

_log = logging.getLogger("flwr")  # where Flower's own strategies say what they do
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
_COUNTS = ("participants", "bytes_down", "bytes_up", "refused")


class FederatedStrategy(Strategy):
    """Rounds of one algorithm among the nodes of a Flower federation.

    Args:
        model: The first model; afterwards it holds the last one.
        num_clients: How many there are: nodes whose "partition-id" is 0 to `num_clients - 1`.
        algorithm: Both sides' rule.
        local: What a client does in a round; five steps of SGD if left out.
        participation: Who takes part in which round, drawn from the seed; everybody if left out. For an algorithm that
            does not wait: who may begin, if they are not at work.
        uplink: How the clients' vectors travel; None sends them as they are.
        exclude: Names of tensors that are not averaged, see `distopt.federated.Layout`.
        seed: Of everything random, the clients' batches included.
        connect_s: How long to wait for the nodes, seconds.
        poll_s: Between two looks at what has come, seconds.
        folder: Where the server keeps tables of one vector per client, in files; in memory if left out.
        checkpoint: A file that holds the run's state, written beside and renamed.
        checkpoint_every: In rounds; 0 for never.
        progress: Called after each round with its row of the history.
        stop_at_epsilon: See `distopt.federated.Simulation`.

    Raises:
        ConfigError: A value breaks its rule, or does not fit the others.
        CompatibilityError: Flower cannot run the algorithm, or carry the model.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        num_clients: int,
        algorithm: FederatedAlgorithm,
        local: LocalTraining | None = None,
        participation: Participation | None = None,
        uplink: UplinkCompression | None = None,
        exclude: tuple[str, ...] = (),
        seed: int = 0,
        connect_s: float = 120.0,
        poll_s: float = 0.1,
        folder: str | os.PathLike[str] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 0,
        progress: Callable[[Mapping[str, Any]], None] | None = None,
        stop_at_epsilon: float | None = None,
    ) -> None:
        check_count("num_clients", num_clients, low=1, remedy="give how many nodes there are")
        for name, seconds in (("connect_s", connect_s), ("poll_s", poll_s)):
            check_number(name, seconds, rule="a number of seconds above 0", remedy="leave it out", low=0.0, high=1e9)
        check_settings(evaluate_every=1, checkpoint=checkpoint, checkpoint_every=checkpoint_every)
        check_kinds(
            ("model", model, nn.Module),
            ("algorithm", algorithm, FederatedAlgorithm),
            ("local", local, LocalTraining | None),
            ("participation", participation, Participation | None),
            ("uplink", uplink, UplinkCompression | None),
        )
        self.model, self.layout = model, Layout(model, exclude)
        _check_dtype(self.layout)
        facts = JobFacts(
            model=model,
            layout=self.layout,
            num_clients=num_clients,
            local=local,
            participation=participation,
            uplink=uplink,
            checkpoint_every=checkpoint_every,
            stop_at_epsilon=stop_at_epsilon,
        )
        check_job(algorithm, facts)
        self._num_clients = num_clients
        job = Job(
            algorithm=algorithm, local=local or LocalTraining(steps=5), uplink=uplink, exclude=tuple(exclude), seed=seed
        )
        self._cohort = FlowerCohort(
            job=job,
            model=model,
            layout=self.layout,
            num_clients=num_clients,
            participation=participation or Everybody(),
            connect_s=connect_s,
            poll_s=poll_s,
        )
        self._files: dict[str, Any] = {
            "folder": folder,
            "checkpoint": checkpoint,
            "checkpoint_every": checkpoint_every,
            "stop_at_epsilon": stop_at_epsilon,
        }
        self._user_progress = progress
        self._result = Result()
        self._evaluate_fn: EvaluateFn | None = None
        self._rounds = self._make_rounds()

    @property
    def algorithm(self) -> FederatedAlgorithm:
        """Both sides' rule."""
        return self._cohort.job.algorithm

    @property
    def history(self) -> History:
        """Of all rounds that are done, as `distopt.federated.Simulation` writes it."""
        return self._rounds.history

    @property
    def round(self) -> int:
        """How many rounds are done."""
        return self._rounds.round

    @property
    def refused(self) -> Mapping[str, int]:
        """How many replies did not count, by reason."""
        return self._rounds.refused

    @property
    def lost(self) -> Mapping[str, int]:
        """How many clients have not answered, by reason."""
        return dict(self._cohort.lost)

    def resume(self) -> bool:
        """Takes the checkpoint back before `start`, if there is one; whether there was.

        Raises:
            StateMismatchError: It belongs to another run, or is damaged.
        """
        return self._rounds.resume()

    def save(self) -> None:
        """Writes the checkpoint."""
        self._rounds.save()

    def summary(self) -> None:
        """Logs what is going to run."""
        job = self._cohort.job
        _log.info("\t├──> %s", job.algorithm.to_dict())
        _log.info(
            "\t├──> Clients: %d, of which take part: %s", self._num_clients, self._cohort.described["participation"]
        )
        _log.info("\t├──> %s", job.local.to_dict())
        _log.info("\t└──> Averaged: %d tensors, %d elements", len(self.layout.names), self.layout.num_elements)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Goes on until `num_rounds` rounds are done, those of a checkpoint included.

        Args:
            grid: Of the server app.
            initial_arrays: The first model as Flower's record of its state_dict; the strategy's own if left out.
            num_rounds: In all.
            timeout: After so many seconds nobody waits for a client's answer: a round's deadline.
            train_config: Travels with each broadcast under "config", for the nodes' mods.
            evaluate_config: Must be left out: nodes are not asked to evaluate.
            evaluate_fn: `evaluate_fn(round, arrays)` gives numbers, after each round, and before the first.

        Returns:
            The last model's state_dict, what was evaluated, and of each round how many took part and what was sent.

        Raises:
            ConfigError: More rounds are done already, `evaluate_fn` does not give numbers, or the arrays are not those
                of the model.
            PeerLostError: Nodes are missing at the start, or all have gone.
            CompatibilityError: A node cannot take part in this job.
            StateMismatchError: A node has lost what it must have kept for the checkpoint to go on from.
        """
        if evaluate_config is not None:
            raise ConfigError(
                f"evaluate_config must be left out, got {evaluate_config}; nodes are not asked to evaluate"
            )
        check_number("timeout", timeout, rule="a number of seconds above 0", remedy="use 3600", low=0.0, high=1e9)
        self._begin(initial_arrays, evaluate_fn)
        self.summary()
        self._connect(grid, timeout, train_config)
        self._rounds.run(num_rounds)
        for row in self.history:
            self._note(row)
        self._result.arrays = self._arrays()
        return self._result

    # -- for strategies around this one --------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The messages of a round of a synchronous algorithm.

        Raises:
            CompatibilityError: The algorithm does not wait for everybody; `start` runs it.
        """
        if not isinstance(self.algorithm.pacing, Synchronous):
            raise CompatibilityError(
                f"a strategy around another needs a synchronous algorithm, got {self.algorithm.name!r}; call start of "
                "FederatedStrategy itself"
            )
        if server_round == 1:
            self._begin(arrays, None)
            self._connect(grid, 3600, config)
            self._cohort.begin(self.round)
        if self._rounds.is_spent():
            return []  # and `aggregate_train` leaves the model as it is
        asked = self._cohort.ask(self._rounds.broadcast)
        self._asked = [(message, work) for work, message in asked]
        return [message for _, message in asked]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next model, of the answers to what `configure_train` has given."""
        if self._rounds.is_spent():
            return self._arrays(), None
        came = {reply.metadata.reply_to_message_id: reply for reply in replies}
        ended: list[Answer[Work]] = []
        for message, work in self._asked:
            reply = came.get(message.metadata.message_id)
            if reply is None or reply.has_error():
                ended.append(Answer(work, None, "no answer" if reply is None else reply.error.reason))
            else:
                ended.append(Answer(work, reply))
        self._rounds.end_round(self._cohort.read([work.client for _, work in self._asked], ended), last=True)
        row = self.history.rows[-1]
        return self._arrays(), _counts(row)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nodes are not asked to evaluate."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nodes are not asked to evaluate."""
        return None

    # -- inside --------------------------------------------------------------------------------------------------------

    def _make_rounds(self) -> Rounds:
        return Rounds(
            model=self.model,
            layout=self.layout,
            algorithm=self.algorithm,
            cohort=self._cohort,
            num_clients=self._num_clients,
            evaluate=self._evaluate,
            progress=self._progress,
            **self._files,
        )

    def _begin(self, arrays: ArrayRecord | None, evaluate_fn: EvaluateFn | None) -> None:
        self._evaluate_fn = evaluate_fn
        if self.round == 0:
            if arrays is not None:
                self._take(arrays)
            self._rounds = self._make_rounds()

    def _take(self, arrays: ArrayRecord) -> None:
        """Puts the initial arrays into the model."""
        given, own = from_arrays(arrays), self.model.state_dict()
        if differs := difference({"model": _described(own)}, {"model": _described(given)}, "initial_arrays"):
            raise ConfigError(differs)
        self.model.load_state_dict(given)

    def _connect(self, grid: Grid, timeout_s: float, config: ConfigRecord | None) -> None:
        job = self._cohort.job
        remember = self.history.participation() if kept_names(job.algorithm, job.uplink) else ()
        self._cohort.connect(grid, timeout_s=timeout_s, config=config, remember=remember)

    def _arrays(self) -> ArrayRecord:
        self.layout.write(self.model, self._rounds.state.model)
        return to_arrays(self.model.state_dict())

    def _evaluate(self, model: nn.Module) -> Mapping[str, float]:
        if self._evaluate_fn is None:
            return {}
        found = self._evaluate_fn(self.round, to_arrays(model.state_dict()))
        if found is None:
            return {}
        self._result.evaluate_metrics_serverapp[self.round] = found
        return {name: value for name, value in found.items() if not isinstance(value, list)}

    def _progress(self, row: Mapping[str, Any]) -> None:
        found = {name: value for name, value in row.items() if name not in (*_COUNTS, "round")}
        _log.info(
            "[ROUND %d] %d clients took part, %d replies refused %s", row["round"], len(row["participants"]),
            row["refused"], found or "",
        )  # fmt: skip
        if self._user_progress is not None:
            self._user_progress(row)

    def _note(self, row: Mapping[str, Any]) -> None:
        self._result.train_metrics_clientapp[row["round"]] = _counts(row)


def _counts(row: Mapping[str, Any]) -> MetricRecord:
    return MetricRecord(
        {name: len(value) if isinstance(value, list) else value for name, value in row.items() if name in _COUNTS}
    )


def _described(state: Mapping[str, torch.Tensor]) -> list[str]:
    return [f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in state.items()]


def _check_dtype(layout: Layout) -> None:
    try:
        torch.empty(0, dtype=layout.dtype).numpy()
    except TypeError as error:
        raise CompatibilityError(
            f"what is averaged must have a dtype that numpy has, got {layout.dtype}; convert the model to float32, or "
            "run it with distopt.federated.Simulation"
        ) from error

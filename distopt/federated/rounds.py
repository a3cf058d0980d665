"""The rounds of a federated job, whoever computes its clients: aggregation, history, evaluation and checkpoints.

A `Cohort` answers each round; `Simulation` has one in this process, `Service` one of other processes.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distopt.config import check_count
from distopt.errors import ConfigError, StateMismatchError, in_a_line
from distopt.federated.algorithm import FederatedAlgorithm
from distopt.federated.cohort import Answers, Cohort
from distopt.federated.history import History
from distopt.federated.layout import Layout
from distopt.federated.privacy.job import Budget
from distopt.federated.privacy.private_algorithm import COLUMNS as PRIVATE_COLUMNS
from distopt.federated.server import Server
from distopt.spans import span

_log = logging.getLogger("distopt")
Evaluate = Callable[[nn.Module], Mapping[str, float]]
Progress = Callable[[Mapping[str, Any]], None]
_FORMAT = 2
_REMEDIES = {
    "mode": "a run goes on in its mode, in which alone it is the same to the bit: start as many processes as then, or "
    "give the mode by name",
    "format": "this distopt cannot read it; go on with the one that wrote it",
}
_COLUMNS = {"round", "participants", "bytes_down", "bytes_up", "refused", "time_s", *PRIVATE_COLUMNS}


class Rounds:
    """One round after the other, until as many as asked for are done.

    Args:
        model: Its averaged part is the first model, and from the end of `run` on the last one.
        layout: Of the model.
        algorithm: The server's rule.
        cohort: Who answers.
        num_clients: How many clients are registered.
        evaluate: `evaluate(model)` gives named numbers.
        evaluate_every: In rounds; the last round always is.
        folder: Where tables of one vector per client lie in files; in memory if left out.
        checkpoint: A file that holds the run's state, written beside and renamed.
        checkpoint_every: In rounds; 0 for never.
        progress: Called after each round with its row.
        stop_at_epsilon: Of a private algorithm: the run ends before a round that would pass it.

    Attributes:
        history: Of all rounds, those of a checkpoint included.
        state: Of the server.
        broadcast: What the clients of the coming round are sent.

    Raises:
        ConfigError: A value breaks its rule, or does not fit the others.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        layout: Layout,
        algorithm: FederatedAlgorithm,
        cohort: Cohort,
        num_clients: int,
        evaluate: Evaluate | None = None,
        evaluate_every: int = 1,
        folder: str | os.PathLike[str] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 0,
        progress: Progress | None = None,
        stop_at_epsilon: float | None = None,
    ) -> None:
        check_settings(evaluate_every=evaluate_every, checkpoint=checkpoint, checkpoint_every=checkpoint_every)
        self.history = History()
        self._model, self._layout, self._algorithm, self._cohort = model, layout, algorithm, cohort
        self._num_clients = num_clients
        self._evaluate, self._evaluate_every = evaluate, evaluate_every
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        self._checkpoint_every = checkpoint_every
        self._progress = progress
        self._warned = False
        self._begun = False
        self._said_that_it_is_spent = False
        self._budget = Budget(algorithm, stop_at_epsilon)
        self.server = Server(algorithm, layout.num_trained, folder=folder)
        self.state = self.server.begin(layout.read(model), num_clients)
        self._budget.share_secrets(self.state.memory, cohort.exchange.said_by_leader)
        self.broadcast = self.server.broadcast(self.state)
        self._check_ranks()

    @property
    def refused(self) -> Mapping[str, int]:
        """How many replies did not count, by reason."""
        return dict(self.state.refused)

    @property
    def round(self) -> int:
        """How many rounds are done."""
        return self.state.version

    def run(self, rounds: int) -> History:
        """Goes on until `rounds` rounds are done, those of a checkpoint included; the history of all of them.

        A private run ends earlier if the next round would pass its epsilon.

        Raises:
            ConfigError: More rounds are done already, or `evaluate` does not give numbers.
        """
        check_count(
            "rounds", rounds, low=self.round, remedy="give how many rounds in all, those that are done included"
        )
        if not self._begun:
            self._begun = True
            self._cohort.begin(self.round)  # first: whoever waits for it shall not wait for an evaluation
        if self._evaluate is not None and self.round == 0 < rounds:
            self._cohort.exchange.said_by_leader(self._evaluated)
        while self.round < rounds:
            if self.is_spent():
                break
            self.end_round(self._cohort.answers(self.broadcast), last=self.round + 1 == rounds)
        self._layout.write(self._model, self.state.model)
        return self.history

    def is_spent(self) -> bool:
        """Whether the next round would pass a private run's epsilon; then the log says so, and it must not begin."""
        spent = self._budget.is_spent(self.state.memory)
        if spent and not self._said_that_it_is_spent and self._cohort.exchange.leads:
            self._said_that_it_is_spent = True
            self._budget.say_that_it_is_spent(self.round + 1, self.state.memory)
        return spent

    def end_round(self, came: Answers, *, last: bool) -> None:
        """Makes the next model of what was answered; for hosts that have a loop of their own in place of `run`."""
        row = self._aggregated(came, last=last)
        self.history.append(row)
        if self._checkpoint_every and self.round % self._checkpoint_every == 0:
            self.save()
        if self._progress is not None and self._cohort.exchange.leads:
            self._progress(row)

    def _aggregated(self, came: Answers, *, last: bool) -> dict[str, Any]:
        number, before = self.round, self.state.refused.copy()
        down = self.broadcast.num_bytes
        self.state.refused += came.refused
        heard = self.state.refused.copy()
        with span("federated", "aggregate"):
            self.state, self.broadcast = self.server.step(self.state, came.replies, self._cohort.exchange)
        refused = self.state.refused - before
        row: dict[str, Any] = {
            "round": number + 1,
            "participants": came.participants,
            "bytes_down": down * len(came.started),
            "bytes_up": sum(reply.num_bytes for reply in came.replies),
            "refused": refused.total(),
        }
        if (seconds := self._cohort.time_s) is not None:
            row["time_s"] = seconds
        row.update(self._budget.columns(self.state.memory))
        last = last or self._budget.is_spent(self.state.memory)
        if self._evaluate is not None and (last or self.round % self._evaluate_every == 0):
            row.update(self._cohort.exchange.said_by_leader(self._evaluated))
        if came.replies and (self.state.refused - heard).total() == len(came.replies) and not self._warned:
            self._warned = True
            _log.warning(
                "no reply of round %d counts (%s), and the model stays where it is; a smaller lr or max_norm may help",
                number + 1, ", ".join(f"{count} {why}" for why, count in sorted(refused.items())),
            )  # fmt: skip
        return row

    @torch.no_grad()
    def _evaluated(self) -> Mapping[str, float]:
        assert self._evaluate is not None
        self._layout.write(self._model, self.state.model)
        self._model.eval()
        with span("federated", "evaluate"):
            given = self._evaluate(self._model)
        try:
            found = {str(name): float(value) for name, value in given.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"evaluate must return numbers by name, got {given!r:.200} ({error}); return {{'accuracy': 0.9}}, say"
            ) from error
        if taken := sorted(found.keys() & _COLUMNS):
            raise ConfigError(f"evaluate must use other names than the history's own, got {taken[0]!r}; rename it")
        return found

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The whole run: tensors and plain values."""
        return {
            **self._configured(),
            **self._cohort.state_dict(),
            "server": self.state.state_dict(),
            "own": {name: tensor.clone() for name, tensor in self._layout.others(self._model).items()},
            "history": self.history.rows,
        }

    def _configured(self) -> dict[str, Any]:
        """What a checkpoint's run and this one must agree in."""
        return {
            "format": _FORMAT,
            "algorithm": self._algorithm.to_dict(),
            "model": self._layout.description,
            **self._cohort.described,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a run of the same configuration was.

        Raises:
            StateMismatchError: The state belongs to another algorithm, seed, execution mode, data or model.
        """
        for name, own in self._configured().items():
            saved = state.get(name)
            if isinstance(own, list) and isinstance(saved, list) and len(own) == len(saved):
                own, saved = next(((o, s) for o, s in zip(own, saved, strict=True) if o != s), (own, saved))
            if saved != own:
                remedy = _REMEDIES.get(name, "resume with the configuration of the run's start")
                raise StateMismatchError(
                    f"the run of the checkpoint and this one must agree in {name}, got {saved!r:.500} then and "
                    f"{own!r:.500} now; {remedy}"
                )
        self.state = self.server.load(state["server"], self._num_clients)
        self._budget.share_secrets(self.state.memory, self._cohort.exchange.said_by_leader)
        self.broadcast = self.server.broadcast(self.state)
        self._cohort.load_state_dict(state)
        for name, tensor in self._layout.others(self._model).items():
            tensor.copy_(state["own"][name])
        self.history = History(state["history"])
        self._begun = False

    def save(self) -> None:
        """Writes the checkpoint; with several ranks they must all call it, and the first one writes."""
        if self._checkpoint is None:
            raise ConfigError("there must be a file to save to, got none; give checkpoint='run.pt', say")
        self._cohort.saving(self.round)
        state = self.state_dict()
        if self._cohort.exchange.leads:
            self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._checkpoint.with_name(self._checkpoint.name + ".tmp")
            torch.save(state, temporary)
            temporary.replace(self._checkpoint)
        self._cohort.saved(self.round)

    def resume(self) -> bool:
        """Takes the checkpoint back, if there is one; whether there was. Several ranks must all see the file.

        Raises:
            StateMismatchError: It belongs to another run, or is damaged.
        """
        there = self._checkpoint is not None and self._checkpoint.exists()
        self._cohort.exchange.check_same({"whether there is a checkpoint": str(there)})
        if self._checkpoint is None or not there:
            return False
        try:
            state = torch.load(self._checkpoint, weights_only=True)
        except Exception as error:  # torch.load raises whatever the damage leads to
            raise StateMismatchError(
                f"{self._checkpoint} must be a checkpoint, got {in_a_line(error)}; it "
                "is damaged or something else: remove it to begin anew"
            ) from error
        if not isinstance(state, dict):
            raise StateMismatchError(f"{self._checkpoint} must be a checkpoint of a run, got a {type(state).__name__}")
        self.load_state_dict(state)
        self._check_ranks()
        return True

    def _check_ranks(self) -> None:
        facts = {name: repr(value) for name, value in self._configured().items()}
        digest = hashlib.blake2b(digest_size=16)
        for tensor in (self.state.model, *self._layout.others(self._model).values()):
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        facts["the model"] = digest.hexdigest()
        facts["the round"] = str(self.round)
        self._cohort.exchange.check_same(facts)


def check_settings(*, evaluate_every: int, checkpoint: str | os.PathLike[str] | None, checkpoint_every: int) -> None:
    """Raises `ConfigError` unless evaluations and checkpoints can be made as these say."""
    check_count("evaluate_every", evaluate_every, low=1, remedy="use 1 for every round")
    check_count("checkpoint_every", checkpoint_every, low=0, remedy="use 0 for never")
    if checkpoint_every and checkpoint is None:
        raise ConfigError(f"checkpoint_every={checkpoint_every} needs a file; give checkpoint='run.pt', say")

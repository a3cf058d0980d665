"""Federated training in one process: the server and all clients, one round after the other.

The same seed gives the same history to the bit, within an execution mode. Everything random comes from the seed, the
round and the client, or from the models of participation and delays, whose states a checkpoint holds.

Time is virtual: with `delays`, each client's work takes as long as they say, and the history has "time_s".
"""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import torch
from torch import Tensor, nn

from distopt.config import check_count
from distopt.errors import ConfigError, StateMismatchError, in_a_line
from distopt.federated.algorithm import FederatedAlgorithm
from distopt.federated.data import ClientData
from distopt.federated.delays import Delays
from distopt.federated.execution import make_trainer
from distopt.federated.functional import Loss
from distopt.federated.history import History
from distopt.federated.layout import Layout
from distopt.federated.local_training import LocalTraining
from distopt.federated.messages import Broadcast, Reply
from distopt.federated.participation import Everybody, Participation
from distopt.federated.schedule import Round, make_schedule
from distopt.federated.server import Server
from distopt.federated.uplink import UplinkCompression

_log = logging.getLogger("distopt")
Evaluate = Callable[[nn.Module], Mapping[str, float]]
_FORMAT = 2
_REMEDIES = {
    "mode": "a run goes on in its mode, in which alone it is the same to the bit: start as many processes as then, or "
    "give the mode by name",
    "format": "this distopt cannot read it; go on with the one that wrote it",
}
_COLUMNS = {"round", "participants", "bytes_down", "bytes_up", "refused", "time_s"}


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
        progress: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        check_count("evaluate_every", evaluate_every, low=1, remedy="use 1 for every round")
        check_count("checkpoint_every", checkpoint_every, low=0, remedy="use 0 for never")
        for name, value, kind in (
            ("clients", clients, ClientData),
            ("algorithm", algorithm, FederatedAlgorithm),
            ("local", local, LocalTraining | None),
            ("participation", participation, Participation | None),
            ("delays", delays, Delays | None),
            ("uplink", uplink, UplinkCompression | None),
        ):
            if not isinstance(value, kind):
                raise ConfigError(f"{name} must be of {_kind(kind)}, got {value!r:.200}; make an object of that class")
        if checkpoint_every and checkpoint is None:
            raise ConfigError(f"checkpoint_every={checkpoint_every} needs a file; give checkpoint='run.pt', say")
        self.model, self.clients, self.algorithm = model, clients, algorithm
        self.local = local or LocalTraining(steps=5)
        self.layout = Layout(model, exclude)
        self.history = History()
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
        self._schedule = make_schedule(
            algorithm.pacing,
            (participation or Everybody()).begin(count, seed),
            None if delays is None else delays.begin(count, seed),
            seed,
        )
        self._server = Server(algorithm, self.layout.num_trained, folder=folder)
        self._state = self._server.begin(self.layout.read(model), count)
        self._broadcast = self._server.broadcast(self._state)
        self._at_work: dict[int, Broadcast] = {}  # by version, what somebody still has to answer
        self._evaluate, self._evaluate_every = evaluate, evaluate_every
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        self._checkpoint_every = checkpoint_every
        self._progress = progress
        self._seed = seed
        self._warned = False
        self._described = _described(participation), _described(delays)
        self._check_ranks()

    @property
    def mode(self) -> str:
        """How clients are computed."""
        return self._trainer.mode

    @property
    def why_mode(self) -> str:
        """Why they are computed so."""
        return self._trainer.why

    @property
    def refused(self) -> Mapping[str, int]:
        """How many replies did not count, by reason."""
        return dict(self._state.refused)

    @property
    def round(self) -> int:
        """How many rounds are done."""
        return self._state.version

    @property
    def time_s(self) -> float | None:
        """Virtual seconds that have passed; None without delays."""
        return self._schedule.time_s

    def run(self, rounds: int) -> History:
        """Trains until `rounds` rounds are done, those of a checkpoint included; the history of all of them.

        Raises:
            ConfigError: More rounds are done already, or `evaluate` does not give numbers.
        """
        check_count(
            "rounds", rounds, low=self.round, remedy="give how many rounds in all, those that are done included"
        )
        if self._evaluate is not None and self.round == 0 < rounds:
            self._trainer.exchange.said_by_leader(self._evaluated)
        while self.round < rounds:
            row = self._one_round(last=self.round + 1 == rounds)
            self.history.append(row)
            if self._checkpoint_every and self.round % self._checkpoint_every == 0:
                self.save()
            if self._progress is not None and self._trainer.exchange.leads:
                self._progress(row)
        self.layout.write(self.model, self._state.model)
        return self.history

    def _one_round(self, *, last: bool) -> dict[str, Any]:
        number, before = self.round, self._state.refused.copy()
        planned = self._schedule.next_round(number)
        down = self._broadcast.num_bytes * len(planned.started)
        replies = self._replies(planned)
        self._state, self._broadcast = self._server.step(self._state, replies, self._trainer.exchange)
        refused = self._state.refused - before
        row: dict[str, Any] = {
            "round": number + 1,
            "participants": sorted(client for client, _ in planned.answers),
            "bytes_down": down,
            "bytes_up": sum(reply.num_bytes for reply in replies),
            "refused": refused.total(),
        }
        if (seconds := self.time_s) is not None:
            row["time_s"] = seconds
        if self._evaluate is not None and (last or self.round % self._evaluate_every == 0):
            row.update(self._trainer.exchange.said_by_leader(self._evaluated))
        if replies and refused.total() == len(replies) and not self._warned:
            self._warned = True
            _log.warning(
                "no reply of round %d counts (%s), and the model stays where it is; a smaller lr or max_norm may help",
                number + 1, ", ".join(f"{count} {why}" for why, count in sorted(refused.items())),
            )  # fmt: skip
        return row

    def _replies(self, planned: Round) -> list[Reply]:
        self._at_work[self._broadcast.version] = self._broadcast
        replies = []
        for version, broadcast in self._at_work.items():
            clients = sorted(client for client, answered in planned.answers if answered == version)
            if clients:
                replies += self._trainer.train(broadcast, clients)
        wanted = self._schedule.versions_at_work
        self._at_work = {version: sent for version, sent in self._at_work.items() if version in wanted}
        return replies

    @torch.no_grad()
    def _evaluated(self) -> Mapping[str, float]:
        assert self._evaluate is not None
        self.layout.write(self.model, self._state.model)
        self.model.eval()
        given = self._evaluate(self.model)
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
            "server": self._state.state_dict(),
            "schedule": self._schedule.state_dict(),
            "at_work": {v: {"model": sent.model, "extras": dict(sent.extras)} for v, sent in self._at_work.items()},
            "clients": self._trainer.state_dict(),
            "own": {name: tensor.clone() for name, tensor in self.layout.others(self.model).items()},
            "history": self.history.rows,
        }

    def _configured(self) -> dict[str, Any]:
        """What a checkpoint's run and this one must agree in."""
        return {
            "format": _FORMAT,
            "algorithm": self.algorithm.to_dict(),
            "local": self.local.to_dict(),
            "seed": self._seed,
            "uplink": None if self._trainer.uplink is None else self._trainer.uplink.to_dict(),
            "model": self.layout.description,
            "data": self.clients.fingerprint,
            "mode": self.mode,
            "participation": self._described[0],
            "delays": self._described[1],
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
        self._state = self._server.load(state["server"], self.clients.num_clients)
        self._broadcast = self._server.broadcast(self._state)
        self._schedule.load_state_dict(state["schedule"])
        self._at_work = {version: Broadcast(version=version, **sent) for version, sent in state["at_work"].items()}
        self._trainer.load_state_dict(state["clients"])
        for name, tensor in self.layout.others(self.model).items():
            tensor.copy_(state["own"][name])
        self.history = History(state["history"])

    def save(self) -> None:
        """Writes the checkpoint; with several ranks they must all call it, and the first one writes."""
        if self._checkpoint is None:
            raise ConfigError("there must be a file to save to, got none; give checkpoint='run.pt', say")
        state = self.state_dict()
        if self._trainer.exchange.leads:
            self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._checkpoint.with_name(self._checkpoint.name + ".tmp")
            torch.save(state, temporary)
            temporary.replace(self._checkpoint)

    def resume(self) -> bool:
        """Takes the checkpoint back, if there is one; whether there was. Several ranks must all see the file.

        Raises:
            StateMismatchError: It belongs to another run, or is damaged.
        """
        there = self._checkpoint is not None and self._checkpoint.exists()
        self._trainer.exchange.check_same({"whether there is a checkpoint": str(there)})
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
        for tensor in (self._state.model, *self.layout.others(self.model).values()):
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        facts["the model"] = digest.hexdigest()
        facts["the round"] = str(self.round)
        self._trainer.exchange.check_same(facts)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """The mean over (inputs, labels)."""
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)


def _described(part: Participation | Delays | None) -> Mapping[str, Any] | None:
    """Its settings, but for where a trace lies."""
    return None if part is None else {key: value for key, value in part.to_dict().items() if key != "path"}


def _kind(kind: Any) -> str:
    return " or ".join("None" if each is NoneType else each.__name__ for each in get_args(kind) or (kind,))

"""Federated training in one process: the server and all clients, one round after the other.

The same seed gives the same history to the bit. Everything random comes from the seed, the round and the client, or
from the participation model, whose state a checkpoint holds.

Limits: loop mode; the clients of a round are trained one after the other, on one model object.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distopt.config import check_count
from distopt.errors import ConfigError, StateMismatchError
from distopt.federated.algorithm import FederatedAlgorithm
from distopt.federated.client import Client, Loss
from distopt.federated.client_vectors import ClientVectors
from distopt.federated.data import ClientData
from distopt.federated.history import History
from distopt.federated.layout import Layout
from distopt.federated.local_training import LocalTraining
from distopt.federated.messages import Reply
from distopt.federated.participation import Everybody, Participation
from distopt.federated.randomness import stream, stream_key
from distopt.federated.server import Server

Evaluate = Callable[[nn.Module], Mapping[str, float]]
_FORMAT = 1


class Simulation:
    """A federated job.

    Args:
        model: Its initial parameters are the first model; afterwards it holds the last one.
        clients: Their data.
        algorithm: Both sides' rule.
        local: What a client does in a round.
        loss: `loss(model, batch)`, the mean over a batch; cross-entropy of (inputs, labels) if left out.
        participation: Who takes part in which round; everybody if left out.
        evaluate: `evaluate(model)` gives named values; called in evaluation mode, without gradients.
        evaluate_every: In rounds; the last round always is.
        exclude: Names of tensors that are not averaged, see `Layout`.
        seed: Of everything random.
        checkpoint: A file that holds the run's state, written beside and renamed.
        checkpoint_every: In rounds; 0 for never.
        progress: Called after each round with its row.
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
        evaluate: Evaluate | None = None,
        evaluate_every: int = 1,
        exclude: tuple[str, ...] = (),
        seed: int = 0,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 0,
        progress: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        check_count("evaluate_every", evaluate_every, low=1, remedy="use 1 for every round")
        check_count("checkpoint_every", checkpoint_every, low=0, remedy="use 0 for never")
        if checkpoint_every and checkpoint is None:
            raise ConfigError(f"checkpoint_every={checkpoint_every} needs a file; give checkpoint='run.pt', say")
        self.model, self.clients, self.algorithm = model, clients, algorithm
        self.local = local or LocalTraining(steps=5)
        self.layout = Layout(model, exclude)
        self.history = History()
        self._loss = loss or _cross_entropy
        self._server = Server(algorithm, self.layout.num_trained)
        self._state = self._server.begin(self.layout.read(model), clients.num_clients)
        self._broadcast = self._server.broadcast(self._state)
        self._participation = (participation or Everybody()).begin(clients.num_clients, seed)
        self._kept = {name: ClientVectors(self.layout.num_trained, self.layout.dtype) for name in algorithm.kept}
        self._evaluate, self._evaluate_every = evaluate, evaluate_every
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        self._checkpoint_every = checkpoint_every
        self._progress = progress
        self._batches_key = stream_key(seed, "batches")
        self._torch_key = stream_key(seed, "torch")
        self._seed = seed

    @property
    def round(self) -> int:
        """How many rounds are done."""
        return self._state.version

    def run(self, rounds: int) -> History:
        """Trains until `rounds` rounds are done, those of a checkpoint included; the history of all of them."""
        check_count("rounds", rounds, low=0, remedy="give how many rounds in all")
        while self.round < rounds:
            row = self._one_round(last=self.round + 1 == rounds)
            self.history.append(row)
            if self._checkpoint_every and self.round % self._checkpoint_every == 0:
                self.save()
            if self._progress is not None:
                self._progress(row)
        self.layout.write(self.model, self._state.model)
        return self.history

    def _one_round(self, *, last: bool) -> dict[str, Any]:
        number, refused = self.round, sum(self._state.refused.values())
        ids = [int(client) for client in self._participation.next_round()]
        how = Client(
            algorithm=self.algorithm,
            loss=self._loss,
            optimizer=lambda parameters: self.local.make(parameters, number),
            max_norm=self.local.max_norm,
        )
        replies = [self._train(how, client) for client in ids]
        down = self._broadcast.num_bytes * len(ids)
        self._state, self._broadcast = self._server.step(self._state, replies)
        row: dict[str, Any] = {
            "round": number + 1,
            "participants": ids,
            "bytes_down": down,
            "bytes_up": sum(reply.num_bytes for reply in replies),
            "refused": sum(self._state.refused.values()) - refused,
        }
        if self._evaluate is not None and (last or self.round % self._evaluate_every == 0):
            row.update(self._evaluated(self._evaluate))
        return row

    def _train(self, how: Client, client: int) -> Reply:
        part = self.clients.parts[client]
        indices = self.local.batches(part, self._batches_key, self.round, client)
        seed = int(stream(self._torch_key, self.round, client).integers(2**63))
        self.model.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # of dropout
            kept, reply = how.step(
                self.model,
                self.layout,
                {name: table.get(client) for name, table in self._kept.items()},
                self._broadcast,
                (self.clients.batch(each) for each in indices),
                client=client,
                num_samples=len(part),
            )
        for name, vector in kept.items():
            self._kept[name].set(client, vector)
        return reply

    @torch.no_grad()
    def _evaluated(self, evaluate: Evaluate) -> Mapping[str, float]:
        self.layout.write(self.model, self._state.model)
        self.model.eval()
        return {name: float(value) for name, value in evaluate(self.model).items()}

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The whole run: tensors and plain values."""
        averaged = set(self.layout.names)
        own = {name: t for name, t in self.model.state_dict().items() if name not in averaged}
        return {
            "format": _FORMAT,
            "algorithm": self.algorithm.to_dict(),
            "local": self.local.to_dict(),
            "seed": self._seed,
            "server": self._state.state_dict(),
            "participation": self._participation.state_dict(),
            "kept": {name: table.state_dict() for name, table in self._kept.items()},
            "own": own,
            "history": self.history.rows,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a run of the same configuration was.

        Raises:
            StateMismatchError: The state belongs to another algorithm, seed or model.
        """
        configured = {"algorithm": self.algorithm.to_dict(), "local": self.local.to_dict(), "seed": self._seed}
        for name, own in {"format": _FORMAT, **configured}.items():
            if state.get(name) != own:
                raise StateMismatchError(
                    f"{name} of the checkpoint must be {own!r}, got {state.get(name)!r}; resume with the configuration "
                    "of the run's start"
                )
        self._state = self._server.load(state["server"], self.clients.num_clients)
        self._broadcast = self._server.broadcast(self._state)
        self._participation.load_state_dict(state["participation"])
        for name, table in self._kept.items():
            table.load_state_dict(state["kept"][name])
        self.model.load_state_dict(state["own"], strict=False)
        self.history = History(state["history"])

    def save(self) -> None:
        """Writes the checkpoint."""
        if self._checkpoint is None:
            raise ConfigError("there must be a file to save to, got none; give checkpoint='run.pt', say")
        temporary = self._checkpoint.with_name(self._checkpoint.name + ".tmp")
        torch.save(self.state_dict(), temporary)
        temporary.replace(self._checkpoint)

    def resume(self) -> bool:
        """Takes the checkpoint back, if there is one; whether there was.

        Raises:
            StateMismatchError: It belongs to another run.
        """
        if self._checkpoint is None or not self._checkpoint.exists():
            return False
        self.load_state_dict(torch.load(self._checkpoint, weights_only=True))
        return True


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)

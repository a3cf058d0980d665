"""The server's side of a round, around any algorithm: which replies count, and what they make of the model.

A reply that is not finite, comes twice, answers another version than the algorithm takes, says impossible numbers or
does not fit the model is refused and counted, and its client counts as not participating. Of two that both could count
it is the newer version, and of one version the first to come. Replies of no samples count for nothing, nor do fewer
replies than the algorithm needs. The order of arrival changes no bit. A round without replies leaves the model as it
is, and counters and schedules go on.

Elements behind the trained ones (`Layout`), BatchNorm's variance among them, become the mean of the replies' own,
weighted by samples; where the replies do not speak for everybody they go only part of the way.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distopt.config import check_count
from distopt.errors import ConfigError, StateMismatchError
from distopt.federated.algorithm import FederatedAlgorithm, LinearAlgorithm, WeightedSum
from distopt.federated.exchange import HERE, Exchange
from distopt.federated.memory import ServerMemory
from distopt.federated.messages import DELTA, REST, Broadcast, Reply
from distopt.ops import all_finite


@dataclass
class ServerState:
    """All that a server is between two rounds.

    Attributes:
        version: How many rounds have ended.
        model: The averaged part of the model; never changed in place.
        memory: Of the algorithm; changed by `Server.step`, so an older state of it is not kept.
        refused: Replies that did not count, by reason.
    """

    version: int
    model: Tensor
    memory: ServerMemory
    refused: Counter[str] = field(default_factory=Counter)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "version": self.version,
            "model": self.model,
            "memory": self.memory.state_dict(),
            "refused": dict(self.refused),
        }


class Server:
    """Rounds of one algorithm.

    Args:
        algorithm: What the replies make of the model.
        num_trained: d, how many of the model's elements are trained.
        folder: Where to keep the tables of one vector per client, in files; in memory if left out.
    """

    def __init__(
        self, algorithm: FederatedAlgorithm, num_trained: int, *, folder: str | os.PathLike[str] | None = None
    ) -> None:
        self.algorithm = algorithm
        self.num_trained = num_trained
        self._folder = folder

    def begin(self, model: Tensor, num_clients: int) -> ServerState:
        """The state before the first round.

        Raises:
            ConfigError: A value breaks its rule, or does not fit the algorithm.
        """
        check_count("num_clients", num_clients, low=1, remedy="register the clients first")
        if self.algorithm.fewest_replies > num_clients:
            raise ConfigError(
                f"there must be at least the {self.algorithm.fewest_replies} clients whose replies "
                f"{self.algorithm.name!r} needs, got {num_clients}; register more, or lower what it asks for"
            )
        if model.dim() != 1 or len(model) < self.num_trained:
            raise ConfigError(
                f"model must be a flat vector of at least {self.num_trained} elements, got shape {tuple(model.shape)}; "
                "use Layout.read"
            )
        memory = ServerMemory(
            self.num_trained,
            model.dtype,
            num_clients,
            vectors=self.algorithm.remembered,
            tables=self.algorithm.tables,
            folder=self._folder,
        )
        self.algorithm.begin(memory)
        return ServerState(0, model.clone(), memory)

    def load(self, state: dict[str, Any], num_clients: int) -> ServerState:
        """The state that `ServerState.state_dict` describes; clients that it has not seen join.

        Raises:
            StateMismatchError: It belongs to another model or algorithm, or to more clients.
        """
        if len(state["model"]) < self.num_trained:
            raise StateMismatchError(
                f"the model must have {self.num_trained} trained elements, got {len(state['model'])} in all; the "
                "checkpoint belongs to another model"
            )
        saved = int(state["memory"]["num_clients"])
        if num_clients < saved:
            raise StateMismatchError(
                f"there must be at least the {saved} clients of the checkpoint, got {num_clients}; those that are gone "
                "stay registered"
            )
        begun = self.begin(state["model"], saved)
        begun.memory.load_state_dict(state["memory"])
        loaded = ServerState(int(state["version"]), begun.model, begun.memory, Counter(state["refused"]))
        self.add_clients(loaded, num_clients - saved)
        return loaded

    def add_clients(self, state: ServerState, count: int) -> None:
        """So many clients join between two rounds, with the numbers after the last one.

        Raises:
            ConfigError: It is not an integer of at least 0, or the algorithm cannot know what it needs of them.
        """
        check_count("count", count, low=0, remedy="give how many clients join")
        self.algorithm.add_clients(state.memory, count)

    def broadcast(self, state: ServerState) -> Broadcast:
        """What the clients of the coming round are sent."""
        return Broadcast(version=state.version, model=state.model, extras=self.algorithm.extras(state.memory))

    def step(
        self, state: ServerState, replies: Sequence[Reply], exchange: Exchange = HERE
    ) -> tuple[ServerState, Broadcast]:
        """Ends a round: the state after it, and what the clients of the next one are sent.

        Args:
            state: Before it.
            replies: In any order, unless some are with other ranks: then by client.
            exchange: Who has the tensors of those that are without, see `Exchange`.
        """
        state.memory.version = state.version
        counted = self._counted(state, replies, exchange)
        participated = torch.zeros(state.memory.num_clients, dtype=torch.bool)
        participated[[reply.client for reply in counted]] = True
        model = state.model
        weighing = [reply for reply in counted if reply.num_samples > 0]
        if 0 < len(weighing) < self.algorithm.fewest_replies:
            state.refused["too few replies"] += len(weighing)
        elif weighing or not self.algorithm.fewest_replies:
            model = self._next_model(state, weighing, exchange)
        self.algorithm.tick(state.memory, participated)
        state = ServerState(state.version + 1, model, state.memory, state.refused)
        return state, self.broadcast(state)

    def _next_model(self, state: ServerState, replies: Sequence[Reply], exchange: Exchange) -> Tensor:
        algorithm, memory = self.algorithm, state.memory
        head, rest = state.model[: self.num_trained], state.model[self.num_trained :]
        weights = list(algorithm.weights(memory, replies))
        asked: Mapping[str, WeightedSum] = {}
        if isinstance(algorithm, LinearAlgorithm):
            asked = algorithm.sums(replies, weights)
        else:
            replies, exchange = exchange.complete(replies), HERE
        if rest.numel() and replies:
            total = sum(reply.num_samples for reply in replies)
            asked = {**asked, REST: WeightedSum(REST, [reply.num_samples / total for reply in replies])}
        sums = exchange.sums(asked, replies, {**dict.fromkeys(asked, head), REST: rest})
        if isinstance(algorithm, LinearAlgorithm):
            head = algorithm.move(memory, head, sums)
        else:
            head = algorithm.advance(memory, head, replies, weights)
        if REST in sums:
            rest = torch.lerp(rest, sums[REST], algorithm.trust_in_rest(weights))
        return torch.cat([head, rest])

    def _counted(self, state: ServerState, replies: Sequence[Reply], exchange: Exchange) -> list[Reply]:
        reasons = exchange.reasons(replies, lambda reply: self._why_not(state, reply))
        told = zip(replies, reasons, strict=True)
        counted: dict[int, Reply] = {}
        for reply, reason in sorted(told, key=lambda each: (each[0].client, -each[0].version)):
            if reason is None and reply.client in counted:
                reason = "duplicate"
            if reason is None:
                counted[reply.client] = reply
            else:
                state.refused[reason] += 1
        return list(counted.values())

    def _why_not(self, state: ServerState, reply: Reply) -> str | None:
        if not 0 <= reply.client < state.memory.num_clients:
            return "unknown client"
        if not self.algorithm.accepts(reply.version, state.version):
            return "late" if reply.version < state.version else "another version"
        if reply.num_samples < 0 or reply.num_steps < (reply.num_samples > 0):
            return "numbers"
        expected = dict.fromkeys((DELTA, *self.algorithm.sends), self.num_trained)
        if rest := len(state.model) - self.num_trained:
            expected[REST] = rest
        if {name: t.numel() for name, t in reply.tensors.items()} != expected:
            return "shape"
        if any(t.dim() != 1 for t in reply.tensors.values()):
            return "shape"
        if any((t.dtype, t.device) != (state.model.dtype, state.model.device) for t in reply.tensors.values()):
            return "dtype"
        if not all(all_finite(t.contiguous()) for t in reply.tensors.values()):
            return "not finite"
        return self.algorithm.why_not(reply)

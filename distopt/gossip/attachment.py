"""Gossip at work on one model: what `attach` returns, and what `detach` undoes."""

import atexit
import logging
import sys
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distopt.comm import end_quietly, raise_together
from distopt.comm.crew.assembly import Crew
from distopt.comm.crew.background import Background, streams_of
from distopt.comm.crew.exchange import Exchange
from distopt.comm.crew.introduction import address_here, group_to_begin, introduce
from distopt.errors import ConfigError, DistoptError, PeerLostError, StateMismatchError
from distopt.gossip.configuration import Gossip
from distopt.gossip.flat import group
from distopt.gossip.introduction import averaged_buffers, changes_gradients, facts
from distopt.gossip.mixing.rule import Surroundings
from distopt.gossip.participant import AtOnce, Participant
from distopt.gossip.ranks.rank_exchange import RankExchange
from distopt.replica import StillAll, trained
from distopt.step_clock import Scaler, StepClock

_log = logging.getLogger("distopt")
_FORMAT = 1
_CPU = torch.device("cpu")
_AT_WORK: "weakref.WeakSet[GossipAttachment]" = weakref.WeakSet()  # of this process


class GossipAttachment:
    """Made by `Gossip(...).attach(model, optimizer)`; see there for arguments and errors. Also a context manager.

    Attributes:
        algorithm: The configuration at work.
        process_group: The ranks that have begun; None for one that has joined later.
    """

    family: ClassVar = "gossip"

    def __init__(
        self,
        algorithm: Gossip,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scaler: Scaler | None,
        process_group: dist.ProcessGroup | None,
        interface: str | None,
        join: str | None,
    ) -> None:
        self.algorithm = algorithm
        self.process_group = None if join is not None else group_to_begin(process_group)
        self._optimizer = optimizer
        self._buffers = list(averaged_buffers(algorithm, model).values())
        num_ranks = None if join is not None else 1 if self.process_group is None else self.process_group.size()
        self._assembly = introduce(
            lambda: facts(
                algorithm, model, optimizer, has_scaler=scaler is not None, taken=_taken(), num_ranks=num_ranks
            ),
            self.process_group,
            interface or address_here(self.process_group, join),
            join,
            patience_s=algorithm.peer_timeout,
            grace_s=algorithm.grace,
        )
        self._vectors = group(trained(model, "gossip"))
        try:
            self._exchange = Exchange(self._assembly, self._regroup, is_new=join is not None)
            self._on_ranks = RankExchange(
                self._exchange, lambda members: self._among(members).topology, algorithm.peer_timeout
            )
            self._participant = Participant(
                algorithm,
                self._among(self._exchange.members),
                self._rows,
                [each.segments for each in self._vectors],
                self._on_ranks.perform,
                AtOnce if algorithm.exchange == "synchronous" else partial(Background, streams=streams_of(self._rows)),
            )
            self._exchange.begin()
        except BaseException:
            self._assembly.close(farewell=False)
            for each in self._vectors:
                each.release()
            raise
        self._exchanges = 0
        self._still_all = StillAll(model, optimizer)
        self._handles = []
        if changes_gradients(algorithm):
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
        self._clock = StepClock(optimizer, scaler, self._tick)
        self._model = model
        self._attached = True
        _AT_WORK.add(self)
        end_quietly()
        atexit.register(_close_at_exit, weakref.ref(self))
        _log.info(
            "gossip: %s on %s with %d ranks, %s; parameters are %s", algorithm.rule.name, algorithm.graphs.name,
            len(self._exchange.members), algorithm.exchange,
            "views of one vector" if all(each.are_views for each in self._vectors) else "copied for each exchange",
        )  # fmt: skip

    # -- the user's side ---------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """The "host:port" for `attach(..., join=)` of a process that comes later."""
        host, port = self._assembly.address
        return f"{host}:{port}"

    @property
    def place(self) -> tuple[int, int]:
        """Which of the ranks that take part now this one is, from 0, and how many they are: for names of files."""
        members = self._exchange.members
        return members.index(self._assembly.number), len(members)

    @property
    def rank(self) -> int:
        """The number of this process, which it keeps whoever else comes and goes."""
        return self._assembly.number

    @property
    def step(self) -> int:
        """Steps of the optimizer, those before a checkpoint included."""
        return self._participant.steps

    def stats(self) -> dict[str, Any]:
        """Numbers since attach, of this rank, without a collective.

        `steps` of the optimizer (those that a scaler skipped included), `exchanges`, `passed` (steps that found an
        asynchronous exchange still under way), `bytes_sent`, `bytes_dense` (the parameters in fp32, once for each
        exchange), `seconds_exchanging` (behind the computation where exchanges overlap), `members`, `lost` and `joined`
        ranks, `meetings`, `variance_ratio` (the least that the last average left of a tensor's variance; None without
        correction), `views` (whether parameters lie in one vector).
        """
        changes = self._exchange.changes
        return {
            "algorithm": self.algorithm.name,
            "mixing": self.algorithm.rule.name,
            "topology": self.algorithm.graphs.name,
            "steps": self._participant.steps,
            "exchanges": self._exchanges,
            "passed": self._participant.passed,
            "bytes_sent": self._on_ranks.bytes_sent,
            "bytes_dense": 4 * self._exchanges * sum(each.vector.numel() for each in self._vectors),
            "seconds_exchanging": changes.waiting_s,
            "members": list(self._exchange.members),
            "lost": sorted(changes.lost),
            "joined": sorted(changes.joined),
            "meetings": changes.meetings,
            "variance_ratio": self._participant.variance_ratio,
            "views": all(each.are_views for each in self._vectors),
        }

    @torch.no_grad()
    def consensus_distance(self) -> float:
        """Root of the mean over ranks of the squared distance of their models to the mean model. Collective.

        Of all trained parameters, in float64; flushes first.

        Raises:
            PeerLostError: Somebody has gone meanwhile; ask again.
        """
        self.flush()
        rows = torch.cat([row[0].detach().double().cpu() for row in self._rows])
        mean = rows.clone()
        self._exchange.add_up(mean)
        mean /= len(self._exchange.members)  # only now: who adds up may have met anew
        squares = (rows - mean).square().sum().view(1)
        self._exchange.add_up(squares)
        return float((squares / len(self._exchange.members)).sqrt())

    @torch.no_grad()
    def mean_state_dict(self) -> dict[str, Any]:
        """The model's `state_dict` with the mean over all ranks, to evaluate or to keep. Collective; flushes first.

        Of trained parameters, and of floating buffers unless each rank keeps its own; the rest is this rank's. The
        model stays as it is. The sums are float64.

        Raises:
            PeerLostError: Somebody has gone meanwhile; ask again.
        """
        self.flush()
        tensors = [*(p for each in self._vectors for p in each.parameters), *self._buffers]
        flat = torch.cat([tensor.detach().reshape(-1).double().cpu() for tensor in tensors])
        self._exchange.add_up(flat)
        flat /= len(self._exchange.members)
        parts = flat.split([tensor.numel() for tensor in tensors])
        means = {id(t): part.view(t.shape).to(t) for t, part in zip(tensors, parts, strict=True)}
        own = self._model.state_dict(keep_vars=True)  # a tied parameter is there under each of its names
        return {name: means.get(id(value), value) for name, value in own.items()}

    @torch.no_grad()
    def flush(self) -> None:
        """Waits for an exchange that is under way, and takes it in. Every rank must call it.

        Asynchronous ranks, which may have taken differently many steps, first make as many exchanges as the one that
        has begun most: nobody is left waiting for one that nobody else makes, and no mass is under way any more. Others
        must call it at the same step.
        If a rank goes meanwhile, each may take in what it can.
        """
        self._gather()
        moments, tensors = self._moments()
        if self.algorithm.exchange == "asynchronous":
            self._catch_up(moments)
        self._take_in(moments, tensors)

    def _take_in(self, moments: list[Tensor], tensors: list[list[Tensor]]) -> None:
        self._participant.settle_(self._rows, moments)
        self._scatter()
        _put_back(moments, tensors)

    def _catch_up(self, moments: list[Tensor]) -> None:
        participant, exchange = self._participant, self._exchange
        last = exchange.largest("round", lambda: exchange.round + participant.is_busy(), participant.is_busy)
        participant.settle_(self._rows, moments)
        while exchange.round < last:
            participant.begin_(self._rows, [0.0] * len(self._rows), moments)
            participant.settle_(self._rows, moments)
        clock = exchange.largest("clock", lambda: participant.clock, participant.is_busy)
        participant.level_(self._rows, clock)

    def state_dict(self) -> dict[str, Any]:
        """This rank's state; every rank must save its own, with its model and optimizer. Flushes first."""
        self.flush()
        return {
            "format": _FORMAT,
            "algorithm": self.algorithm.to_dict(),
            "world_size": len(self._exchange.members),
            "step": self._participant.steps,
            "round": self._exchange.round,
            "ranks": {self.place[0]: self._participant.state_dict()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes a state back, of as many ranks, after the model's and the optimizer's own.

        Raises:
            StateMismatchError: It is of another configuration, model or number of ranks.
        """
        for name, own in (
            ("format", _FORMAT), ("algorithm", self.algorithm.to_dict()), ("world_size", len(self._exchange.members)),
        ):  # fmt: skip
            if (saved := state_dict.get(name)) != own:
                raise StateMismatchError(
                    f"the state and this run must agree in {name}, got {saved!r:.300} then and {own!r:.300} now; load "
                    "it into the configuration that it was saved from"
                )
        place, _ = self.place
        if place not in state_dict["ranks"]:
            raise StateMismatchError(
                f"rank {place} must load its own state, got {sorted(state_dict['ranks'])}; give each rank its own file"
            )
        self._participant.load_state_dict(state_dict["ranks"][place])
        self._exchange.go_to(int(state_dict["round"]))
        self._gather()

    def raise_together(self, problem: DistoptError | None) -> None:
        """Raises on every rank that has begun if any has a problem. Collective."""
        if self.process_group is not None:
            raise_together(problem, self.process_group, _CPU, what="cannot load")
        elif problem is not None:
            raise problem

    @torch.no_grad()
    def detach(self) -> None:
        """Takes in what is under way, leaves the others and gives everything back; not a collective.

        Ranks that still exchange go on without this one, and do not count it as lost. Where asynchronous ranks end
        together, let each call `flush` before: then nothing is under way, and none needs to meet the rest anew.
        """
        if self._attached:
            try:
                self._gather()
                moments, tensors = self._moments()
                self._take_in(moments, tensors)
            finally:
                self._release()  # also where an exchange that was under way has failed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.detach()
        elif self._attached:
            self._release(farewell=False)  # it has failed

    # -- steps -------------------------------------------------------------------------------------------------------

    @property
    def _rows(self) -> list[Tensor]:
        return [each.vector for each in self._vectors]

    def _before_step(self, *_: Any) -> None:
        grads = [each.gradients() for each in self._vectors]
        self._participant.gradients_(grads)
        for vector, grad in zip(self._vectors, grads, strict=True):
            vector.set_gradients(grad)

    @torch.no_grad()
    def _tick(self) -> None:
        lr = {id(p): float(each["lr"]) for each in self._optimizer.param_groups for p in each["params"]}
        self._still_all.check(self._optimizer)
        self._gather()
        due = (self._participant.steps + 1) % self.algorithm.every == 0
        moments, tensors = self._moments() if due else ([], [])
        rates = [each.by_parameter(lr) for each in self._vectors] if due else []
        if self._participant.stepped_(self._rows, rates, moments):
            self._exchanges += 1
        self._scatter()
        _put_back(moments, tensors)

    def _moments(self) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Buffers and the optimizer's moments as rows (1, k), by dtype, and the tensors that each is made of."""
        tensors = list(self._buffers)
        if self.algorithm.optimizer_state == "average":
            for parameter in (p for each in self._vectors for p in each.parameters):
                state = self._optimizer.state.get(parameter, {})
                tensors += [t for _, t in sorted(state.items()) if isinstance(t, Tensor) and t.shape == parameter.shape]
        return _by_dtype(tensors)

    def _gather(self) -> None:
        for each in self._vectors:
            each.gather()

    def _scatter(self) -> None:
        for each in self._vectors:
            each.scatter()

    # -- who takes part ----------------------------------------------------------------------------------------------

    def _among(self, members: tuple[int, ...]) -> Surroundings:
        try:
            return self.algorithm.among(members)
        except ConfigError as error:
            raise PeerLostError(f"ranks {', '.join(map(str, members))} are left and cannot go on: {error}") from error

    @torch.no_grad()
    def _regroup(self, crew: Crew) -> None:
        """Other ranks take part; in the thread of an exchange where these overlap with the computation."""
        around = self._among(crew.members)
        if crew.new:
            kinds, tensors = _by_dtype(self._buffers)
            average = self._exchange.average_of_old([*self._participant.shown(self._rows), *kinds])
            if self._assembly.number in crew.new:
                for row, mean in zip(self._rows, average, strict=False):
                    row.copy_(mean)
                self._scatter()
                _put_back(average[len(self._rows) :], tensors)
                self._participant.restart(self._rows, around)
                return
        self._participant.regroup_(self._rows, around)

    def _release(self, *, farewell: bool = True) -> None:
        self._attached = False
        for handle in self._handles:
            handle.remove()
        self._clock.stop()
        self._exchange.close(farewell=farewell)
        for each in self._vectors:
            each.release()


def _taken() -> set[int]:
    """The parameters that attachments of this process average, by id."""
    at_work = (each for each in _AT_WORK if each._attached)
    return {id(p) for each in at_work for vector in each._vectors for p in vector.parameters}


def _put_back(moments: Sequence[Tensor], tensors: Sequence[Sequence[Tensor]]) -> None:
    """From rows (1, k) to the tensors that each was made of."""
    for moment, parts in zip(moments, tensors, strict=True):
        for tensor, part in zip(parts, moment[0].split([tensor.numel() for tensor in parts]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def _by_dtype(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Their elements as rows (1, k), one for each dtype, and the tensors that each is made of."""
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor)
    rows = [torch.cat([tensor.detach().reshape(-1) for tensor in each]).view(1, -1) for each in kinds.values()]
    return rows, list(kinds.values())


def _close_at_exit(attachment: "weakref.ref[GossipAttachment]") -> None:
    """Threads and connections must be gone before Python shuts down. A script that has failed leaves no farewell."""
    found = attachment()
    if found is not None and found._attached:
        found._exchange.close(farewell=not hasattr(sys, "last_value"))

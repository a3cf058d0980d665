"""Local steps at work on one model: what `attach` returns, and what `detach` undoes."""

import atexit
import contextlib
import logging
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distopt.comm import end_quietly, raise_together
from distopt.comm.crew.background import Background, streams_of
from distopt.comm.crew.introduction import address_here, group_to_begin, introduce
from distopt.config import check_number
from distopt.errors import CompatibilityError, DesyncError, DistoptError, StateMismatchError, in_a_line
from distopt.gradients import GradientObserver
from distopt.local.buffers import Buffers, as_bytes, from_bytes
from distopt.local.configuration import LocalSteps
from distopt.local.fragment import partition
from distopt.local.listeners import Listeners
from distopt.local.outer_exchange import LETTER_BYTES, Contribution, Outcome, OuterExchange
from distopt.local.piece import Piece
from distopt.local.rounds import Sending, round_of, sending, sent_after, taken_after
from distopt.replica import StillAll, check_replica, replica_facts, trained
from distopt.spans import span
from distopt.step_clock import Scaler, StepClock

_log = logging.getLogger("distopt")
_FORMAT = 1
_CPU = torch.device("cpu")
_WHAT = "local steps"
_AT_WORK: "weakref.WeakSet[LocalAttachment]" = weakref.WeakSet()  # of this process


@dataclass
class Flight:
    """An exchange that is under way.

    Attributes:
        sending: Which.
        local: (d,), this rank's model when it was sent; None where it is taken in at once.
        buffers: As bytes, when they were sent.
        outcome: When it is over.
        task: Waits for it.
    """

    sending: Sending
    local: Tensor | None
    buffers: Tensor
    outcome: Outcome | None = None
    task: Background | None = None

    def result(self) -> Outcome:
        """Waits for it."""
        if self.task is not None:
            self.task.result()
        assert self.outcome is not None
        return self.outcome


@dataclass
class Counts:
    """Since attach."""

    steps: int = 0
    exchanges: int = 0
    rounds: int = 0
    restarts: int = 0
    bytes_sent: int = 0
    bytes_dense: int = 0
    seconds_selecting: float = 0.0
    seconds_waiting: float = 0.0
    seconds_hidden: float = 0.0
    last: dict[str, Any] = field(default_factory=dict)


class LocalAttachment:
    """Made by `SparseLoCo(...).attach(model, optimizer)` or `DiLoCo`'s; see there for arguments and errors.

    Also a context manager.

    Attributes:
        algorithm: The configuration at work.
        process_group: The ranks that have begun; None for one that has joined later.
    """

    family: ClassVar = "local"

    def __init__(
        self,
        algorithm: LocalSteps,
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
        self._model, self._optimizer = model, optimizer

        def facts() -> dict[str, Any]:
            parameters = trained(model, _WHAT)
            check_replica(model, parameters, optimizer, _taken(), _WHAT)
            partition([p.numel() for p in parameters.values()], algorithm.fragments)
            return replica_facts(algorithm, parameters, _beside(model))

        self._assembly = introduce(
            facts,
            self.process_group,
            interface or address_here(self.process_group, join),
            join,
            patience_s=algorithm.peer_timeout,
            grace_s=algorithm.grace,
        )
        self._counts = Counts()
        self._step = 0  # of the job: a rank that comes later begins where the others are
        self._flights: list[Flight] = []
        try:
            named = list(trained(model, _WHAT).items())
            parts = partition([p.numel() for _, p in named], algorithm.fragments)
            self._pieces = [Piece(algorithm, [named[i] for i in part]) for part in parts]
            self._others = list(_beside(model).values())
            self._buffers = Buffers(_averaged(model) if algorithm.buffers == "average" else [])
            self._listeners = Listeners([each.parameters for each in self._pieces])
            self._outer = OuterExchange(
                self._assembly,
                [each.fragment for each in self._pieces],
                self._buffers,
                self._others,
                outer_lr=algorithm.outer_lr,
                patience_s=algorithm.peer_timeout,
                is_new=join is not None,
            )
            self._streams = streams_of(each.fragment.theta for each in self._pieces)
            self._outer.exchange.begin()
            if join is not None:
                self._come_back(self._outer.perform(None))
                self._counts = Counts()
            elif len(self._outer.exchange.members) > 1:
                self._outer.share()
                self._become_theta(None)
        except BaseException:
            if hasattr(self, "_outer"):
                self._outer.close(farewell=False)
            else:
                self._assembly.close(farewell=False)
            raise
        self._failure: BaseException | None = None  # of a step, after which this rank takes no part any more
        self._still_all = StillAll(model, optimizer)
        self._is_first = True
        self._before_step = optimizer.register_step_pre_hook(self._before_the_first)
        self._clock = StepClock(optimizer, scaler, self._tick)
        self._attached = True
        _AT_WORK.add(self)
        end_quietly()
        atexit.register(_close_at_exit, weakref.ref(self))
        _log.info(
            "local: %s with %d ranks, %d parameters in %d fragments, %d inner steps",
            algorithm.name, len(self._outer.exchange.members), self._numel, len(self._pieces), algorithm.inner_steps,
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
        members = self._outer.exchange.members
        return members.index(self._assembly.number), len(members)

    @property
    def rank(self) -> int:
        """The number of this process, which it keeps whoever else comes and goes."""
        return self._assembly.number

    @property
    def step(self) -> int:
        """Inner steps of the job: those before a checkpoint, and before this rank came, are counted."""
        return self._step

    @property
    def outer_lr(self) -> float:
        """Of the outer steps from now on; may be set between steps, on all ranks alike."""
        return self._outer.outer_lr

    @outer_lr.setter
    def outer_lr(self, value: float) -> None:
        check_number("outer_lr", value, rule="a number above 0", remedy="use 1.0", low=0.0, high=100.0)
        self._outer.outer_lr = float(value)

    def stats(self) -> dict[str, Any]:
        """Numbers since attach, of this rank, without a collective.

        `steps` of the optimizer (those that a scaler skipped included), `rounds` that are complete, `exchanges` (of a
        fragment each), `bytes_sent` (encoded by this rank: contributions and buffers), `bytes_dense` (the same
        parameters in fp32), `link_bytes_sent` (what this rank has put on the link, to all members, and to those that
        came), `seconds_exchanging` (waited for), `seconds_hidden` (of exchanges, behind the computation),
        `seconds_selecting`, `inner_steps` of the round, `outer_lr`, `members`, `lost` and `joined` ranks, `meetings`,
        `restarts` (how often this rank had missed an exchange and took the others' model), `under_way` (exchanges),
        `last` (the latest exchange).
        """
        counts, exchange = self._counts, self._outer.exchange
        return {
            "algorithm": self.algorithm.name,
            "steps": counts.steps,
            "rounds": counts.rounds,
            "exchanges": counts.exchanges,
            "bytes_sent": counts.bytes_sent,
            "bytes_dense": counts.bytes_dense,
            "link_bytes_sent": self._outer.link_bytes,
            "seconds_exchanging": counts.seconds_waiting,
            "seconds_hidden": counts.seconds_hidden,
            "seconds_selecting": counts.seconds_selecting,
            "inner_steps": self.algorithm.inner_steps_of(round_of(self.algorithm, self._step)),
            "outer_lr": self.outer_lr,
            "members": list(exchange.members),
            "lost": sorted(exchange.changes.lost),
            "joined": sorted(exchange.changes.joined),
            "meetings": exchange.changes.meetings,
            "restarts": counts.restarts,
            "under_way": len(self._flights),
            "last": dict(counts.last),
        }

    @property
    def makes_dense_mean(self) -> bool:
        """Whether observers hear of the mean pseudo-gradient: where all of it is added up."""
        return all(each.fragment.reduces for each in self._pieces)

    def observe_gradients(self, observer: GradientObserver) -> Any:
        """Tells the observer of each round's pseudo-gradients, `Delta = theta - local`; see `distopt.gradients`.

        A part is a fragment. With `overlap`, a round that begins before the one before has been taken in is left out,
        on all ranks alike.
        """
        return self._listeners.add(observer)

    @torch.no_grad()
    def add_up(self, tensor: Tensor) -> Callable[[], int]:
        """Sums a float tensor (n,), in place, over the ranks that take part. Collective, between two steps.

        Returns:
            What waits for the sum, and says over how many ranks it was made.

        Raises:
            PeerLostError: Somebody has gone meanwhile.
        """
        self._await_flights()
        total = tensor.detach().cpu().contiguous()
        num_ranks = self._outer.exchange.add_up(total)
        tensor.copy_(total)
        return lambda: num_ranks

    @torch.no_grad()
    def shared_state_dict(self) -> dict[str, Any]:
        """The model's `state_dict` with the parameters that all ranks share, to evaluate or to keep: copies.

        What is beside them, buffers among it, is as it is on this rank. The model itself stays as it is. Waits for
        exchanges that are under way; every rank may call it by itself.
        """
        self._await_flights()
        shared = {
            id(p): view.to(p.dtype, copy=True)
            for each in self._pieces
            for p, view in zip(each.parameters, each.views(each.fragment.theta), strict=True)
        }
        own = self._model.state_dict(keep_vars=True)  # a tied parameter is there under each of its names
        for value in own.values():
            if isinstance(value, Tensor) and id(value) not in shared:
                shared[id(value)] = value.detach().clone()
        return {name: shared.get(id(value), value) for name, value in own.items()}

    @torch.no_grad()
    def flush(self) -> None:
        """Takes in now what is under way, before its time. On every rank at the same step."""
        for flight in list(self._flights):
            if flight in self._flights:
                self._take_in(flight.sending)

    def state_dict(self) -> dict[str, Any]:
        """This rank's state; every rank must save its own, with its optimizer. The model's parameters are in it.

        Waits for exchanges that are under way, and keeps what they have brought without taking it in: a run that saves
        is the same as one that does not.
        """
        self._await_flights()
        flights = []
        for flight in self._flights:
            outcome = flight.result()
            flights.append(
                {
                    "number": self._number_of(flight.sending),
                    "local": flight.local,
                    "buffers": flight.buffers,
                    "mean_buffers": outcome.buffers,
                    "restarted": outcome.restarted,
                    "mean": outcome.mean,
                }
            )
        return {
            "format": _FORMAT,
            "algorithm": self.algorithm.to_dict(),
            "world_size": len(self._outer.exchange.members),
            "step": self._step,
            "round": self._outer.done,
            "outer_lr": self.outer_lr,
            "ranks": {
                self.place[0]: {
                    "pieces": [each.state_dict() for each in self._pieces],
                    "others": as_bytes(self._others),
                    "flights": flights,
                    "listeners": self._listeners.state_dict(),
                }
            },
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes a state back, of as many ranks, and the model's parameters with it.

        Raises:
            StateMismatchError: It is of another configuration, model or number of ranks; nothing has changed.
        """
        for name, own in (
            ("format", _FORMAT), ("algorithm", self.algorithm.to_dict()),
            ("world_size", len(self._outer.exchange.members)),
        ):  # fmt: skip
            if (saved := state_dict.get(name)) != own:
                raise StateMismatchError(
                    f"the state and this run must agree in {name}, got {saved!r:.300} then and {own!r:.300} now; load "
                    "it into the configuration that it was saved from, with as many ranks"
                )
        place, _ = self.place
        if place not in state_dict["ranks"]:
            raise StateMismatchError(
                f"rank {place} must load its own state, got {sorted(state_dict['ranks'])}; give each rank its own file"
            )
        state = state_dict["ranks"][place]
        if len(state["others"]) != sum(each.nbytes for each in self._others):
            raise StateMismatchError(
                f"the model must have the buffers and frozen parameters of the state, got {len(state['others'])} bytes "
                f"of them then and {sum(each.nbytes for each in self._others)} now; load it into the same model"
            )
        for piece, saved in zip(self._pieces, state["pieces"], strict=True):
            piece.check(saved)
        self._await_flights()
        self._is_first = False  # the model may be in the middle of a round
        for piece, saved in zip(self._pieces, state["pieces"], strict=True):
            piece.load_state_dict(saved)
        self._take_over(state["others"])
        self._flights = [
            Flight(
                sending(self.algorithm, int(each["number"])),
                None if each["local"] is None else each["local"].to(self._pieces[0].fragment.theta.device),
                each["buffers"],
                Outcome(restarted=each["restarted"], buffers=each["mean_buffers"], mean=each["mean"]),
            )
            for each in state["flights"]
        ]
        self._step = int(state_dict["step"])
        self._outer.outer_lr = float(state_dict["outer_lr"])
        self._outer.go_to(int(state_dict["round"]))
        self._listeners.load_state_dict(state["listeners"])

    def raise_together(self, problem: DistoptError | None) -> None:
        """Raises on every rank that has begun if any has a problem. Collective."""
        if self.process_group is not None:
            raise_together(problem, self.process_group, _CPU, what="cannot load")
        elif problem is not None:
            raise problem

    @torch.no_grad()
    def detach(self) -> None:
        """Takes in what is under way, leaves the others and gives the optimizer back; not a collective.

        Ranks that still exchange go on without this one, and do not count it as lost. The model stays this rank's own,
        with its local steps since the last exchange; `shared_state_dict` has the one that all share.
        """
        if self._attached:
            try:
                if self._failure is None:
                    self.flush()
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
    def _numel(self) -> int:
        return sum(each.numel for each in self._pieces)

    def _number_of(self, which: Sending) -> int:
        return which.round * len(self._pieces) + which.fragment

    @torch.no_grad()
    def _tick(self) -> None:
        """After each step. A rank whose step fails leaves: going on it would be an exchange behind the others."""
        if self._failure is not None:
            raise DesyncError(
                "a rank must make all exchanges, and this one has left the others when a step failed with "
                f"{in_a_line(self._failure)}; detach, then attach again on all ranks, or here with join= the address "
                "of a rank that is at work"
            ) from self._failure
        with self._leaving_if_it_fails():
            self._advance()

    @contextlib.contextmanager
    def _leaving_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._failure = error
            self._outer.close(farewell=False)
            raise

    @torch.no_grad()
    def _before_the_first(self, *_: Any) -> None:
        """What is loaded after attach would count as learned, and most of it would not arrive in theta."""
        if not self._is_first or self._failure is not None:
            return
        self._is_first = False
        with self._leaving_if_it_fails():
            for each in self._pieces:
                if not torch.allclose(each.local(), each.fragment.theta, rtol=0, atol=0, equal_nan=True):
                    raise CompatibilityError(
                        "a model must go into its first step as it was attached, got other values: weights that are "
                        "loaded afterwards would count as learned, and only the largest changes are sent; load them "
                        "first, then attach"
                    )

    def _advance(self) -> None:
        self._is_first = False
        self._still_all.check(self._optimizer)
        self._step += 1
        self._counts.steps += 1
        step = self._step
        for each in taken_after(self.algorithm, step):
            if each.sent < step and not self._take_in(each):
                return
        for each in sent_after(self.algorithm, step):
            self._send(each)
            if each.taken == step and not self._take_in(each):
                return
        if not self._flights and self._outer.has_missed_some():
            self._come_back(self._outer.perform(None))

    def _send(self, which: Sending) -> None:
        piece, at_once = self._pieces[which.fragment], which.taken == which.sent
        began = time.monotonic()
        with span("local", "select"):
            local = piece.local()
            is_heard = self._listeners.wants(which.fragment)
            if is_heard:
                self._listeners.local(which.fragment, piece.views(piece.fragment.theta - local))
            payload = piece.fragment.contribute_(local).cpu()
            is_last = which.fragment == len(self._pieces) - 1
            buffers = self._buffers.sent() if is_last else torch.empty(0, dtype=torch.uint8)
            contribution = Contribution(self._number_of(which), payload, buffers, self.outer_lr, is_heard)
        selecting = time.monotonic() - began
        flight = Flight(which, None if at_once else local, buffers)
        counts = self._counts
        counts.seconds_selecting += selecting
        counts.exchanges += 1
        sent_bytes = LETTER_BYTES + payload.nbytes + buffers.nbytes
        counts.bytes_sent += sent_bytes
        counts.bytes_dense += 4 * piece.numel
        counts.last = {
            "round": which.round, "fragment": which.fragment, "bytes_sent": sent_bytes,
            "bytes_dense": 4 * piece.numel, "seconds_selecting": selecting,
        }  # fmt: skip
        self._flights.append(flight)
        if at_once:
            self._exchange(flight, contribution, None)
        else:
            before = self._flights[-2].task if len(self._flights) > 1 else None
            flight.task = Background(lambda: self._exchange(flight, contribution, before), self._streams)

    def _exchange(self, flight: Flight, contribution: Contribution, before: Background | None) -> None:
        """In a thread of its own where exchanges overlap with the computation: they are made in their order."""
        if before is not None:
            before.result()
        with torch.no_grad():
            flight.outcome = self._outer.perform(contribution)

    def _take_in(self, which: Sending) -> bool:
        """What an exchange has brought becomes this rank's model; whether this rank has missed nothing.

        What it has learned since it was sent stays.
        """
        flight = next((each for each in self._flights if each.sending == which), None)
        if flight is None:  # of before this rank came back
            return True
        began = time.monotonic()
        try:
            with span("local", "wait"):
                outcome = flight.result()
        finally:
            waited = time.monotonic() - began
            self._flights.remove(flight)
        counts, piece = self._counts, self._pieces[which.fragment]
        at_once = flight.local is None
        waited = outcome.seconds if at_once else waited
        hidden = max(0.0, outcome.seconds - waited)
        counts.seconds_waiting += waited
        counts.seconds_hidden += hidden
        counts.last |= {"seconds_exchanging": waited, "seconds_hidden": hidden}
        if outcome.restarted:
            self._come_back(outcome)
            return False
        with span("local", "apply"):
            theta = piece.fragment.theta
            piece.become_(theta if flight.local is None else theta + (piece.local() - flight.local))
            if outcome.buffers is not None:
                self._buffers.become_(outcome.buffers, None if at_once else flight.buffers)
        counts.rounds += which.fragment == len(self._pieces) - 1
        if outcome.mean is not None and self._listeners.hear(which.fragment):
            self._listeners.mean(which.fragment, piece.views(outcome.mean))
        self._listeners.taken(which.fragment)
        return True

    def _come_back(self, outcome: Outcome) -> None:
        """This rank has missed exchanges: it takes the others' model, and goes on from where they are."""
        for flight in self._flights:
            flight.result()
        self._flights.clear()
        self._listeners.forget()
        self._counts.restarts += 1
        self._become_theta(outcome.buffers)
        last, following = (sending(self.algorithm, number) for number in (self._outer.done - 1, self._outer.done))
        self._step = max(last.sent, min(last.taken, following.sent - 1))
        _log.info("local: rank %d has taken the others' model at step %d", self.rank, self._step)

    def _become_theta(self, buffers: Tensor | None) -> None:
        for piece in self._pieces:
            fragment = piece.fragment
            fragment.restart_(fragment.theta, fragment.momentum)  # what was sent meanwhile has left a residual again
            piece.become_(fragment.theta)
        if self._outer.handed_over is not None:
            self._take_over(self._outer.handed_over)
            self._outer.handed_over = None
        if buffers is not None:
            self._buffers.become_(buffers)

    def _take_over(self, others: Tensor) -> None:
        for tensor, new in zip(self._others, from_bytes(others, self._others), strict=True):
            tensor.copy_(new)

    def _await_flights(self) -> None:
        """Nothing is under way any more; it is not taken in."""
        began = time.monotonic()
        for flight in self._flights:
            flight.result()
        self._counts.seconds_waiting += time.monotonic() - began

    def _release(self, *, farewell: bool = True) -> None:
        self._attached = False
        self._before_step.remove()
        self._clock.stop()
        self._outer.close(farewell=farewell)


def _taken() -> set[int]:
    """The parameters that attachments of this process average, by id."""
    return {id(p) for each in _AT_WORK if each._attached for piece in each._pieces for p in piece.parameters}


def _beside(model: nn.Module) -> dict[str, Tensor]:
    """What is not trained: frozen parameters, and buffers."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return {**frozen, **dict(model.named_buffers())}


def _averaged(model: nn.Module) -> list[Tensor]:
    """Floating buffers that a checkpoint of the model has: others are tables, which each rank makes for itself."""
    saved = {id(each) for each in model.state_dict(keep_vars=True).values()}
    return [each for each in model.buffers() if each.is_floating_point() and id(each) in saved]


def _close_at_exit(attachment: "weakref.ref[LocalAttachment]") -> None:
    """Threads and connections must be gone before Python shuts down. A script that has failed leaves no farewell."""
    found = attachment()
    if found is not None and found._attached:
        found._outer.close(farewell=not hasattr(sys, "last_value"))

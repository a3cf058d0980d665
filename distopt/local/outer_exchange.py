"""The exchanges of local steps between real ranks: what travels, and what becomes of ranks that missed some of it.

All that is sparse goes from every member to every other; what may be added up goes through the group's all-reduce,
whose sums are equal bits on all ranks. So theta, the model that all share, is the same on all, to the bit.

After a meeting the members find out who is up to date: those who have made most exchanges, and made the last of them in
the same crew as the lowest of these. It gives its theta and outer momentum to the others. Of these,

* a rank whose contribution those had counted, and which had been cut off before it knew, keeps its residual;
* a rank that missed an exchange, or is new, has a zero residual, takes the model, and contributes nothing to the first
  exchange after that, which it waits for: from then on it is in step with the rest.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.comm.crew.assembly import Assembly, Crew
from distopt.comm.crew.exchange import Exchange
from distopt.comm.crew.interruption import BrokenError
from distopt.comm.crew.point_to_point import Gathering, Messages
from distopt.local.buffers import Buffers, as_bytes, from_bytes
from distopt.local.fragment import Fragment
from distopt.spans import span

_log = logging.getLogger("distopt")
_TAGS_PER_EXCHANGE = 2
_HANDED_OVER = 1
LETTER_BYTES = 8  # before what is sparse, and before buffers: the outer learning rate


@dataclass
class Contribution:
    """What a rank brings to an exchange.

    Attributes:
        number: Of the exchange.
        payload: What `Fragment.contribute_` made, on the CPU.
        buffers: The model's buffers as bytes; empty where they are not sent.
        outer_lr: Of the outer step.
        wants_mean: Whether `Outcome.mean` is asked for.
    """

    number: int
    payload: Tensor
    buffers: Tensor
    outer_lr: float
    wants_mean: bool = False


@dataclass
class Outcome:
    """What has come of an exchange; theta has moved already.

    Attributes:
        restarted: Whether this rank had missed one, and has to begin again from theta.
        buffers: The mean of the contributors' buffers, as bytes; None if none were sent.
        mean: (d,), of dense contributions, if it was asked for.
        seconds: That it took.
    """

    restarted: bool = False
    buffers: Tensor | None = None
    mean: Tensor | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Standing:
    """Who of a crew is up to date when it has met; see the module.

    Attributes:
        source: The lowest of those that are.
        current: All of those.
        counted: Who is one exchange behind, in which it was counted.
        missed: All others.
    """

    source: int
    current: frozenset[int]
    counted: frozenset[int]
    missed: frozenset[int]

    @classmethod
    def of(cls, crew: Crew) -> "Standing":
        """From what the members have said of themselves."""
        told = {number: crew.states[number] for number in crew.members if number not in crew.new}
        most = max(each["done"] for each in told.values())
        source = min(number for number, each in told.items() if each["done"] == most)
        line = told[source]["line"]
        current = {n for n, each in told.items() if each["done"] == most and each["line"] == line}
        counted = {
            n for n, each in told.items() if n not in current and each["done"] == most - 1 and each["tried"] == line
        }
        missed = set(crew.members) - current - counted
        return cls(source, frozenset(current), frozenset(counted), frozenset(missed))


class OuterExchange:
    """See the module.

    Args:
        assembly: This rank's.
        fragments: Of its model.
        buffers: That are averaged with the last fragment of each round.
        others: Tensors beside the trained parameters that a new rank takes over: what is frozen, and all buffers.
        patience_s: For a connected member to say something.
        is_new: Whether this rank joins others.

    Attributes:
        outer_lr: For those that come; see `Contribution`.
        handed_over: What this rank has been given of `others`, as bytes; None if nothing.
        done: Exchanges of the job so far.
        link_bytes: That this rank has put on the link.
    """

    def __init__(
        self,
        assembly: Assembly,
        fragments: Sequence[Fragment],
        buffers: Buffers,
        others: Sequence[Tensor],
        *,
        outer_lr: float,
        patience_s: float,
        is_new: bool,
    ) -> None:
        self._assembly, self._fragments, self._buffers, self._others = assembly, fragments, buffers, others
        self._patience_s = patience_s
        self.outer_lr = outer_lr
        self.handed_over: Tensor | None = None
        self.done = 0
        self.link_bytes = 0
        self._line: list[int] | None = None  # the crew in which the last exchange was made
        self._tried: list[int] | None = None  # the crew in which one was begun
        self._restarted = False
        self._has_told = False  # that ranks train on the same data
        self._idle: tuple[list[int], int, frozenset[int]] | None = None
        self.exchange = Exchange(assembly, self._changed, is_new=is_new, state=self._state())

    def _state(self) -> dict[str, Any]:
        return {"done": self.done, "line": self._line, "tried": self._tried}

    def _tell(self) -> None:
        self.exchange.state = self._state()

    @property
    def number(self) -> int:
        """Of this rank."""
        return self._assembly.number

    def has_missed_some(self) -> bool:
        """Whether the others have met with this rank since it has missed exchanges, and it has not caught up yet."""
        crew = self.exchange.is_changing
        return crew is not None and self.number in Standing.of(crew).missed

    def go_to(self, number: int) -> None:
        """This many exchanges are done: those of a checkpoint."""
        self.done = number
        self._line = self._tried = None
        self.exchange.go_to(number)
        self._tell()

    # -- one exchange ------------------------------------------------------------------------------------------------

    def perform(self, contribution: Contribution | None) -> Outcome:
        """The next exchange, by which theta moves; None for a rank that only waits for the first after it has come."""
        if contribution is not None and contribution.number < self.done:  # made ready before this rank had to restart
            contribution = None
        if contribution is None and not self._waits_for_the_first():
            return Outcome(restarted=True)
        began = time.monotonic()
        found: list[Callable[[], Outcome]] = []

        def act(crew: Crew, number: int) -> None:
            found.append(self._exchanged(crew, number, contribution))

        with span("local", "exchange"):
            self.exchange.perform(act)
        outcome = found[-1]() if found else Outcome()  # else it was made without this rank, which has its theta
        self.done = self.exchange.round
        self._tell()
        outcome.restarted, self._restarted = self._restarted, False
        outcome.seconds = time.monotonic() - began
        return outcome

    def _waits_for_the_first(self) -> bool:
        """Whether this rank has come, or is to come, and the exchange for which it comes has not been made."""
        if self.exchange.is_changing is not None:
            return True
        return self._idle is not None and self._idle[1] == self.exchange.round and self.number in self._idle[2]

    def _exchanged(self, crew: Crew, number: int, contribution: Contribution | None) -> Callable[[], Outcome]:
        """What is left to do when all that is needed has arrived: nothing of it can be interrupted."""
        self._tried = crew.identity
        self._tell()
        place = number % len(self._fragments)
        fragment, sends_buffers = self._fragments[place], place == len(self._fragments) - 1
        idle = self._idle[2] if self._idle is not None and self._idle[:2] == (crew.identity, number) else frozenset()
        senders = [each for each, member in enumerate(crew.members) if member not in idle]
        own = None if self.number in idle else self._own(number, contribution, fragment, sends_buffers=sends_buffers)
        letter = None
        if own is not None:
            parts = [own.buffers] if fragment.reduces else [own.payload, own.buffers]
            letter = torch.cat([as_bytes([torch.tensor([own.outer_lr], dtype=torch.float64)]), *parts])
        nbytes = LETTER_BYTES + (0 if fragment.reduces else fragment.nbytes)
        nbytes += self._buffers.nbytes if sends_buffers else 0
        gathering = Gathering(crew, letter, nbytes, senders, _TAGS_PER_EXCHANGE * number, self._patience_s)
        total: Tensor | None = None
        if fragment.reduces:
            total = torch.zeros(fragment.theta.numel()) if own is None else own.payload.clone()
            self._add_up(crew, total)
        rows = gathering.wait()
        self.link_bytes += gathering.bytes_sent
        self._line = crew.identity
        self.done = number + 1
        self._tell()
        wants_mean = contribution is not None and contribution.wants_mean
        payload = None if own is None else own.payload
        return lambda: self._taken(fragment, total, rows, payload, wants_mean=wants_mean)

    def _own(
        self, number: int, contribution: Contribution | None, fragment: Fragment, *, sends_buffers: bool
    ) -> Contribution:
        """What this rank brings; nothing new where it has come for an exchange that was not made, and is made again."""
        if contribution is not None and contribution.number == number and not self._restarted:
            return contribution
        nothing = fragment.contribute_(fragment.theta.clone()).cpu()
        buffers = self._buffers.sent() if sends_buffers else torch.empty(0, dtype=torch.uint8)
        return Contribution(number, nothing, buffers, self.outer_lr)

    def _taken(
        self, fragment: Fragment, total: Tensor | None, rows: Tensor, own: Tensor | None, *, wants_mean: bool
    ) -> Outcome:
        """All take the outer learning rate of the first: so theta stays the same whatever a rank has set."""
        outcome, num_ranks = Outcome(), len(rows)
        with span("local", "apply"):
            (lr,) = from_bytes(rows[0, :LETTER_BYTES], [torch.zeros(1, dtype=torch.float64)])
            rows = rows[:, LETTER_BYTES:]
            if total is not None:
                gathered = total.to(fragment.theta.device)
                outcome.mean = gathered / num_ranks if wants_mean else None
            else:
                gathered = rows[:, : fragment.nbytes].to(fragment.theta.device)
                rows = rows[:, fragment.nbytes :]
            before = fragment.theta.clone() if self._are_the_same(gathered, own, num_ranks) else None
            fragment.take_(gathered, num_ranks, outer_lr=float(lr))
            if before is not None and not torch.equal(before, fragment.theta):
                self._has_told = True
                _log.warning(
                    "ranks must train on data of their own, got %d that have learned the same; give each its own part, "
                    "as torch.utils.data.DistributedSampler(..., num_replicas=%d, rank=...) does",
                    num_ranks, num_ranks,
                )  # fmt: skip
            if rows.numel():
                outcome.buffers = self._buffers.mean(rows)
        return outcome

    def _are_the_same(self, gathered: Tensor, own: Tensor | None, num_ranks: int) -> bool:
        """Whether all ranks have learned the same, which nobody has been told yet."""
        if self._has_told or own is None or num_ranks < 2:
            return False
        if gathered.dim() > 1:
            return bool((gathered == gathered[0]).all())
        return torch.allclose(gathered, own.to(gathered.device) * num_ranks, rtol=1e-5, atol=0.0)

    def _add_up(self, crew: Crew, total: Tensor) -> None:
        options = dist.AllreduceOptions()
        options.timeout = timedelta(seconds=self._patience_s)
        try:
            crew.group.allreduce([total], options).wait()
        except RuntimeError as error:
            raise BrokenError(range(len(crew.members))) from error
        size = len(crew.members)
        self.link_bytes += 2 * (size - 1) * total.nbytes // size

    # -- ranks that come and go --------------------------------------------------------------------------------------

    def share(self) -> None:
        """All take the first one's theta, and what is beside it. Collective.

        Raises:
            PeerLostError: Somebody has gone meanwhile.
        """

        def act(crew: Crew) -> None:
            self._hand_over(crew, 0, range(1, len(crew.members)))

        self.exchange.in_crew(act)

    def _changed(self, crew: Crew) -> None:
        """After a meeting, before anything is exchanged in the crew; see the module."""
        standing = Standing.of(crew)
        stale = standing.missed | standing.counted
        places = [each for each, member in enumerate(crew.members) if member in stale]
        self._hand_over(crew, crew.members.index(standing.source), places)
        if self.number in standing.missed:
            self._restarted = True
            for fragment in self._fragments:
                fragment.restart_(fragment.theta, fragment.momentum)
            self.exchange.round = crew.round
        else:
            self.handed_over = None  # what is beside theta stays this rank's own
        self.done = crew.round
        self._line = crew.states[standing.source]["line"]
        self._idle = crew.identity, crew.round, standing.missed
        self._tell()

    def _hand_over(self, crew: Crew, source: int, places: Sequence[int]) -> None:
        """Gives the source's theta, outer momentum, outer learning rate and what is beside it to these places."""
        if crew.place != source and crew.place not in places:
            return
        shared = [each.theta for each in self._fragments]
        shared += [each.momentum for each in self._fragments if each.momentum is not None]
        given = [torch.tensor([self.outer_lr], dtype=torch.float64), *shared, *self._others]
        messages = Messages(crew, _HANDED_OVER, self._patience_s)
        if crew.place == source:
            content = as_bytes(given)
            for place in places:
                messages.send(place, content)
            messages.wait()
            self.link_bytes += messages.bytes_sent
            return
        content = torch.empty(sum(each.nbytes for each in given), dtype=torch.uint8)
        messages.receive(source, content)
        messages.wait()
        lr, *tensors = from_bytes(content, given)
        self.outer_lr = float(lr)
        for tensor, new in zip(shared, tensors, strict=False):
            tensor.copy_(new)
        self.handed_over = as_bytes(tensors[len(shared) :])

    def close(self, *, farewell: bool = True) -> None:
        """Leaves for good; see `Exchange.close`."""
        self.exchange.close(farewell=farewell)

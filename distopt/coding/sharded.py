"""The sharded master: every rank computes, decodes a slice of the gradient, and has the model and the optimizer.

With one master all n coded gradients arrive at rank 0. Here each rank cuts its own into n / (s+1) slices, one for each
group of the fractional code, and sends a slice to every member of that group; whoever has what decodes the slice sends
it to all ranks. A slice has s+1 decoders, so s slow ranks delay none. Into each rank come at most 2 (s+1) gradients per
step, however many ranks there are.

Exact decoding needs no agreement: the members of a group send equal messages, and decoders add up the groups in the
same order, so all decoders of a slice get the same bits, whoever was slow. That is checked: what the members of a group
send is compared, by fingerprints. So the parameters of all ranks stay equal, and a slow rank catches up by applying the
gradients that it missed.

Limits: the fractional code only; equal bits need processors of one kind. A rank that is behind by more than 1 GiB of
gradients, and by more than 16 of them, is left behind for good: to the others it is gone, and it ends with an error.
"""

import collections
import math
import threading
import time
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from distopt.coding import rules
from distopt.coding.answer import NUM_PROJECTIONS
from distopt.coding.combine import combine
from distopt.coding.computing import Computation, PartLoss, projections
from distopt.coding.orders import Kind, reason_message, text_of
from distopt.coding.repetition import RepetitionCode
from distopt.coding.scheme import Task
from distopt.coding.statistics import Statistics
from distopt.comm import Message, TensorSpec, Transport, message
from distopt.errors import CompatibilityError, DecodeError, DesyncError, PeerLostError
from distopt.spans import span

_BACKLOG_BYTES, _BACKLOG_GRADIENTS = 1 << 30, 16  # whichever is more is kept for a rank that is behind
_LOOK_S = 0.5
_COMPARED_ROUNDS = 16  # what comes later than so many steps is not compared any more
_GOODBYE_S = 10.0


class Sharded:
    """See the module.

    Args:
        transport: Between all ranks.
        code: Fractional, for as many workers as there are ranks.
        rows: The row of the code for each rank.
        computation: Of this rank.
        deadline_s: How long a step may take.
        checks_rules: Whether to check the model's rules before the first gradient.
        early: Frames, with their sources, of ranks that began before this one was ready.
    """

    def __init__(
        self,
        transport: Transport,
        code: RepetitionCode,
        rows: Sequence[int],
        computation: Computation,
        *,
        deadline_s: float,
        checks_rules: bool,
        early: Sequence[tuple[int, Tensor]] = (),
    ) -> None:
        self.statistics = Statistics(code.num_workers)
        self._transport = transport
        self._code = code
        self._row_of = list(rows)
        self._rank_at = [rows.index(row) for row in range(code.num_workers)]
        self._computation = computation
        self._deadline_s = deadline_s
        self._unchecked = checks_rules
        self._flat = computation.models[0]
        gradient_bytes = sum(spec.num_bytes for spec in self._flat.specs)
        self._backlog_bytes = max(_BACKLOG_BYTES, _BACKLOG_GRADIENTS * gradient_bytes)
        self._waiting_bytes = 0  # of slices that are decoded and not applied
        self._own_slice = next(i for i, members in enumerate(code.groups) if rows[transport.rank] in members)
        self._specs = [
            [TensorSpec((end - start,), spec.dtype) for spec, (start, end) in zip(self._flat.specs, cut, strict=True)]
            for cut in self._cuts()
        ]

        self._round = 0  # the step under way, or the next one
        self._condition = threading.Condition()  # of everything below
        self._parts: dict[int, dict[int, Message]] = collections.defaultdict(dict)  # by round and row
        self._decoded: dict[int, dict[int, Message]] = collections.defaultdict(dict)  # by round and slice
        # By round and group: who was first, and the fingerprint of what it sent for the own slice.
        self._seen: dict[int, dict[int, tuple[int, tuple[float, ...]]]] = collections.defaultdict(dict)
        self._decoded_here = -1  # rounds of the own slice up to this one are decoded and sent
        self._taken = -1  # the gradients of rounds up to this one are taken: what still comes for them is not kept
        self._starts: dict[int, float] = {}
        # By step and rank: seconds that those computed whose slices came before this rank began the step.
        self._early: dict[int, dict[int, float]] = collections.defaultdict(dict)
        self._behind: set[int] = set()
        self._finished: dict[int, int] = {}  # the first step without them, of ranks that have said goodbye
        self._failed: dict[int, str] = {}  # why, of those that left with an error
        self._failure: Exception | None = None
        self._closing = False
        self._server = threading.Thread(target=self._serve, args=(early,), name="distopt-shard", daemon=True)
        self._server.start()

    @property
    def position(self) -> tuple[int, int]:
        """The next job and round."""
        return self._round, self._round

    def start_at(self, job: int, round: int) -> None:
        """Goes on with this step, before the first one."""
        self._round = round
        self._decoded_here = self._taken = round - 1

    @property
    def gone(self) -> dict[int, str]:
        """Ranks that take no part any more, with what is known."""
        lost = dict.fromkeys(self._transport.lost - set(self._finished), "its connection is gone")
        return dict(sorted({**dict.fromkeys(self._behind, "left behind"), **lost, **self._failed}.items()))

    def _absent(self, step: int) -> dict[int, str]:
        """Ranks that send nothing for this step any more, with what is known."""
        left = {rank: "it has left" for rank, round in list(self._finished.items()) if round <= step}
        return {**left, **self.gone}

    def steps(self, num_steps: int) -> Iterator[int]:
        """The next steps, every one on every rank."""
        for step in range(self._round, self._round + num_steps):
            yield step
            if self._round != step + 1:
                raise CompatibilityError(
                    f"backward was not called in step {step}; call coded.backward(loss) once in each step, on every "
                    "rank"
                )

    def backward(self, loss: PartLoss) -> float:
        """One step: computes unless the gradient is there already, and waits until it is."""
        step = self._round
        began = time.monotonic()
        with self._condition:
            self._starts[step] = began
            self.statistics.begin(step, began)
            for rank, compute_s in self._early.pop(step, {}).items():
                self.statistics.arrived(step, rank, 0.0, compute_s)
        self._compute(step, loss)
        with span("coding", "round"):
            slices = self._await(step, began)
        losses = [each.numbers for each in slices]
        mean_loss, count = losses[0][0] / losses[0][1], losses[0][1]
        flats = [
            torch.cat(list(pieces)).div_(count) for pieces in zip(*(each.tensors[1:] for each in slices), strict=True)
        ]
        self._flat.write_gradients(flats, slices[0].tensors[0])
        self.statistics.decoded(math.sqrt(len(self._code.groups)))
        with self._condition:
            self.statistics.end(step, time.monotonic() - began)
            self._round = step + 1
            self._starts = {r: at for r, at in self._starts.items() if r > step - 100}
        return mean_loss

    def end(self, reason: str = "") -> None:
        """Says goodbye, and serves the others until they do too, or are gone."""
        frame = message.encode(reason_message(Kind.END, self._round, self._transport.rank, reason))
        for rank in range(self._transport.size):
            if rank != self._transport.rank:
                self._post(rank, frame)
        end = time.monotonic() + (_GOODBYE_S if not reason else 1.0)
        others = set(range(self._transport.size)) - {self._transport.rank}
        with self._condition:
            while not others <= set(self._finished) | self._transport.lost | self._behind and time.monotonic() < end:
                self._condition.wait(0.05)
            self._closing = True

    # -- computing -----------------------------------------------------------------------------------------------------

    def _compute(self, step: int, loss: PartLoss) -> None:
        row = self._row_of[self._transport.rank]
        task = Task(step, tuple((part, 1.0) for part in self._code.support(row)))
        if self._unchecked:
            rules.check(self._computation, task, loss)
            self._unchecked = False
        found = self._computation.answer([task], None, loss, lambda: self._is_complete(step))
        if found is None:
            return
        (result,) = found.results
        numbers = (result.loss, result.count, found.compute_s)  # and behind them the fingerprint of the slice
        for members, cut in zip(self._code.groups, self._cuts(), strict=True):
            pieces = [vector[start:end] for vector, (start, end) in zip(result.vectors, cut, strict=True)]
            said = Message(
                Kind.SLICE, step, self._transport.rank, (result.used, *pieces), (*numbers, *projections(pieces))
            )
            frame = message.encode(said)
            for member in members:
                self._post(self._rank_at[member], frame)

    def _cuts(self) -> list[list[tuple[int, int]]]:
        """For each slice its bounds in each flat tensor."""
        count = len(self._code.groups)
        return [
            [(spec.shape[0] * i // count, spec.shape[0] * (i + 1) // count) for spec in self._flat.specs]
            for i in range(count)
        ]

    def _await(self, step: int, began: float) -> list[Message]:
        """The slices of the step's gradient, in order."""
        probed = began
        with self._condition:
            while not self._is_complete(step) and self._failure is None:
                waited = time.monotonic() - began
                if waited > self._deadline_s or not self._decodable_without(self._absent(step)):
                    raise self._too_few(step, waited)
                self._condition.wait(min(_LOOK_S, max(0.01, self._deadline_s - waited)))
                if time.monotonic() - probed > _LOOK_S:
                    probed = time.monotonic()
                    for rank in range(self._transport.size):
                        self._transport.probe(rank)
            if self._failure is not None:  # also where the gradient is there: parameters drift apart
                raise self._failure
            found = self._decoded.pop(step)
            self._taken = step
            self._waiting_bytes -= sum(_num_bytes(each) for each in found.values())
            return [found[i] for i in range(len(self._code.groups))]

    def _decodable_without(self, ranks: Collection[int]) -> bool:
        return self._code.decodable(set(range(self._code.num_workers)) - {self._row_of[rank] for rank in ranks})

    def _is_complete(self, step: int) -> bool:
        return len(self._decoded.get(step, ())) == len(self._code.groups)

    def _too_few(self, step: int, waited: float) -> DecodeError:
        absent = self._absent(step)
        missing = sorted(absent)
        if self._decodable_without(absent):  # so it is the deadline, which others have missed too
            here = {self._rank_at[row] for row in self._parts.get(step, ())} | {self._transport.rank}
            missing = sorted(set(range(self._transport.size)) - here)
        named = ", ".join(f"rank {rank} ({absent.get(rank, f'nothing for {waited:.3g} s')})" for rank in missing)
        return DecodeError(
            f"step {step} cannot be decoded without {named}; {self._code!r} tolerates {self._code.tolerance} "
            "stragglers: start again with those that are left, with a larger s, or with a longer deadline_s than "
            f"{self._deadline_s:g}",
            missing,
        )

    # -- serving -------------------------------------------------------------------------------------------------------

    def _serve(self, early: Sequence[tuple[int, Tensor]]) -> None:
        waiting = collections.deque(early)
        while not self._closing:
            got = waiting.popleft() if waiting else self._transport.receive(0.2)
            if got is None:
                continue
            source, frame = got
            try:
                said = message.decode(frame)
                if said.sender != source:
                    raise DecodeError(f"a message of rank {source} says that it is of rank {said.sender}")
                with self._condition:
                    self.statistics.bytes_received += message.length(frame) if source != self._transport.rank else 0
                    self._heed(said)
                    self._condition.notify_all()
            except DecodeError as error:
                with self._condition:
                    self.statistics.refuse(source, str(error)[:200])
            except Exception as error:  # whatever it is: the main thread must not wait for a thread that is gone
                with self._condition:
                    self._failure = error
                    self._condition.notify_all()

    def _heed(self, said: Message) -> None:
        if said.kind == Kind.END:
            self._finished[said.sender] = said.round
            if reason := str(text_of(said)):
                self._failed[said.sender] = reason
        elif said.kind == Kind.SLICE:
            self._check(said, self._own_slice, 3 + NUM_PROJECTIONS)
            self._keep_part(said)
        elif said.kind == Kind.DECODED:
            index = int(said.numbers[2]) if len(said.numbers) == 3 and said.numbers[2].is_integer() else -1
            self._check(said, index, 3)
            if self._row_of[said.sender] not in self._code.groups[index]:
                raise DecodeError(
                    f"slice {index} is decoded by rows {self._code.groups[index]}, got one of another rank"
                )
            self._keep_decoded(said, index)
        else:
            raise DecodeError(f"a rank of a sharded training is told slices, got kind {said.kind}")

    def _check(self, said: Message, index: int, num_numbers: int) -> None:
        if not 0 <= index < len(self._specs) or len(said.numbers) != num_numbers:
            raise DecodeError(f"there are {len(self._specs)} slices with {num_numbers} numbers, got slice {index}")
        expected = [TensorSpec((len(self._flat.parameters),), torch.uint8), *self._specs[index]]
        found = [TensorSpec(tuple(tensor.shape), tensor.dtype) for tensor in said.tensors]
        if found != expected:
            raise DecodeError(f"slice {index} has tensors {expected}, got {found}")

    def _keep_part(self, said: Message) -> None:
        step, row = said.round, self._row_of[said.sender]
        if step in self._starts:
            self.statistics.arrived(step, said.sender, time.monotonic() - self._starts[step], said.numbers[2])
        elif step >= self._round:
            self._early[step][said.sender] = said.numbers[2]
        self._compare(said)
        if step <= self._decoded_here:
            return
        parts = self._parts[step]
        parts[row] = said
        if not self._code.decodable(parts):
            return
        with span("coding", "decode"):
            decoded = self._combine(step, parts)
        self._decoded_here = step
        for old in [round for round in self._parts if round <= step]:
            del self._parts[old]
        frame = message.encode(decoded)
        for rank in range(self._transport.size):
            if rank != self._transport.rank:
                self._post(rank, frame)
        self._keep_decoded(decoded, self._own_slice)

    def _combine(self, step: int, parts: dict[int, Message]) -> Message:
        coefficients = self._code.decode(parts)
        # One member of each group, in the order of the groups: the same sum whoever they are.
        chosen = sorted(np.flatnonzero(coefficients), key=lambda row: self._code.intervals[row])
        said = [parts[int(row)] for row in chosen]
        vectors = [combine(list(each), [1.0] * len(said)) for each in zip(*(m.tensors[1:] for m in said), strict=True)]
        used = torch.stack([m.tensors[0] for m in said]).amax(0)
        loss, count = (sum(m.numbers[i] for m in said) for i in (0, 1))
        numbers = (float(loss), float(count), float(self._own_slice))
        return Message(Kind.DECODED, step, self._transport.rank, (used, *vectors), numbers)

    def _keep_decoded(self, said: Message, index: int) -> None:
        if said.round <= self._taken:
            return
        if index in self._decoded[said.round] or self._failure is not None:
            return
        self._decoded[said.round][index] = said
        self._waiting_bytes += _num_bytes(said)
        if self._waiting_bytes > self._backlog_bytes:
            steps, self._waiting_bytes = len(self._decoded), 0
            self._decoded.clear()
            raise PeerLostError(
                f"this rank, {self._transport.rank}, has not applied the gradients of {steps} steps, more than the "
                f"{self._backlog_bytes} bytes that are kept for it: the others have left it behind; start again from a "
                "checkpoint, and do what takes long between two loops, on all ranks",
                (self._transport.rank,),
            )

    def _compare(self, said: Message) -> None:
        """Whether the members of a group sent the same, whoever came first."""
        row = self._row_of[said.sender]
        group = next(i for i, members in enumerate(self._code.groups) if row in members)
        first, fingerprint = self._seen[said.round].setdefault(group, (said.sender, said.numbers[3:]))
        if not np.array_equal(fingerprint, said.numbers[3:], equal_nan=True):  # NaN in both is no difference
            self.statistics.disagreements += 1
            raise DesyncError(
                f"ranks {first} and {said.sender} sent different gradients of the same parts in step {said.round}, so "
                "the parameters of the ranks would drift apart; something depends on who computes: parameters, "
                "buffers, a data set that differs, random numbers from elsewhere, another kind of processor"
            )
        for old in [round for round in self._seen if round < self._round - _COMPARED_ROUNDS]:
            del self._seen[old]

    def _post(self, rank: int, frame: Tensor) -> None:
        if rank in self._behind:
            return
        if self._transport.pending_bytes(rank) > self._backlog_bytes:
            self._behind.add(rank)
            return
        self._transport.send(rank, frame)
        if rank != self._transport.rank:
            self.statistics.bytes_sent += frame.numel()


def _num_bytes(said: Message) -> int:
    return sum(tensor.nbytes for tensor in said.tensors)

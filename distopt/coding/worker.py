"""The worker's role: takes tasks, computes, answers. It keeps nothing that the master could not tell it again.

Only the newest tasks count. A worker that was slow finds newer ones when it is done, or between two parts, and goes on
with them; rounds in between are skipped. So the loop `for step in coded.steps(...)` may see fewer steps on a worker.
"""

import logging
import time
from collections.abc import Iterator, Sequence

from torch import Tensor

from distopt.coding import answer as answers
from distopt.coding import rules
from distopt.coding.computing import Computation, PartLoss
from distopt.coding.orders import Kind, reason_message, tasks_of, text_of
from distopt.coding.scheme import Task
from distopt.comm import Message, TensorSpec, Transport, message
from distopt.errors import CompatibilityError, DecodeError, DistoptError, PeerLostError

_log = logging.getLogger("distopt")

MASTER = 0  # rank
_LOOK_S = 1.0  # how often a waiting worker looks whether the master is lost


class Worker:
    """See the module.

    Args:
        transport: To the master, rank 0.
        computation: Of this rank.
        delay: T of the scheme: parameters of older jobs are not asked for any more.
        patience_s: How long the master may be silent.
        checks_rules: Whether to check the model's rules before the first round.
    """

    def __init__(
        self, transport: Transport, computation: Computation, *, delay: int, patience_s: float, checks_rules: bool
    ) -> None:
        self._transport = transport
        self._computation = computation
        self._delay = delay
        self._patience_s = patience_s
        self._unchecked = checks_rules
        self._parameters: dict[int, list[Tensor]] = {}
        self._order: tuple[int, list[Task]] | None = None  # the newest round and its tasks, not answered yet
        self._next_job = 0
        self._next_round = 0  # the first one after the loop under way
        self._newest = -1  # the round that was computed last
        self._done = 0  # rounds that the master is done with
        self._ended: str | None = None  # why, or "" if all went well
        self._has_left = False
        self.rounds = 0
        self.skipped = 0
        self.refused = 0
        self.compute_s = 0.0

    def steps(self, num_rounds: int) -> Iterator[int]:
        """The rounds that this worker takes part in, of the next `num_rounds`; waits for each."""
        end = self._next_round + num_rounds
        while True:
            self._await_news(end)
            if self._order is None or self._order[0] >= end:
                break
            round = self._order[0]
            yield round
            if self._order is not None and self._order[0] == round:
                raise CompatibilityError(
                    f"backward was not called in step {round}: the master waits for what it computes; call "
                    "coded.backward(loss) once in each step"
                )
        self._next_round = end
        self._next_job += num_rounds - self._delay

    def backward(self, loss: PartLoss) -> None:
        """Computes the newest tasks and sends the answer, or drops it if there are newer ones.

        Raises:
            CompatibilityError: The model or its loss breaks a rule.
        """
        if self._order is None:
            raise CompatibilityError(
                "backward was called where no step is under way; call it once in each turn of "
                "`for step in coded.steps(...)`"
            )
        round, tasks = self._order
        self._newest = round
        try:
            if self._unchecked:
                self._computation.models[tasks[0].job % len(self._computation.models)].write(
                    self._parameters[tasks[0].job]
                )
                rules.check(self._computation, tasks[0], loss)
                self._unchecked = False
            found = self._computation.answer(tasks, self._parameters, loss, self._is_superseded)
        except Exception as error:
            self.end(f"{type(error).__name__}: {error}")
            raise
        if found is None:
            self.skipped += 1
            if self._done <= round:  # else the master has heard that the loop is over, which says as much
                self._send(Message(Kind.SKIPPED, round, self._transport.rank))
            return
        self.rounds += 1
        self.compute_s += found.compute_s
        self._send(answers.to_message(Kind.ANSWER, round, self._transport.rank, found))
        if self._order is not None and self._order[0] == round:
            self._order = None

    def end(self, reason: str = "") -> None:
        """Tells the master not to count on this worker any more."""
        if not self._has_left and self._ended is None:
            self._has_left = True
            left = reason or "it has left the training"
            self._send(reason_message(Kind.FAILED, self._next_round, self._transport.rank, left))

    @property
    def position(self) -> tuple[int, int]:
        """The next job and round; inside a loop those that it began with."""
        return self._next_job, self._next_round

    @property
    def step(self) -> int:
        """Jobs that were due when this worker last computed."""
        return self._next_job + max(0, self._newest + 1 - self._next_round - self._delay)

    def start_at(self, job: int, round: int) -> None:
        """Goes on with this round, before the first step."""
        self._next_job = job
        self._next_round = self._done = round

    def _await_news(self, end: int) -> None:
        """Until there are tasks, the loop is over, or everything is."""
        while self._take(0.0):  # the newest counts
            pass
        since = time.monotonic()
        while self._order is None and self._done < end and self._ended is None:
            if self._take(_LOOK_S):
                since = time.monotonic()
                while self._take(0.0):
                    pass
            elif MASTER in self._transport.lost:
                raise PeerLostError("the master, rank 0, is gone: the job cannot go on without it", (MASTER,))
            elif time.monotonic() - since <= self._patience_s:
                self._transport.probe(MASTER)  # a receive does not always notice that the other side has died
            else:
                raise PeerLostError(
                    f"the master, rank 0, has said nothing for {self._patience_s:g} s, twice the deadline of a round; "
                    "give a longer deadline_s if it has so much else to do between two steps",
                    (MASTER,),
                )
        if self._ended:
            raise DistoptError(f"the master has ended the training: {self._ended}")

    def _is_superseded(self) -> bool:
        """Whether nobody waits any more for what is being computed."""
        before = self._order
        while self._take(0.0):
            pass
        return self._order is not before or self._ended is not None

    def _take(self, timeout_s: float) -> bool:
        got = self._transport.receive(timeout_s)
        if got is None:
            return False
        try:
            told = message.decode(got[1])
            if got[0] != MASTER or told.sender != MASTER:
                raise DecodeError(f"only rank {MASTER} tells a worker what to do, got a message of {told.sender}")
            self._follow(told)
        except DecodeError as error:
            self.refused += 1
            _log.warning("refused a message of rank %d: %s", got[0], error)
        return True

    def _follow(self, told: Message) -> None:
        models = self._computation.models
        if told.kind == Kind.PARAMETERS:
            _check_specs(told, models[told.round % len(models)].specs)
            self._parameters[told.round] = list(told.tensors)
        elif told.kind == Kind.TASKS:
            tasks = tasks_of(told)
            if missing := {task.job for task in tasks} - set(self._parameters):
                raise DecodeError(f"tasks of round {told.round} need the parameters of jobs {sorted(missing)}")
            self._order = (told.round, tasks)
            # By job, not by round: with a delay T rounds run ahead of jobs by T more with every loop.
            for job in [job for job in self._parameters if job < max(self._parameters) - self._delay]:
                del self._parameters[job]
        elif told.kind == Kind.DONE:
            _check_specs(told, [spec for flat in models for spec in flat.specs])
            self._done, self._order = told.round, None
            flats = iter(told.tensors)
            for flat in models:
                flat.write([next(flats) for _ in flat.specs])
            self._send(Message(Kind.SEEN, told.round, self._transport.rank))
        elif told.kind == Kind.END:
            self._ended, self._order = str(text_of(told)), None
        else:
            raise DecodeError(f"a worker is told kinds {[*Kind]}, got {told.kind}")

    def _send(self, said: Message) -> None:
        self._transport.send(MASTER, message.encode(said))


def _check_specs(told: Message, expected: Sequence[TensorSpec]) -> None:
    found = [TensorSpec(tuple(tensor.shape), tensor.dtype) for tensor in told.tensors]
    if found != list(expected):
        raise DecodeError(f"the model has flat parameters {list(expected)}, got {found}")

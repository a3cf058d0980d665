"""The master's role: gives tasks, waits only as long as the stop rule says, decodes, leaves the gradient to the user.

A round: each worker is sent the parameters it does not have yet and its tasks; answers are taken as they come; when the
rule is content the job that is due is decoded, from the answers in the order of the workers. Late answers are received
and counted, and used where a scheme still can. A worker that owes more than `WINDOW` answers is sent nothing until it
speaks, so what is kept for a frozen worker is bounded; when it speaks it gets the current round.

A worker that is lost, or has failed, is a straggler for ever. Training goes on while the rest decodes.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from distopt.coding import answer as answers
from distopt.coding.answer import Answer
from distopt.coding.code import Code
from distopt.coding.combine import combine
from distopt.coding.flat import FlatModel
from distopt.coding.one_round import OneRound
from distopt.coding.orders import Kind, reason_message, tasks_message, text_of
from distopt.coding.parity import disagreement
from distopt.coding.scheme import Run, Scheme, Task
from distopt.coding.statistics import Statistics
from distopt.coding.stopping import StopRule
from distopt.comm import Message, Transport, message
from distopt.errors import CompatibilityError, DecodeError, DesyncError, DistoptError
from distopt.spans import span

_log = logging.getLogger("distopt")

WINDOW = 2  # rounds that a worker may owe: one it computes, and a newer one to skip to
_PROBE_S = 1.0  # how often silent workers are probed
_COMPARED_ROUNDS = 16  # late answers to older rounds are not compared with those in time


class Master:
    """See the module.

    Args:
        transport: To the workers: worker i is rank i + 1.
        scheme: Who computes what.
        rows: The place in the scheme of each worker.
        models: Job t is for model t modulo their number.
        rule: When a round ends.
        deadline_s: How long a round may take.
        amplification_limit: Largest norm of the coefficients of a gradient code with which a round ends.
        replicas: "error" or "warn" where workers that ought to agree do not; "ignore" does not look.
        tolerance: Relative difference of replicas that counts as rounding.
    """

    def __init__(
        self,
        transport: Transport,
        scheme: Scheme,
        rows: Sequence[int],
        models: Sequence[FlatModel],
        rule: StopRule,
        *,
        deadline_s: float,
        amplification_limit: float,
        replicas: str,
        tolerance: float,
    ) -> None:
        self.statistics = Statistics(scheme.num_workers)
        self._transport = transport
        self._scheme = scheme
        self._code: Code | None = scheme.code if isinstance(scheme, OneRound) else None
        self._row_of = list(rows)
        self._worker_at = [rows.index(row) for row in range(scheme.num_workers)]
        self._models = models
        self._rule = rule
        self._deadline_s = deadline_s
        self._amplification_limit = amplification_limit
        self._replicas, self._tolerance = replicas, tolerance

        self._run: Run | None = None
        self._round_base = 0  # the first round and job of the run
        self._job_base = 0
        self._round = -1  # under way, counted over all runs
        self._began = 0.0
        self._amplified = -1  # the latest round that waited because of its amplification
        self._probed = time.monotonic()
        self._starts: dict[int, float] = {}
        self._tasks: list[list[Task]] = []  # of the current round by place in the scheme
        self._published: dict[int, Tensor] = {}  # frames with the parameters of jobs that are not decoded
        self._has: list[set[int]] = [set() for _ in rows]  # jobs whose parameters each worker was sent
        self._owes: list[dict[int, int]] = [{} for _ in rows]  # rounds it was sent, with their number of tasks
        self._newest_sent = [-1 for _ in rows]  # the newest round whose tasks each worker was sent
        self._done: Tensor | None = None  # the frame that says that the loop is over
        self._told_done: list[bool] = [True for _ in rows]
        self._unseen: list[int] = [0 for _ in rows]  # how many ends of loops each worker was told and has not seen yet
        self._answers: dict[tuple[int, int], Answer] = {}  # by round and worker
        self._fingerprints: dict[int, dict[int, tuple[float, ...]]] = {}  # by round and row
        self._failed: dict[int, str] = {}
        self._announced: set[int] = set()
        self._ended = False

    @property
    def position(self) -> tuple[int, int]:
        """The next job and round, counted over all runs."""
        decoded = 0 if self._run is None else max(0, self._round - self._round_base - self._scheme.delay + 1)
        return self._job_base + decoded, self._round + 1

    def start_at(self, job: int, round: int) -> None:
        """Goes on with this job and round, before the first step."""
        self._job_base, self._round = job, round - 1

    @property
    def gone(self) -> dict[int, str]:
        """Workers that are lost or have failed, with what is known."""
        lost = {rank - 1: "its connection is gone" for rank in self._transport.lost if rank}
        return dict(sorted({**lost, **self._failed}.items()))

    def steps(self, num_steps: int) -> Iterator[int]:
        """The rounds of the next `num_steps` gradients."""
        if self._run is not None:
            self._forget_loop()
        self._run = run = self._scheme.begin(num_steps)
        self._round_base = self._round + 1
        self._done = None
        for local in range(run.num_rounds):
            yield self._round_base + local
            if run.round != local:
                raise CompatibilityError(
                    f"backward was not called in step {self._round_base + local}; call coded.backward(loss) once in "
                    "each step, on every rank"
                )
        self._finish_loop()
        self._job_base += num_steps
        self._run = None

    def backward(self) -> float | None:
        """One round. Sets the gradients of the model whose job is due and clears all others.

        Returns:
            The mean loss over the samples of the job that is due; None in the first T rounds, when none is.

        Raises:
            DecodeError: Too many workers are missing.
            DesyncError: Workers that ought to send the same gradient do not.
        """
        run = self._run
        if run is None or run.round + 1 >= run.num_rounds:
            raise CompatibilityError(
                "backward was called where no step is under way; call it once in each turn of "
                "`for step in coded.steps(...)`"
            )
        try:
            with span("coding", "round"):
                self._begin_round(run)
                self._wait(run)
                self._end_round(run)
            with span("coding", "decode"):
                return self._decode_due(run)
        except DistoptError as error:
            self.end(f"{type(error).__name__}: {error}")
            raise

    def end(self, reason: str = "") -> None:
        """Tells all workers that nothing more comes; a reason makes it an error there."""
        if self._ended:
            return
        self._ended = True
        for worker, told in enumerate(self._told_done):
            if not told and self._done is not None:
                self._send(worker, self._done)
        frame = message.encode(reason_message(Kind.END, self._round + 1, 0, reason))
        for worker in range(len(self._row_of)):
            self._send(worker, frame)

    # -- a round -----------------------------------------------------------------------------------------------------

    def _begin_round(self, run: Run) -> None:
        self._round += 1
        local = self._round - self._round_base
        self._tasks = run.tasks(local)
        if local < run.num_jobs:
            self._publish(self._job_base + local)
        self._began = self._starts[self._round] = time.monotonic()
        self.statistics.begin(self._round, self._began)
        for worker in range(len(self._row_of)):
            self._send_tasks(worker)
        self._probe([worker for worker in range(len(self._row_of)) if self._num_owed(worker) >= WINDOW])

    def _probe(self, silent: Sequence[int]) -> None:
        """Finds out, now and then, whether those who are silent are lost: a receive does not always notice."""
        if time.monotonic() - self._probed > _PROBE_S:
            self._probed = time.monotonic()
            for worker in silent:
                self._transport.probe(worker + 1)

    def _publish(self, job: int) -> None:
        flats = self._models[job % len(self._models)].read()
        self._published[job] = message.encode(Message(Kind.PARAMETERS, job, 0, tuple(flats)))

    def _wait(self, run: Run) -> None:
        local = self._round - self._round_base
        first_s = math.inf
        while True:
            elapsed = time.monotonic() - self._began
            if self._may_stop(run, local, elapsed, first_s):
                return
            silent = [self._worker_at[row] for row in run.missing(local)]
            gone = [worker for worker in silent if worker in self.gone]
            if len(gone) == len(silent) or elapsed > self._deadline_s:
                if run.may_end(local):
                    return  # the rule would wait for more, but nobody else comes
                raise self._too_few(silent, elapsed)
            if not self._can_do_without(gone):
                raise self._too_few(gone, elapsed)
            check_s = self._rule.next_check_s(first_s)
            waits = [self._deadline_s - elapsed, _PROBE_S, *([check_s - elapsed] if check_s else [])]
            answered = self._receive(max(1e-4, min(wait for wait in waits if wait > 0)) if max(waits) > 0 else 0.0)
            if answered == self._round and first_s == math.inf:
                first_s = time.monotonic() - self._began
            self._probe(silent)

    def _can_do_without(self, gone: Sequence[int]) -> bool:
        """Whether it is worth waiting for those who are silent and not gone."""
        if self._code is None or len(gone) <= self._code.tolerance:
            return True
        return self._code.decodable(set(range(self._code.num_workers)) - {self._row_of[worker] for worker in gone})

    def _may_stop(self, run: Run, local: int, elapsed: float, first_s: float) -> bool:
        if not self._rule.ends(run, local, elapsed, first_s):
            return False
        if self._code is None or not run.missing(local) or math.isinf(self._amplification_limit):
            return True
        answered = set(range(self._scheme.num_workers)) - set(run.missing(local))
        with suppress(DecodeError):  # enough of them, but too ill-conditioned
            if self._code.amplification(answered) <= self._amplification_limit:
                return True
        if self._amplified != self._round:  # asked again and again; a round counts once
            self._amplified = self._round
            self.statistics.waited_for_amplification += 1
        return False

    def _end_round(self, run: Run) -> None:
        self.statistics.end(self._round, time.monotonic() - self._began)
        self._compare(self._round)
        for worker, known in self.gone.items():
            if worker not in self._announced:
                self._announced.add(worker)
                _log.warning("worker %d (rank %d) counts as a straggler from now on: %s", worker, worker + 1, known)
        oldest = self._round - self._scheme.delay
        self._answers = {key: kept for key, kept in self._answers.items() if key[0] >= oldest}
        for round in [round for round in self._fingerprints if round < self._round - _COMPARED_ROUNDS]:
            del self._fingerprints[round]
        owed = [round for owes in self._owes for round in owes]
        for round in [round for round in self._starts if round < min([self._round, *owed])]:
            del self._starts[round]

    def _decode_due(self, run: Run) -> float | None:
        for flat in self._models:
            flat.clear_gradients()
        local = self._round - self._round_base
        due = local - self._scheme.delay
        if due < 0:
            return None
        terms = sorted(run.decode(due))  # by round, place and task: the order of arrival changes no bit
        results = [
            self._answers[self._round_base + term.round, self._worker_at[term.worker]].results[term.task]
            for term in terms
        ]
        coefficients = [term.coefficient for term in terms]
        loss = sum(c * result.loss for c, result in zip(coefficients, results, strict=True))
        count = sum(c * result.count for c, result in zip(coefficients, results, strict=True))
        flats = [
            combine(list(vectors), coefficients).div_(count)
            for vectors in zip(*(result.vectors for result in results), strict=True)
        ]
        used = torch.stack([result.used for result in results]).amax(0)
        job = self._job_base + due
        self._models[job % len(self._models)].write_gradients(flats, used)
        self._published.pop(job, None)
        error = 0.0
        if self._code is not None and not self._code.exact:
            error = self._code.error([term.worker for term in terms])
        self.statistics.decoded(float(np.linalg.norm(coefficients)), error)
        return loss / count

    def _forget_loop(self) -> None:
        """A loop was left by `break`: jobs that were not decoded begin anew, with the parameters as they are now."""
        self._job_base, _ = self.position
        self._published.clear()
        self._answers.clear()
        self._has = [set() for _ in self._has]

    def _finish_loop(self) -> None:
        """Every worker gets the parameters as they are now, so that all ranks end the loop with one model."""
        flats = [flat for model in self._models for flat in model.read()]
        self._done = message.encode(Message(Kind.DONE, self._round + 1, 0, tuple(flats)))
        self._published.clear()
        self._answers.clear()
        self._tasks = []
        self._told_done = [False for _ in self._row_of]
        for worker in range(len(self._row_of)):
            self._send_next(worker)

    # -- messages ----------------------------------------------------------------------------------------------------

    def _send_next(self, worker: int) -> None:
        if self._done is None:
            self._send_tasks(worker)
        elif not self._told_done[worker] and self._num_owed(worker) < WINDOW:
            self._told_done[worker] = True
            self._unseen[worker] += 1
            self._send(worker, self._done)

    def _num_owed(self, worker: int) -> int:
        return len(self._owes[worker]) + self._unseen[worker]

    def _send_tasks(self, worker: int) -> None:
        tasks = self._tasks[self._row_of[worker]] if self._tasks else []
        is_busy = self._num_owed(worker) >= WINDOW
        if not tasks or self._newest_sent[worker] == self._round or is_busy or worker in self._failed:
            return
        self._newest_sent[worker] = self._round
        has = self._has[worker]
        has -= {job for job in has if job < self._job_base + self._round - self._round_base - self._scheme.delay}
        own = [Task(self._job_base + task.job, task.row) for task in tasks]
        for job in sorted({task.job for task in own} - has):
            self._send(worker, self._published[job])
            has.add(job)
        self._owes[worker][self._round] = len(own)
        self._send(worker, message.encode(tasks_message(self._round, 0, own)))

    def _send(self, worker: int, frame: Tensor) -> None:
        self._transport.send(worker + 1, frame)
        self.statistics.bytes_sent += frame.numel()

    def _receive(self, timeout_s: float) -> int | None:
        """Takes one message; the round that it answers, if it does."""
        got = self._transport.receive(timeout_s)
        if got is None:
            return None
        source, frame = got
        worker = source - 1
        try:
            said = message.decode(frame)
            self.statistics.bytes_received += message.length(frame)
            if said.sender != source or not 0 <= worker < len(self._row_of):
                raise DecodeError(f"a message of rank {source} says that it is of rank {said.sender}")
            return self._heed(worker, said)
        except DecodeError as error:
            self.statistics.refuse(worker, str(error)[:200])
            _log.warning("refused a message of rank %d: %s", source, error)
            return None

    def _heed(self, worker: int, said: Message) -> int | None:
        if said.kind == Kind.FAILED:
            self._failed[worker] = str(text_of(said))
            return None
        if said.kind == Kind.SEEN and self._unseen[worker]:
            self._unseen[worker] -= 1
            self._skip(worker, said.round - 1)  # of the loop that is over
            return None
        num_tasks = self._owes[worker].get(said.round)
        if said.kind == Kind.SKIPPED and num_tasks:
            self._skip(worker, said.round)
            return None
        if said.kind != Kind.ANSWER or not num_tasks:
            raise DecodeError(
                f"worker {worker} owes answers to rounds {sorted(self._owes[worker])}, got kind {said.kind} for round "
                f"{said.round}"
            )
        model = self._models[0]
        found = answers.from_message(said, num_tasks, len(model.parameters), model.specs)
        self._settle(worker, said.round)
        self._take(worker, said.round, found)
        self._send_next(worker)
        return said.round

    def _skip(self, worker: int, last: int) -> None:
        """The worker does not answer what it owes up to this round."""
        newest = max((round for round in self._owes[worker] if round <= last), default=-1)
        if newest in self._starts:
            self.statistics.arrived(newest, worker, time.monotonic() - self._starts[newest])
        self._settle(worker, last)
        self._send_next(worker)

    def _settle(self, worker: int, round: int) -> None:
        """A worker answers the newest round only: those before are skipped."""
        self._owes[worker] = {owed: tasks for owed, tasks in self._owes[worker].items() if owed > round}

    def _take(self, worker: int, round: int, found: Answer) -> None:
        if round in self._starts:
            self.statistics.arrived(round, worker, time.monotonic() - self._starts[round], found.compute_s)
        row = self._row_of[worker]
        if self._run is not None and round >= self._round_base:
            self._run.record(round - self._round_base, row)
            if round >= self._round - self._scheme.delay:
                self._answers[round, worker] = found
        if self._code is not None and self._replicas != "ignore":
            self._fingerprints.setdefault(round, {})[row] = found.results[0].fingerprint
            if round != self._round:
                self._compare(round)

    def _compare(self, round: int) -> None:
        """Whether those who ought to have sent messages that fit together did."""
        found = self._fingerprints.get(round, {})
        if self._code is None or self._replicas == "ignore" or len(found) < 2:
            return
        rows = sorted(found)
        wrong = disagreement(self._code, rows, np.array([found[row] for row in rows]), tolerance=self._tolerance)
        if wrong is None:
            return
        self.statistics.disagreements += 1
        named = ", ".join(
            f"worker {self._worker_at[row]} (rank {self._worker_at[row] + 1})"
            for some in wrong.suspects
            for row in some
        )
        text = (
            f"workers that computed the same parts in round {round} differ by {wrong.relative_size:.2g} of the "
            f"gradient: {named}; something depends on who computes: buffers, a data set that differs, random numbers "
            "from elsewhere, another kind of processor"
        )
        if self._replicas == "error":
            raise DesyncError(f'{text}; replicas="warn" goes on with what arrives first')
        _log.warning("%s", text)

    def _too_few(self, silent: Sequence[int], elapsed: float) -> DecodeError:
        gone = self.gone
        reasons: dict[str, list[int]] = {}
        for worker in sorted(silent):
            reasons.setdefault(gone.get(worker, f"no answer for {elapsed:.3g} s"), []).append(worker)
        named = "; ".join(f"{_name(workers)} ({reason})" for reason, workers in reasons.items())
        return DecodeError(
            f"round {self._round} cannot be decoded without {named}; {self._scheme!r} tolerates fewer stragglers: "
            "start again with those that are left, with a larger s, or with a longer deadline_s than "
            f"{self._deadline_s:g}",
            sorted(silent),
        )


def _name(workers: Sequence[int]) -> str:
    """The workers and their ranks, for people."""
    numbers, ranks = ", ".join(map(str, workers)), ", ".join(str(worker + 1) for worker in workers)
    return f"worker{'s' * (len(workers) > 1)} {numbers}, rank{'s' * (len(workers) > 1)} {ranks}"

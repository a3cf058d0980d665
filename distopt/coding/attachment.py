"""A coded training: what `GradientCoding(...).attach(model, optimizer)` returns on the master and on every worker."""

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distopt.coding import answer as answers
from distopt.coding import report as reports
from distopt.coding.computing import Computation, PartLoss
from distopt.coding.data_parts import Batches
from distopt.coding.flat import FlatModel
from distopt.coding.handshake import Facts, gather, greet
from distopt.coding.master import Master
from distopt.coding.one_round import OneRound
from distopt.coding.placement import placement
from distopt.coding.repetition import RepetitionCode
from distopt.coding.scheme import Scheme
from distopt.coding.sequential import SequentialCode
from distopt.coding.sharded import Sharded
from distopt.coding.trace import Trace
from distopt.coding.worker import MASTER, Worker
from distopt.comm import TensorSpec, Transport, find_job, frame_bytes
from distopt.errors import CompatibilityError, ConfigError, DistoptError, StateMismatchError
from distopt.version import __version__

if TYPE_CHECKING:
    from distopt.coding.configuration import GradientCoding  # which imports this module, to make attachments

FORMAT = 1
_TEXT_BYTES = 1 << 16
_CLOSE_S = 10.0


class CodedTraining:
    """See `GradientCoding.attach` for arguments and errors. Also a context manager.

    Attributes:
        algorithm: The configuration at work.
        scheme: The code or sequential scheme that it means for this job.
        rank: Of this process.
        batches: Which samples a step takes, if given.
    """

    family: ClassVar = "coding"

    def __init__(
        self,
        algorithm: "GradientCoding",
        models: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        batches: Batches | None,
        process_group: dist.ProcessGroup | None,
        transport: str | Transport,
    ) -> None:
        self.algorithm = algorithm
        self.batches = batches
        job = find_job(transport, process_group)
        if job.size < 2:
            raise CompatibilityError(
                f"gradient coding needs a master and workers, got a job of {job.size} rank; start at least 3 ranks"
            )
        problem: DistoptError | None = None
        longest = _TEXT_BYTES
        facts: Facts = {}
        try:
            flats = [FlatModel(model) for model in models]
            self.scheme = algorithm.scheme_for(job.size - (algorithm.master == "first"))
            _check(algorithm, self.scheme, flats, optimizers)
            facts = _facts(algorithm, flats, batches)
            longest = max(_TEXT_BYTES, _longest_frame(self.scheme, flats))
        except DistoptError as error:
            problem = error
        self.rank = job.rank
        talks_to_all = job.rank == MASTER or algorithm.master == "sharded"
        self._transport = job.open(longest, None if talks_to_all else [MASTER])
        try:
            self._take_role(problem, facts, flats if problem is None else [])
        except DistoptError:
            self._transport.close(_CLOSE_S)
            raise
        self._in_loop = self._has_begun = False
        self._attached = True

    def _take_role(self, problem: DistoptError | None, facts: Facts, flats: list[FlatModel]) -> None:
        algorithm = self.algorithm
        node = [os.environ.get("GROUP_RANK"), socket.gethostname()]
        early: Sequence[tuple[int, Tensor]] = ()
        if self.rank == MASTER:
            nodes = gather(self._transport, facts, node, problem, algorithm.deadline_s)
        else:
            nodes, early = greet(self._transport, facts, node, problem, algorithm.deadline_s)
        computation = Computation(flats, self.scheme.chunks, self.batches, algorithm.seed)
        self._role: Master | Worker | Sharded
        if algorithm.master == "sharded":
            assert isinstance(self.scheme, OneRound)
            assert isinstance(self.scheme.code, RepetitionCode)
            self._role = Sharded(
                self._transport,
                self.scheme.code,
                placement(self.scheme.code, nodes),
                computation,
                deadline_s=algorithm.deadline_s,
                checks_rules=algorithm.check_rules,
                early=early,
            )
        elif self.rank == MASTER:
            self._role = Master(
                self._transport,
                self.scheme,
                self._rows(nodes[1:]),
                flats,
                algorithm.rule(),
                deadline_s=algorithm.deadline_s,
                amplification_limit=algorithm.amplification_limit,
                replicas=algorithm.replicas,
                tolerance=algorithm.replica_tolerance or _rounding(flats),
            )
        else:
            self._role = Worker(
                self._transport,
                computation,
                delay=self.scheme.delay,
                patience_s=2 * algorithm.deadline_s,
                checks_rules=algorithm.check_rules,
            )

    def _rows(self, nodes: Sequence[Any]) -> list[int]:
        """The place in the scheme of each worker, by its code or the code inside."""
        if isinstance(self.scheme, OneRound):
            return placement(self.scheme.code, nodes)
        if isinstance(self.scheme, SequentialCode) and self.scheme.inner_stragglers < self.scheme.n:
            return placement(self.scheme.inner, nodes)
        return list(range(self.scheme.num_workers))

    @property
    def is_master(self) -> bool:
        """Whether gradients arrive at this rank; at all ranks with a sharded master."""
        return not isinstance(self._role, Worker)

    @property
    def worker(self) -> int | None:
        """The number of this worker, from 0; None on a master that does not compute."""
        if isinstance(self._role, Sharded):
            return self.rank
        return None if isinstance(self._role, Master) else self.rank - 1

    @property
    def num_workers(self) -> int:
        """Ranks that compute."""
        return self.scheme.num_workers

    @property
    def step(self) -> int:
        """Gradients so far, those before a checkpoint included; on a worker those due when it last computed."""
        return self._role.step if isinstance(self._role, Worker) else self._role.position[0]

    def steps(self, num_steps: int) -> Iterator[int]:
        """The next steps. On the master every one; a worker skips those that are over when it gets to them.

        With a sequential scheme there are T more rounds than gradients. When the loop ends, every rank that is there
        has the parameters of the master.

        Args:
            num_steps: Gradients to compute, the same number on every rank.
        """
        if not isinstance(num_steps, int) or num_steps < 1:
            raise ConfigError(f"num_steps must be an integer of at least 1, got {num_steps!r}")
        self._in_loop = self._has_begun = True
        rounds = num_steps + self.scheme.delay if isinstance(self._role, Worker) else num_steps
        yield from self._role.steps(rounds)
        self._in_loop = False

    def backward(self, loss: PartLoss) -> float | None:
        """In place of `loss.backward()`: on the master `p.grad` is then the gradient of the mean over the batch.

        On a worker the parameters have no gradient, so `optimizer.step()` passes over them. With a sequential scheme
        the gradient is that of the job that is due, T rounds old, and in the first T rounds there is none.

        Args:
            loss: From a `DataPart` to the sum of the losses of its samples (a scalar that requires a gradient); with
                the number of samples, as a pair, if `attach` was given no `batches`.

        Returns:
            On the master the mean loss of the batch, None while no gradient is due; on a worker None.

        Raises:
            DecodeError: Too many workers are missing, on the master; names them. Workers raise `DistoptError`.
            DesyncError: Workers that computed the same parts differ, on the master.
            CompatibilityError: The model or its loss breaks a rule of `distopt.coding.rules`, on a worker.
            PeerLostError: The master is gone, on a worker.
        """
        if isinstance(self._role, Master):
            return self._role.backward()
        return self._role.backward(loss)

    def stats(self) -> dict[str, Any]:
        """Numbers since attach, of this rank, without a word to the others; see docs/coding.md for every key."""
        known: dict[str, Any] = {
            "algorithm": self.algorithm.name,
            "scheme": self.scheme.to_dict(),
            "load": self.scheme.load,
            "rank": self.rank,
            "role": type(self._role).__name__.lower(),
        }
        if not isinstance(self._role, Worker):
            return {**known, **self._role.statistics.report(self._role.gone)}
        return {
            **known,
            "steps": self._role.rounds,
            "skipped": self._role.skipped,
            "compute_s": self._role.compute_s,
            "refused_messages": self._role.refused,
        }

    def report(self) -> str:
        """Who was slow, what was waited for and what coding saved, for people; of the master."""
        return reports.as_text(self.stats(), reports.name_of(self.scheme)) if self.is_master else ""

    def trace(self) -> Trace:
        """The seconds of each round and worker so far, for `distopt plan-code`; of the master.

        Raises:
            CompatibilityError: This rank is a worker, or there has been no round.
        """
        history = self._history("trace")
        assert not isinstance(self._role, Worker)  # whose history is empty
        return reports.as_trace(history, self.scheme, gone=self._role.gone, now_s=time.monotonic())

    def plot_arrivals(self, path: Path) -> None:
        """Draws when each answer of each round came, as a PNG; of the master.

        Raises:
            CompatibilityError: This rank is a worker, there has been no round, or matplotlib is not installed.
        """
        reports.plot_arrivals(self._history("plot_arrivals"), path)

    def state_dict(self) -> dict[str, Any]:
        """Where the training is; between two loops the same on every rank, inside one what rank 0 says counts.

        Model and optimizer are the user's to save, on rank 0.

        Raises:
            CompatibilityError: Inside a loop over `steps` with a sequential scheme, whose jobs are under way.
        """
        if self._in_loop and self.scheme.delay:
            raise CompatibilityError(
                f"{self.scheme!r} has {self.scheme.delay} jobs under way inside `for step in coded.steps(...)`; save "
                "after the loop, and use several loops"
            )
        step, round = self._role.position
        return {"format": FORMAT, "algorithm": self.algorithm.name, "step": step, "round": round}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on after the step that was saved. To be called on every rank, before the first step.

        Raises:
            StateMismatchError: It is no state of a coded training.
            CompatibilityError: A step was made already.
        """
        known = isinstance(state_dict, Mapping) and state_dict.get("algorithm") == self.algorithm.name
        if not known or state_dict.get("format") != FORMAT:
            raise StateMismatchError(
                f"the state must be one of {self.algorithm.name!r}, got {state_dict!r}; load what state_dict() gave"
            )
        step, round = state_dict.get("step"), state_dict.get("round")
        if not isinstance(step, int) or not isinstance(round, int) or not 0 <= step <= round:
            raise StateMismatchError(
                f"the state must have a step and a round, 0 <= step <= round, got {step!r} and {round!r}; load what "
                "state_dict() gave"
            )
        if self._has_begun:
            raise CompatibilityError(
                "load_state_dict was called after the first step; call it right after attach, on every rank"
            )
        self._role.start_at(step, round)

    def detach(self) -> None:
        """Ends this rank's part. The master tells the workers, which may then leave their loops."""
        self._close("")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close("" if error is None else f"{type(error).__name__}: {error}")

    def _close(self, reason: str) -> None:
        if not self._attached:
            return
        self._attached = False
        self._role.end(reason)
        self._transport.close(_CLOSE_S)

    def _history(self, what: str) -> list[reports.Arrivals]:
        history = [] if isinstance(self._role, Worker) else list(self._role.statistics.history)
        if not history:
            raise CompatibilityError(f"{what} is known on the master, rank 0, after a step; this is rank {self.rank}")
        return history


def _check(
    algorithm: "GradientCoding",
    scheme: Scheme,
    flats: Sequence[FlatModel],
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    if len(flats) not in (1, scheme.delay + 1):
        raise CompatibilityError(
            f"{scheme!r} trains one model, or T + 1 = {scheme.delay + 1} in turns, got {len(flats)}; give so many"
        )
    if len(optimizers) != len(flats):
        raise CompatibilityError(f"each model needs an optimizer, got {len(optimizers)} for {len(flats)} models")
    for flat, optimizer in zip(flats, optimizers, strict=True):
        if flat.specs != flats[0].specs or len(flat.parameters) != len(flats[0].parameters):
            raise CompatibilityError("the models trained in turns must have equal parameters, got different shapes")
        known = {id(p) for p in flat.parameters}
        if not any(id(p) in known for group in optimizer.param_groups for p in group["params"]):
            raise CompatibilityError(
                "the optimizer must hold parameters of its model, got none; make it from model.parameters(), of this "
                "very model"
            )
        coarse = [spec.dtype for spec in flat.specs if spec.dtype.itemsize < 4]
        code = scheme.code.name if isinstance(scheme, OneRound) else getattr(scheme, "code", "")
        if coarse and code in ("cyclic", "cyclic_mds"):
            raise CompatibilityError(
                f"code {code!r} needs parameters of at least 32 bits, got {coarse[0]}: its coefficients "
                "amplify rounding errors; use code='auto'"
            )


def _facts(algorithm: "GradientCoding", flats: Sequence[FlatModel], batches: Batches | None) -> Facts:
    return {
        "version of distopt": __version__,
        "configuration": _jsonable(algorithm.to_dict()),
        "parameters": [flat.describe() for flat in flats],
        "buffers and frozen parameters": [flat.fixed_values() for flat in flats],
        # One master sends them; ranks that all decode start from their own.
        "trained parameters": [flat.trained_values() for flat in flats] if algorithm.master == "sharded" else None,
        "batches (samples, batch size, seed)": batches.describe() if batches is not None else None,
    }


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(each) for key, each in value.items()}
    return [_jsonable(each) for each in value] if isinstance(value, list | tuple) else value


def _longest_frame(scheme: Scheme, flats: Sequence[FlatModel]) -> int:
    """The longest message between two ranks."""
    num_tasks, num_chunks = scheme.delay + 1, len(scheme.chunks)
    vectors = flats[0].specs
    answer = answers.specs(num_tasks, len(flats[0].parameters), vectors)
    parameters = [spec for flat in flats for spec in flat.specs]
    rows = [TensorSpec((num_tasks,), torch.int64)] * 2 + [TensorSpec((num_tasks * num_chunks,), torch.float64)] * 2
    return max(frame_bytes(specs, 1) for specs in (answer, parameters, rows))


def _rounding(flats: Sequence[FlatModel]) -> float:
    return 0.05 if any(spec.dtype.itemsize < 4 for spec in flats[0].specs) else 1e-4

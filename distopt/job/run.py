"""A job at work: the algorithm attached, its checkpoints kept and its numbers written as the job says.

::

    with distopt.Job.load("distopt.toml").attach(model, optimizer, scheduler=scheduler) as run:
        for step in run.steps(10_000):  # or run.epochs(20); from where the newest checkpoint is
            ...
            optimizer.step()
            scheduler.step()

Limits: but for a loader whose batch grows, the order of the data and the states of random generators are the
loop's own: seed them by step or epoch.
"""

import inspect
import logging
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from distopt import observe
from distopt.batch import BatchController
from distopt.config import check_count
from distopt.errors import CompatibilityError, ConfigError, StateMismatchError
from distopt.job.checkpoint_folder import CheckpointFolder, Mark, Part
from distopt.job.keeping import Keeper, keeper_for

if TYPE_CHECKING:
    from distopt.job.description import Job  # which imports this module, to make runs

_log = logging.getLogger("distopt")


class Run:
    """Made by `Job.attach(model, optimizer)`; see there for arguments and errors. Also a context manager.

    Attributes:
        job: What it does.
        attachment: What the algorithm's `attach` returned.
        recorder: What writes the log; None where the job has no table `log`.
        batch: What grows the batch, for its `steps` and `backward`; None where the job has no table `batch`.
        resumed: The checkpoint that it goes on from, "step-1200" say; None for none.
    """

    def __init__(
        self,
        job: "Job",
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        parts: Mapping[str, Part],
        options: Mapping[str, Any],
        loader: Any = None,
    ) -> None:
        self.job = job
        self.batch: BatchController | None = None
        attach = getattr(job.algorithm, "attach", None)
        if attach is None:
            raise CompatibilityError(
                f"a federated job has no model to attach to before its rounds, got {job.algorithm.name!r}; run it with "
                "distopt simulate (distopt simulate --init writes its file), or by distopt.federated"
            )
        if job.checkpoint is not None and options.get("join") is not None:
            raise CompatibilityError(
                f"a rank that joins later cannot resume, got join={options['join']!r} and a table checkpoint; give "
                "it a job without that table"
            )
        if unknown := sorted(options.keys() - inspect.signature(attach).parameters.keys()):
            known = ", ".join(list(inspect.signature(attach).parameters)[2:])
            raise ConfigError(f"{job.algorithm.name} takes {known} at attach, got {', '.join(unknown)}; leave that out")
        self.attachment = attach(model, optimizer, **options)
        self._mark: Mark | None = None
        self._keeper: Keeper | None = None
        self._done: dict[str, int] = {}  # of each unit, rounds of the loop whose body has ended
        self._saved = 0  # optimizer steps at the last checkpoint
        try:
            if job.batch is not None:
                self.batch = job.batch.attach(
                    model, optimizer, loader, beside=self.attachment, scaler=options.get("scaler")
                )
                parts = {**parts, "batch": self.batch}
            if job.checkpoint is not None:
                self._keeper = self._open_checkpoints(parts)
                self._mark = self._keeper.resume()
                if self._mark is not None:
                    self._done[self._mark.unit] = self._mark.done
                    _log.info("goes on from %s in %s", self._mark, job.checkpoint.folder)
            self._saved = self.attachment.step
            notes = None if self.batch is None else self.batch.notes
            self.recorder = (
                None if job.log is None else observe.record(self.attachment, optimizer, job.log, notes=notes)
            )
        except BaseException as error:
            if self.batch is not None:
                self.batch.__exit__(type(error), error, error.__traceback__)
            self.attachment.__exit__(type(error), error, error.__traceback__)
            raise
        self.resumed = None if self._mark is None else str(self._mark)

    def steps(self, num_steps: int) -> Iterator[int]:
        """The steps of the training loop, 0 to `num_steps` - 1, from where the newest checkpoint is.

        A second loop of this run begins behind the last step whose body has ended.

        A checkpoint is made behind the loop's body when a multiple of `every` steps is done, and at the end. In coded
        training these are the steps of `CodedTraining.steps`.
        """
        begun = self._begun("step", num_steps)
        if self.attachment.family == "coding":
            return self._coded_steps(begun, num_steps)
        return self._rounds("step", begun, num_steps)

    def epochs(self, num_epochs: int) -> Iterator[int]:
        """The epochs of the training loop, 0 to `num_epochs` - 1, from where the newest checkpoint is.

        A checkpoint is made behind the loop's body when `every` steps of the optimizer have been made since the last
        one, and at the end.

        Raises:
            CompatibilityError: The training is coded: it counts steps.
        """
        if self.attachment.family == "coding":
            raise CompatibilityError("coded training counts steps, got a loop over epochs; use run.steps(num_steps)")
        return self._rounds("epoch", self._begun("epoch", num_epochs), num_epochs)

    def note(self, **values: float) -> None:
        """Numbers of the user's own for the log, by name: a loss, an accuracy. Nothing where there is no log."""
        if self.recorder is not None:
            self.recorder.note(**values)

    def stats(self) -> dict[str, Any]:
        """The attachment's numbers since attach, of this rank."""
        found: dict[str, Any] = self.attachment.stats()
        return found

    def close(self) -> None:
        """Ends the log and detaches; also the end of a `with` block."""
        self.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self.recorder is not None:
                self.recorder.close()
        finally:
            if self.batch is not None:
                self.batch.__exit__(kind, error, traceback)
            self.attachment.__exit__(kind, error, traceback)

    def _open_checkpoints(self, parts: Mapping[str, Part]) -> Keeper:
        settings = self.job.checkpoint
        assert settings is not None
        return keeper_for(CheckpointFolder(settings.folder, keep=settings.keep), self.attachment, parts)

    def _begun(self, unit: str, total: object) -> int:
        """How many rounds of the loop are done."""
        check_count(f"num_{unit}s", total, low=0, remedy=f"use run.{unit}s(100)")
        if self._mark is not None and self._mark.unit != unit:
            raise StateMismatchError(
                f"the loop must count what the checkpoint counts, got {unit}s and {self._mark}; use "
                f"run.{self._mark.unit}s, or name another folder"
            )
        return self._done.get(unit, 0)

    def _rounds(self, unit: str, begun: int, total: int) -> Iterator[int]:
        for done in range(begun, total):
            yield done
            mark = Mark(unit, done + 1)
            self._done[unit] = mark.done
            if done + 1 == total or self._is_due(mark):
                self._save(mark)

    def _coded_steps(self, begun: int, total: int) -> Iterator[int]:
        if begun >= total:
            return
        for step in self.attachment.steps(total - begun):
            yield step
            mark = Mark("step", self.attachment.step)
            self._done["step"] = mark.done
            if not self.attachment.scheme.delay and mark.done < total and self._is_due(mark):  # else jobs are under way
                self._save(mark)
        self._done["step"] = total
        self._save(Mark("step", total))

    def _is_due(self, mark: Mark) -> bool:
        if self.job.checkpoint is None:
            return False
        every = self.job.checkpoint.every
        return mark.done % every == 0 if mark.unit == "step" else self.attachment.step - self._saved >= every

    def _save(self, mark: Mark) -> None:
        if self._keeper is not None:
            self._keeper.save(mark)
            self._mark, self._saved = mark, self.attachment.step

"""Writes what an attachment counts while a run goes on: lines of JSON, events, and a report at the end.

A step costs one comparison. Every so many steps `stats()` is read, which needs no collective, and one line is written.
"""

import atexit
import logging
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch.utils.hooks import RemovableHandle

from distopt.errors import CompatibilityError, ConfigError
from distopt.job import LogSettings
from distopt.observe.lines import line_file
from distopt.observe.plain import numbers, texts
from distopt.observe.report import report
from distopt.tensorboard import Events

_log = logging.getLogger("distopt")
_OPEN: "weakref.WeakSet[Recorder]" = weakref.WeakSet()  # of this process


class Observed(Protocol):
    """What is needed of an attachment."""

    @property
    def family(self) -> str:
        """The family that its numbers belong to: "ddp", "coding", "gossip", "local"."""

    @property
    def rank(self) -> int:
        """Which process of the whole job this is."""

    @property
    def step(self) -> int:
        """Completed steps of the job, those before a checkpoint included."""

    def stats(self) -> Mapping[str, Any]:
        """Numbers since attach, of this rank, without a collective."""


class Recorder:
    """Made by `record`; see there. Also a context manager that closes it.

    Attributes:
        settings: What is written, and where.
        rank: Of this process: in the names of its files.
    """

    def __init__(
        self,
        attachment: Observed,
        settings: LogSettings,
        *,
        rank: int | None,
        notes: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        self.settings = settings
        self._notes = notes
        self.rank = attachment.rank if rank is None else rank
        self._attachment = attachment
        self._folder = Path(settings.folder)
        self._events = Events(self._folder / f"rank-{self.rank}") if settings.tensorboard else None
        self._file = line_file(self._folder, self.rank)
        self._handles: list[RemovableHandle] = []
        self._values: dict[str, float] = {}
        self._texts: dict[str, str] = {}
        self._first: int | None = None  # of the steps since `record`
        self._last = self._due = 0
        self._began_s = self._last_s = 0.0
        self._open = True
        self._text = ""
        _OPEN.add(self)

    def watch(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Calls `stepped` after each step of these."""
        self._handles = [each.register_step_post_hook(lambda *_: self.stepped()) for each in optimizers]

    def stepped(self) -> None:
        """A step is done: writes a line if one is due. `record` has the optimizer call it."""
        step = self._attachment.step
        if self._first is not None and step < self._due:
            return
        self._write(step)

    def note(self, **values: float) -> None:
        """Numbers of the user's own for the lines from now on, by name: a loss, an accuracy."""
        self._values.update(values)

    def close(self) -> str:
        """Writes the last line and, on rank 0, `report.txt`; returns the report of this rank, "" if none is wanted.

        May be called after `detach` and more than once. A run that never calls it is closed when Python ends.
        """
        if not self._open:
            return self._text
        self._open = False
        _OPEN.discard(self)
        for handle in self._handles:
            handle.remove()
        if self._first is not None:
            if self._due < sys.maxsize and self._attachment.step > self._last:
                self._write(self._attachment.step)
            self._write_report()
        self._file.close()
        if self._events is not None:
            self._events.close()
        return self._text

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_open", False):  # of a run that has dropped it: its last line counts too
            self.close()

    def _write(self, step: int) -> None:
        now_s = time.perf_counter()
        if self._first is None:
            self._first, self._began_s, seconds_per_step = step, now_s, None
        else:
            seconds_per_step = (now_s - self._last_s) / (step - self._last) if step > self._last else None
        self._last, self._last_s = step, now_s
        self._due = (step // self.settings.every + 1) * self.settings.every
        stats = self._attachment.stats()
        if self._notes is not None:
            self.note(**self._notes())
        line = {
            "step": step,
            "time": time.time(),
            "seconds_per_step": seconds_per_step,
            "seconds": now_s - self._began_s,
            "first_step": self._first,
            "rank": self.rank,
            "family": self._attachment.family,
            "stats": stats,
            "values": dict(self._values),
        }
        try:
            self._file.write(line, first_step=self._first)
            if self._events is not None:
                speed = {} if seconds_per_step is None else {"seconds_per_step": seconds_per_step}
                self._events.write(step, {**numbers(stats), **speed, **self._values})
                self._write_texts(step, texts(stats))
        except OSError as error:  # a full disk must not end a training
            _log.warning("step %d is the last in the log: %s cannot be written (%s)", step, self._folder, error)
            self._due = sys.maxsize

    def _write_texts(self, step: int, found: dict[str, str]) -> None:
        """Once each, and again when it changes."""
        assert self._events is not None
        self._events.write_texts(step, {name: text for name, text in found.items() if self._texts.get(name) != text})
        self._texts = found

    def _write_report(self) -> None:
        if not self.settings.report:
            return
        try:
            self._text = report({self.rank: self._file.read()})
            if self.rank == 0:
                (self._folder / "report.txt").write_text(self._text + "\n", encoding="utf-8")
        except (OSError, ConfigError) as error:
            _log.warning("the report of %s cannot be written (%s)", self._folder, error)


def record(
    attachment: Observed,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
    settings: LogSettings | None = None,
    *,
    rank: int | None = None,
    notes: Callable[[], Mapping[str, float]] | None = None,
) -> Recorder:
    """Writes down what an attachment counts, from the next step on. To be called on every rank; not a collective.

    Rank r writes `stats-r.jsonl` into the folder: a line after the first step, after each step whose number `every`
    divides, and at the end. With `tensorboard` every number of `stats()` goes to `rank-r` in the folder as well. At the
    end rank 0 writes `report.txt` of its own numbers; `distopt report FOLDER` reads those of all ranks.
    A run that is resumed goes on in the same files, and replaces the lines of steps that it does once more.

    Args:
        attachment: What `attach` has returned.
        optimizer: Whose `step()` the training loop calls; several where models are trained in turns; None where the
            loop calls `recorder.stepped()` instead.
        settings: Where and how often; None for those of `LogSettings()`.
        rank: In the names of files; None for that of the attachment.
        notes: Numbers for each line beside those of `Recorder.note`, by name; asked for when a line is written.

    Returns:
        The recorder, which need not be kept: it closes itself when Python ends. `close()` returns the report.

    Raises:
        ConfigError: The folder cannot be written, or holds another file in the place of a log.
        CompatibilityError: `optimizer` is none of torch's, or tensorboard is wanted and not installed.
    """
    if optimizer is None:
        optimizers: Sequence[torch.optim.Optimizer] = ()
    else:
        optimizers = optimizer if isinstance(optimizer, Sequence) else [optimizer]
    for each in optimizers:
        if not isinstance(each, torch.optim.Optimizer):
            raise CompatibilityError(
                f"record needs the optimizer whose step() the training loop calls, got {type(each).__name__}; pass the "
                "torch optimizer inside it, or None and call recorder.stepped() after each step"
            )
    recorder = Recorder(attachment, settings or LogSettings(), rank=rank, notes=notes)
    recorder.watch(optimizers)
    return recorder


@atexit.register
def _close_all() -> None:
    for recorder in list(_OPEN):
        recorder.close()

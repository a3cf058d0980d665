"""The checkpoints of a run in one folder: which are complete, which is the newest, how many are kept.

Each has a folder of its own below it, `step-1200` or `epoch-3` by what the training loop counts. It is written under
another name and renamed when every file is there, so one that a crash cut off is never taken for a complete one.

Limits: no word to other ranks; one process completes and removes (see `distopt.job.keeping`).
"""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch

from distopt.errors import CompatibilityError, StateMismatchError

UNITS = ("step", "epoch")
_FORMAT = 1
_MANIFEST = "checkpoint.json"
_UNFINISHED = ".unfinished"
_NAME = re.compile(rf"({'|'.join(UNITS)})-(0|[1-9][0-9]*)")
_DIGITS = 16  # of a file's digest, in its name
# What numbers of NumPy are pickled as: a learning rate that NumPy has computed is one.
_NUMPY: list[Any] = [np.float64(0).__reduce__()[0], np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefd"}]


class Part(Protocol):
    """What belongs to a checkpoint: a model, an optimizer, a schedule of the learning rate, a `GradScaler`, ..."""

    def state_dict(self) -> Any:
        """Its state."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Takes it back."""


class Mark(NamedTuple):
    """Where a training loop is: so many steps, or epochs, are done."""

    unit: str
    done: int

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """The mark with this name, None if it is none."""
        match = _NAME.fullmatch(name)
        return cls(match[1], int(match[2])) if match else None

    def __str__(self) -> str:
        return f"{self.unit}-{self.done}"


class CheckpointFolder:
    """A folder of checkpoints.

    Args:
        folder: Need not be there yet.
        keep: How many complete ones `complete` leaves.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int) -> None:
        self.path = Path(folder)
        self._keep = keep

    def complete_ones(self) -> list[Mark]:
        """Those that are complete, the newest last."""
        if not self.path.is_dir():
            return []
        found = [mark for each in self.path.iterdir() if (mark := Mark.parse(each.name)) is not None]
        return sorted(found, key=lambda mark: mark.done)

    def newest(self) -> Mark | None:
        """The complete one that is furthest."""
        return next(iter(reversed(self.complete_ones())), None)

    def place_of(self, mark: Mark) -> Path:
        """The folder of a complete one."""
        return self.path / str(mark)

    def begin(self, mark: Mark) -> Path:
        """The folder to write its files to; every rank may call it."""
        place = self.path / f"{mark}{_UNFINISHED}"
        place.mkdir(parents=True, exist_ok=True)
        return place

    def complete(self, mark: Mark, facts: Mapping[str, Any]) -> None:
        """Makes the begun one count, in one step, and removes those that are older than the newest `keep`.

        Args:
            mark: Of `begin`; a complete one of the same mark is replaced.
            facts: For people and for `facts`: what JSON can hold.
        """
        begun, place = self.begin(mark), self.place_of(mark)
        (begun / _MANIFEST).write_text(json.dumps({"format": _FORMAT, **facts}, indent=1) + "\n")
        if place.exists():
            self.drop(mark)
        begun.rename(place)
        for old in self.complete_ones()[: -self._keep]:
            self.drop(old)

    def facts(self, mark: Mark) -> dict[str, Any]:
        """What `complete` was told.

        Raises:
            StateMismatchError: It cannot be read, or is of another version.
        """
        path = self.place_of(mark) / _MANIFEST
        try:
            facts: dict[str, Any] = json.loads(path.read_text())
            if facts["format"] == _FORMAT:
                return facts
            found = f"format {facts['format']!r}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            found = f"{type(error).__name__}: {error}"
        raise StateMismatchError(
            f"{path} must say what the checkpoint holds, in format {_FORMAT}, got {found}; remove {path.parent} to go "
            "on from the one before"
        )

    def drop(self, mark: Mark) -> None:
        """Removes a complete one; it stops to count first."""
        gone = self.place_of(mark).with_name(f"{mark}.removed{_UNFINISHED}")
        shutil.rmtree(gone, ignore_errors=True)
        self.place_of(mark).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def clear(self) -> None:
        """Removes what crashes have left; only where nobody writes."""
        for left in self.path.glob(f"*{_UNFINISHED}"):
            shutil.rmtree(left, ignore_errors=True)


def save_parts(parts: Mapping[str, Any], place: Path, stem: str) -> None:
    """Writes states, by name, to a file whose name begins with `stem` and says its digest.

    Raises:
        CompatibilityError: `load_parts` would refuse what is in it; better now than when it is needed.
    """
    temporary = place / f"{stem}.tmp"
    torch.save(parts, temporary)
    try:
        _unpickled(temporary, mmap=True)
    except pickle.UnpicklingError:
        name, error = next(found for each in parts if (found := (each, _unreadable(parts[each])))[1] is not None)
        raise CompatibilityError(
            f"states must hold tensors and plain values, got something else in that of {name}: {error}; have its "
            "state_dict leave that out, or leave it out of the job's checkpoints"
        ) from None
    path = temporary.rename(place / f"{stem}-{_digest(temporary)}.pt")
    for old in place.glob(f"{stem}-*.pt"):  # of a run that ended before it was complete
        if old != path:
            old.unlink()


def load_parts(place: Path, stem: str) -> dict[str, Any]:
    """What `save_parts` wrote, on the CPU. Nothing is unpickled but tensors and plain values.

    Raises:
        StateMismatchError: There is none, or it is damaged, or holds more than that.
    """
    found = sorted(place.glob(f"{stem}-*.pt"))
    if len(found) != 1:
        raise StateMismatchError(
            f"a checkpoint must have one file {stem}-*.pt, got {len(found)} in {place}; its folder must be one that "
            "every rank reads: use a file system that all hosts share"
        )
    (path,) = found
    try:
        if _digest(path) != path.stem.removeprefix(f"{stem}-"):
            raise StateMismatchError(
                f"a checkpoint file must be whole, got another digest than its name says for {path}; remove {place} to "
                "go on from the checkpoint before"
            )
        return _unpickled(path)
    except OSError as error:
        raise StateMismatchError(f"{path} cannot be read ({error.strerror}); see to its owner and mode") from error
    except pickle.UnpicklingError as error:
        raise StateMismatchError(
            f"states must hold tensors and plain values, got something else in {path}: {_told(error)}; remove {place} "
            "to go on from the checkpoint before"
        ) from error


def _unpickled(source: "Path | io.BytesIO", *, mmap: bool = False) -> dict[str, Any]:
    """The content of a file of states; nothing is unpickled but tensors and plain values."""
    with torch.serialization.safe_globals(_NUMPY):
        states: dict[str, Any] = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    return states


def _unreadable(state: Any) -> str | None:
    """Why this state could not be taken back, if it could not."""
    content = io.BytesIO()
    torch.save(state, content)
    content.seek(0)
    try:
        _unpickled(content)
    except pickle.UnpicklingError as error:
        return _told(error)
    return None


def _told(error: pickle.UnpicklingError) -> str:
    """The line of torch's advice that names the type."""
    found = re.search(r"Unsupported [\w ]+: \w+ [\w.]+", str(error))
    return found[0] if found else str(error).splitlines()[0]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:_DIGITS]

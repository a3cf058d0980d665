"""Events for TensorBoard, where it is installed: named numbers over the steps of a run."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

from distopt.errors import CompatibilityError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Events:
    """Writes numbers to a folder; also a context manager that closes it.

    Args:
        folder: Of the events; one for each run. A run that is resumed goes on in it, and what was written of steps
            that are done once more is hidden.

    Raises:
        CompatibilityError: tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = os.fspath(folder)
        self._make = _load_writer()
        self._writer: SummaryWriter | None = None

    def write(self, step: int, values: Mapping[str, float], time_s: float | None = None) -> None:
        """Writes numbers of one step; `time_s` stands for the clock's time, if it is given."""
        if self._writer is None:
            self._writer = self._make(self._folder, purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=time_s)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes texts of one step."""
        if self._writer is None:
            self._writer = self._make(self._folder, purge_step=step)
        for name, text in texts.items():
            self._writer.add_text(name, text, step)

    def close(self) -> None:
        """Writes what waits to be written. A run that goes on afterwards opens the folder again."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _load_writer() -> "type[SummaryWriter]":
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:  # also of one that is too old
        raise CompatibilityError(
            f"writing for TensorBoard needs tensorboard, which is not installed ({error}); "
            'pip install "torch-distopt[tensorboard]"'
        ) from error
    return SummaryWriter

"""TensorBoard: a run's values while it goes on, or those of a finished one.

Written are the evaluated values, how many clients took part, and the bytes of each round, over rounds. Where a run has
a virtual time it is the events' time, so TensorBoard's horizontal axis "Relative" is the virtual time.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from distopt.errors import CompatibilityError
from distopt.federated.curves import evaluated

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """A `progress` for a simulation that writes each round to a folder; also a context manager that closes it.

    Args:
        folder: Of the events; one for each run. A run that is resumed goes on in it, and what was written of rounds
            that are computed once more is hidden.

    Raises:
        CompatibilityError: tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = os.fspath(folder)
        self._make = _load_writer()
        self._writer: SummaryWriter | None = None

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Writes a row of a history."""
        if self._writer is None:
            self._writer = self._make(self._folder, purge_step=row["round"])
        values = {
            **evaluated(row),
            "clients": len(row["participants"]),
            "bytes/down": row["bytes_down"],
            "bytes/up": row["bytes_up"],
        }
        for name, value in values.items():
            self._writer.add_scalar(name, value, row["round"], walltime=row.get("time_s"))

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

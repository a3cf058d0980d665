"""What happened in each round of a federated run: a table of plain values, to read, save and plot."""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from distopt.errors import ConfigError, StateMismatchError
from distopt.federated import curves
from distopt.federated.curves import Row
from distopt.federated.plots import plot_history
from distopt.federated.tensorboard import TensorBoard


class History:
    """One row per round.

    A row has "round", from 1 on, the ids of its "participants", "bytes_down", "bytes_up", how many replies were
    "refused", what was evaluated at its end, "time_s", the virtual seconds then, if clients have delays, and of a
    private algorithm "epsilon", what has been spent by then.
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __eq__(self, other: object) -> bool:
        return self.rows == other.rows if isinstance(other, History) else NotImplemented

    def append(self, row: Mapping[str, Any]) -> None:
        """One more round."""
        self.rows.append(dict(row))

    def column(self, name: str) -> list[tuple[int, Any]]:
        """(round, value) of the rounds that have such a value.

        Raises:
            ConfigError: No round has one.
        """
        return curves.curve(self.rows, name)

    def last(self, name: str) -> Any:
        """The latest value."""
        return self.column(name)[-1][1]

    def rounds_to(self, name: str, target: float, *, falling: bool = False) -> int | None:
        """The first round at whose end a value had reached a target; None if it never did.

        Args:
            name: Of the value.
            target: To be reached from below.
            falling: It is to be reached from above, as by a loss.

        Raises:
            ConfigError: No round has such a value.
        """
        found: int | None = curves.reached(self.rows, name, target, "round", falling=falling)
        return found

    def bytes_to(self, name: str, target: float, *, falling: bool = False) -> int | None:
        """The bytes sent until then, down and up, by all clients; see `rounds_to`."""
        found: int | None = curves.reached(self.rows, name, target, "bytes", falling=falling)
        return found

    def time_to(self, name: str, target: float, *, falling: bool = False) -> float | None:
        """The virtual seconds until then; see `rounds_to`.

        Raises:
            ConfigError: No round has such a value, or the run had no delays.
        """
        found: float | None = curves.reached(self.rows, name, target, "time_s", falling=falling)
        return found

    @property
    def has_time(self) -> bool:
        """Whether rounds have a virtual time."""
        return bool(self.rows) and curves.axis(self.rows, "time_s") is not None

    @property
    def has_epsilon(self) -> bool:
        """Whether rounds have an epsilon."""
        return bool(self.rows) and curves.axis(self.rows, "epsilon") is not None

    def participation(self) -> dict[int, int]:
        """In how many rounds each client took part, by client; who never did is left out."""
        return curves.participation(self.rows)

    def total_bytes(self) -> int:
        """Sent down and up in all rounds."""
        return sum(row["bytes_down"] + row["bytes_up"] for row in self.rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes CSV or JSON, as the name says; a CSV has the participants as one text.

        Raises:
            ConfigError: The name ends in neither.
        """
        suffix = _suffix(path)
        with Path(path).open("w", newline="") as file:
            if suffix == ".json":
                json.dump(self.rows, file, indent=1)
                return
            names = list(dict.fromkeys(key for row in self.rows for key in row))
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            for row in self.rows:
                writer.writerow({k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()})

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "History":
        """Reads the JSON that `save` wrote.

        Raises:
            StateMismatchError: It is not such a file.
        """
        try:
            rows = json.loads(Path(path).read_text())
        except ValueError as error:
            raise StateMismatchError(f"{path} must be a history in JSON: {error}; save it as .json") from error
        return cls(rows)

    def plot(self, path: str | os.PathLike[str], name: str = "accuracy", *, title: str = "") -> None:
        """Draws a value over rounds, bytes, time and epsilon where there are such, and how often each client took part.

        Raises:
            ConfigError: No round has such a value.
            CompatibilityError: matplotlib is not installed.
        """
        plot_history(self.rows, path, name=name, title=title)

    def write_tensorboard(self, folder: str | os.PathLike[str]) -> None:
        """Writes all rounds for TensorBoard; `TensorBoard` writes them while a run goes on.

        Raises:
            CompatibilityError: tensorboard is not installed.
        """
        with TensorBoard(folder) as board:
            for row in self.rows:
                board(row)


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix
    if suffix not in (".csv", ".json"):
        raise ConfigError(f"a history is saved as .csv or .json, got {os.fspath(path)!r}; name the file so")
    return suffix

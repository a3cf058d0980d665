"""What happened in each round of a federated run: a table of plain values, to read, save and plot."""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from distopt.errors import ConfigError, StateMismatchError
from distopt.plotting import COLOURS, load_matplotlib

Row = dict[str, Any]


class History:
    """One row per round: "round", "participants", "bytes_down", "bytes_up", "refused" and what was evaluated."""

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
        found = [(row["round"], row[name]) for row in self.rows if row.get(name) is not None]
        if not found:
            known = ", ".join(sorted({key for row in self.rows for key in row})) or "nothing"
            raise ConfigError(f"there must be a round with {name!r}, got none; rounds have {known}")
        return found

    def last(self, name: str) -> Any:
        """The latest value."""
        return self.column(name)[-1][1]

    def rounds_to(self, name: str, target: float) -> int | None:
        """The first round in which a value reached a target from below; None if it never did."""
        return next((round for round, value in self.column(name) if value >= target), None)

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

    def plot(self, path: str | os.PathLike[str], name: str = "accuracy") -> None:
        """Draws a value over rounds and over bytes, and how often each client took part.

        Raises:
            CompatibilityError: matplotlib is not installed.
        """
        figure = load_matplotlib()(figsize=(12, 3.5), layout="constrained")
        over_rounds, over_bytes, per_client = figure.subplots(1, 3)
        found = self.column(name)
        sent, total = {}, 0
        for row in self.rows:
            total += row["bytes_down"] + row["bytes_up"]
            sent[row["round"]] = total / 1e6
        over_rounds.plot([round for round, _ in found], [value for _, value in found], color=COLOURS[2])
        over_bytes.plot([sent[round] for round, _ in found], [value for _, value in found], color=COLOURS[2])
        counts: dict[int, int] = {}
        for row in self.rows:
            for client in row["participants"]:
                counts[client] = counts.get(client, 0) + 1
        per_client.plot(sorted(counts.values(), reverse=True), color=COLOURS[6])
        for axes, xlabel, ylabel in (
            (over_rounds, "round", name),
            (over_bytes, "MB sent, down and up", name),
            (per_client, "clients, most frequent first", "rounds"),
        ):
            axes.set_xlabel(xlabel)
            axes.set_ylabel(ylabel)
        figure.savefig(path)


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix
    if suffix not in (".csv", ".json"):
        raise ConfigError(f"a history is saved as .csv or .json, got {os.fspath(path)!r}; name the file so")
    return suffix

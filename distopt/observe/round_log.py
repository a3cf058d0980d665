"""The log of a federated job: a line of JSON for each round."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from distopt.observe.lines import line_file
from distopt.observe.report import report


class RoundLog:
    """A `progress` of a federated job that writes each round's row; also a context manager that closes it.

    A job that is resumed goes on in the same file, and replaces the lines of rounds that it does once more.

    Args:
        folder: Of the log, with stats-0.jsonl; made if it is not there.

    Raises:
        ConfigError: The folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self._file = line_file(self._folder, 0)
        self._first: int | None = None
        self._began_s = 0.0

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Writes a row of a history."""
        if self._first is None:
            self._first, self._began_s = row["round"], time.perf_counter()
        line = {
            "step": row["round"],
            "time": time.time(),
            "seconds": time.perf_counter() - self._began_s,
            "first_step": self._first,
            "rank": 0,
            "family": "federated",
            "stats": dict(row),
        }
        self._file.write(line, first_step=self._first)

    def close(self) -> str:
        """Writes `report.txt` and returns it; "" if there has been no round."""
        self._file.close()
        if self._first is None:
            return ""
        text = report({0: self._file.read()})
        (self._folder / "report.txt").write_text(text + "\n", encoding="utf-8")
        return text

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

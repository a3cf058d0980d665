"""How far a simulation is: a bar on a terminal, some plain lines elsewhere (a log, a pipe, CI)."""

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distopt.errors import CompatibilityError
from distopt.federated.curves import evaluated

if TYPE_CHECKING:
    from rich.console import Console

_LINES = 20  # at most so many, where they cannot be drawn over


class ProgressBar:
    """A `progress` for a simulation: `Simulation(..., progress=ProgressBar(200)).run(200)`.

    Args:
        rounds: How many there are in all; the bar ends with the last one.
        console: Of rich; None for standard output.

    Raises:
        CompatibilityError: rich is not installed.
    """

    def __init__(self, rounds: int, console: "Console | None" = None) -> None:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        except ModuleNotFoundError as error:
            raise CompatibilityError(
                f'a progress bar needs rich, which is not installed ({error}); pip install "torch-distopt[cli]", or '
                "give progress=print"
            ) from error
        self._rounds = rounds
        self._console = console or Console()
        self._printed = 0  # the round of the last plain line
        self._values = ""
        self._latest: dict[str, float] = {}
        columns = (
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[values]}"),
        )
        self._bar = Progress(*columns, console=self._console) if self._console.is_terminal else None
        self._task = self._bar.add_task("", total=rounds, values="") if self._bar else None
        if self._bar:
            weakref.finalize(self, self._bar.stop)  # a run that raises leaves the terminal as it was

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Shows a row of a history."""
        found = evaluated(row)
        if found:
            self._latest |= found  # epsilon is in every row, an accuracy perhaps not
            self._values = ", ".join(f"{name} {value:.4f}" for name, value in self._latest.items())
        if self._bar is None or self._task is None:
            if found:
                self._print_line(row["round"])
            return
        self._bar.start()
        self._bar.update(self._task, completed=row["round"], values=self._values)
        if row["round"] >= self._rounds:
            self._bar.stop()

    def _print_line(self, round: int) -> None:
        if round - self._printed >= self._rounds / _LINES or round == self._rounds:
            self._console.print(f"round {round}/{self._rounds}: {self._values}", highlight=False)
            self._printed = round

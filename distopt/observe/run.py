"""What the lines of one rank say of its whole run, resumed or not."""

from collections.abc import Sequence
from typing import Any

from distopt.observe.lines import Line


class RankRun:
    """The lines of one rank.

    `stats()` counts since attach, so a run that was resumed has several stretches, each with its own "first_step".
    Figures per step are differences between the first and the last line of a stretch: what comes before the first step
    is in none of them.

    Args:
        lines: Of a `stats-r.jsonl`, at least one.

    Attributes:
        last: The latest `stats()`.
        family: Of the attachment.
        lines: All of them.
    """

    def __init__(self, lines: Sequence[Line]) -> None:
        stretches: dict[int, list[Line]] = {}
        for line in lines:
            stretches.setdefault(line["first_step"], []).append(line)
        self._stretches = list(stretches.values())
        self.lines = list(lines)
        self.last: dict[str, Any] = lines[-1]["stats"]
        self.family: str = lines[-1]["family"]
        self.last_step: int = lines[-1]["step"]
        self.values: dict[str, float] = lines[-1].get("values", {})

    @property
    def is_resumed(self) -> bool:
        """Whether it has several stretches."""
        return len(self._stretches) > 1

    def total(self, name: str) -> float:
        """A count of `stats()` over all stretches; 0 where there is none of the name."""
        return sum(stretch[-1]["stats"].get(name) or 0 for stretch in self._stretches)

    def per_step(self, name: str = "") -> float | None:
        """What a count, or without a name the clock, grows by in a step; None before the second line."""
        grown = steps = 0.0
        for first, *_, last in (stretch for stretch in self._stretches if len(stretch) > 1):
            steps += last["step"] - first["step"]
            if name:
                grown += (last["stats"].get(name) or 0) - (first["stats"].get(name) or 0)
            else:
                grown += last["seconds"] - first["seconds"]
        return grown / steps if steps else None

"""What a history's rows say, as pure functions: a value over rounds, bytes or virtual time, and who took part."""

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

from distopt.config import check_choice
from distopt.errors import ConfigError

Row = dict[str, Any]

_REMEDIES = {"time_s": "give the simulation delays", "epsilon": "take a private algorithm"}

AXES = ("round", "bytes", "time_s", "epsilon")


def axis(rows: Iterable[Row], over: str) -> list[float] | None:
    """Where each row lies on an axis of `AXES`: its round, or all bytes sent, the virtual time, epsilon at its end.

    None where some row has no such place: a run without delays has no virtual time, and only a private one an epsilon.
    """
    check_choice("over", over, AXES)
    rows = list(rows)
    if over == "bytes":
        return list(accumulate(row["bytes_down"] + row["bytes_up"] for row in rows))
    places = [row[over] for row in rows if row.get(over) is not None]
    return places if len(places) == len(rows) else None


def curve(rows: Iterable[Row], name: str, over: str = "round") -> list[tuple[Any, Any]]:
    """(place, value) of the rounds that have a value of this name.

    Raises:
        ConfigError: No round has one, or there is no such axis.
    """
    rows = list(rows)
    places = axis(rows, over)
    if places is None:
        raise ConfigError(
            f"every round must have {over!r} to look at {name!r} over it, got some without; {_REMEDIES[over]}"
        )
    found = [(place, row[name]) for place, row in zip(places, rows, strict=True) if row.get(name) is not None]
    if not found:
        known = ", ".join(sorted({key for row in rows for key in row})) or "nothing"
        raise ConfigError(f"there must be a round with {name!r}, got none; rounds have {known}")
    return found


def reached(rows: Iterable[Row], name: str, target: float, over: str, *, falling: bool = False) -> Any:
    """The first place where a value is at the target or beyond it; None if it never is.

    Args:
        rows: Of a history.
        name: Of the value.
        target: To be reached from below.
        over: The axis.
        falling: The target is to be reached from above, as a loss does.
    """
    along = curve(rows, name, over)
    return next((place for place, value in along if (value <= target if falling else value >= target)), None)


def participation(rows: Iterable[Row]) -> dict[int, int]:
    """In how many rounds each client took part, by client; who never did is left out."""
    counts = Counter(client for row in rows for client in row["participants"])
    return dict(sorted(counts.items()))


def evaluated(row: Mapping[str, Any]) -> dict[str, float]:
    """What was evaluated at the end of a round, by name; everything else that a row counts is an integer or a list."""
    return {name: value for name, value in row.items() if isinstance(value, float) and name != "time_s"}

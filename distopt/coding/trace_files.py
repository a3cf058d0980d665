"""Files of traces: two CSV forms, told apart by their header, and JSON.

Comment lines come first:

    # load = 0.5                            # load = 0.5
    # seconds_per_load = 2.2                round,worker,seconds,compute_s
    0.81,0.79,4.02                          0,0,0.81,0.7
    0.80,nan,0.84                           0,1,0.79,0.7

Left: one line per round, one column per worker, with an optional line of names. Right: one line per answer, compute_s
optional. `nan` or nothing stands for an answer that never came. JSON, with null for what never came; `compute_s`, like
`seconds`, is optional:

    {"load": 0.5, "seconds_per_load": 2.2, "seconds": [[0.81, 0.79, 4.02], [0.80, null, 0.84]]}
"""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distopt.errors import ConfigError

_LONG_HEADER = ("round", "worker", "seconds", "compute_s")
_SETTINGS = ("load", "seconds_per_load")
_JSON_KEYS = ("load", "seconds_per_load", "seconds", "compute_s")
_MISSING = ("", "nan", "null", "none")


def read_trace(path: Path) -> dict[str, Any]:
    """What the file says: `seconds` and where they are there `compute`, `load` and `seconds_per_load`.

    Raises:
        ConfigError: The file cannot be read or is malformed; names the line, the value, the rule and the remedy.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the trace {path} cannot be read: {error}; give a CSV or JSON file") from error
    return _read_json(text, str(path)) if text.lstrip().startswith("{") else _read_csv(text, str(path))


def write_trace(
    path: Path, settings: dict[str, float | None], seconds: NDArray[np.float64], compute: NDArray[np.float64] | None
) -> None:
    """Writes what `read_trace` reads: JSON for a name that ends in .json, else CSV, long if there are compute times.

    Args:
        path: Of the file.
        settings: `load` and `seconds_per_load`; what is None is left out.
        seconds: (rounds, workers).
        compute: (rounds, workers) or None.
    """
    known = {key: value for key, value in settings.items() if value is not None}
    if path.suffix == ".json":
        tables = {"seconds": seconds} if compute is None else {"seconds": seconds, "compute_s": compute}
        content = known | {
            key: [[None if math.isnan(each) else each for each in row] for row in table.tolist()]  # JSON has no NaN
            for key, table in tables.items()
        }
        path.write_text(json.dumps(content) + "\n")
        return
    text = io.StringIO()
    text.writelines(f"# {key} = {value!r}\n" for key, value in known.items())
    if compute is None:
        text.writelines(",".join(map(repr, row)) + "\n" for row in seconds.tolist())
    else:
        text.write(",".join(_LONG_HEADER) + "\n")
        text.writelines(
            f"{round},{worker},{float(seconds[round, worker])!r},{float(compute[round, worker])!r}\n"
            for round, worker in np.ndindex(*seconds.shape)
        )
    path.write_text(text.getvalue())


def _read_json(text: str, path: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}: not JSON ({error.msg}); mend it or use CSV") from error
    if unknown := sorted(set(content) - set(_JSON_KEYS)):
        raise ConfigError(
            f"{path}: unknown key {', '.join(map(repr, unknown))}; known keys are {', '.join(_JSON_KEYS)}"
        )
    if "seconds" not in content:
        raise ConfigError(f"{path}: the key 'seconds' is missing; give one list per round, with one time per worker")
    compute = content.pop("compute_s", None)
    return {**content, "compute": compute}


def _read_csv(text: str, path: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    lines: list[tuple[int, list[str]]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if stripped.startswith("#"):
            settings |= _setting(stripped, f"{path}, line {number}")
        elif stripped:
            lines.append((number, [cell.strip() for cell in next(csv.reader([stripped]))]))
    if not lines:
        raise ConfigError(f"{path}: a trace must have at least one round, got none; write one line of times per round")
    header = [cell.lower() for cell in lines[0][1]]
    if header[:2] == list(_LONG_HEADER[:2]):
        return settings | _read_long(header, lines, path)
    if any(not _is_number(cell) for cell in header):
        lines = lines[1:]  # the workers' names
    return settings | {"seconds": _read_wide(len(header), lines, path)}


def _setting(comment: str, where: str) -> dict[str, float]:
    """`# load = 0.5`; other comments say nothing."""
    key, equals, value = comment.lstrip("#").partition("=")
    if not equals or key.strip() not in _SETTINGS:
        return {}
    return {key.strip(): _number(value.strip(), where, key.strip())}


def _read_wide(num_workers: int, lines: list[tuple[int, list[str]]], path: str) -> list[list[float]]:
    for number, cells in lines:
        if len(cells) != num_workers:
            raise ConfigError(
                f"{path}, line {number}: a round must have {num_workers} times like the first line, got {len(cells)}; "
                "write nan for an answer that never came"
            )
    return [
        [_time(cell, f"{path}, line {number}, column {column}") for column, cell in enumerate(cells, start=1)]
        for number, cells in lines
    ]


def _read_long(header: list[str], lines: list[tuple[int, list[str]]], path: str) -> dict[str, Any]:
    if header not in (list(_LONG_HEADER), list(_LONG_HEADER[:3])):
        raise ConfigError(f"{path}, line {lines[0][0]}: the header must be round,worker,seconds or with compute_s")
    answers: dict[tuple[int, int], list[float]] = {}
    for number, cells in lines[1:]:
        where = f"{path}, line {number}"
        if len(cells) != len(header):
            raise ConfigError(f"{where}: an answer must have {len(header)} values like the header, got {len(cells)}")
        key = (_index(cells[0], where, "round"), _index(cells[1], where, "worker"))
        if key in answers:
            raise ConfigError(f"{where}: round {key[0]}, worker {key[1]} must come once, got it twice; remove one")
        answers[key] = [_time(cell, where) for cell in cells[2:]]
    if not answers:
        raise ConfigError(f"{path}: a trace must have at least one answer, got none; write one line per answer")
    rounds, workers = (1 + max(keys) for keys in zip(*answers, strict=True))
    if rounds * workers > 1000 * len(answers):
        raise ConfigError(
            f"{path}: rounds and workers must be counted from 0, got {rounds} x {workers} for {len(answers)}"
        )
    table = np.full((len(header) - 2, rounds, workers), np.nan)
    for (round, worker), values in answers.items():
        table[:, round, worker] = values
    return {"seconds": table[0], "compute": table[1] if len(table) > 1 else None}


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return cell.lower() in _MISSING
    return True


def _number(cell: str, where: str, name: str) -> float:
    try:
        return float(cell)
    except ValueError as error:
        raise ConfigError(f"{where}: {name} must be a number, got {cell!r}; use a point for decimals") from error


def _time(cell: str, where: str) -> float:
    seconds = math.nan if cell.lower() in _MISSING else _number(cell, where, "a time")
    if seconds < 0 or math.isinf(seconds):
        raise ConfigError(f"{where}: a time must be at least 0 and finite, got {cell}; nan if the answer never came")
    return seconds


def _index(cell: str, where: str, name: str) -> int:
    if not cell.isascii() or not cell.isdigit():
        raise ConfigError(f"{where}: {name} must be a number counted from 0, got {cell!r}")
    return int(cell)

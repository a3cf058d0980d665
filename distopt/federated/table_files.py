"""Files that say something per round and client, in CSV or JSON: who took part, or how many seconds it took.

    a,b,c               round,client,seconds            {"rounds": [[0.8, 0.7, 4.0], [0.9, null, 0.8]]}
    0.8,0.7,4.0         # num_rounds = 2
    0.9,,0.8            0,0,0.8                         {"entries": [[0, 0, 0.8], [0, 1, 0.7]], "num_rounds": 2}
                        0,1,0.7

Left: one line per round and one column per client, with an optional line of names; nothing, nan or null where there is
nothing to say. Middle: one line per entry; rounds and clients count from 0. `num_rounds` says how many rounds there are
if the last ones have no entry. Right: the same two forms as JSON. Lines that begin with # are comments.
"""

import csv
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distopt.errors import ConfigError

_MISSING = ("", "nan", "null", "none")
_JSON_KEYS = ("rounds", "entries", "num_rounds")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What a cell may hold.

    Attributes:
        name: Of the value, and of its column in the form of one line per entry.
        rule: What a value must be, in words.
        remedy: What to do instead.
        allows: Whether a number follows the rule; it is never nan.
        default: The value of an entry without one, None where entries must have one.
        may_miss: Whether a cell of the form of one line per round may be empty.
    """

    name: str
    rule: str
    remedy: str
    allows: Callable[[float], bool]
    default: float | None = None
    may_miss: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class Table:
    """A value per round and client, where the file has one.

    Attributes:
        rounds: (num_entries,) int64.
        clients: (num_entries,) int64.
        values: (num_entries,) float64.
        num_rounds: How many rounds there are.
        num_clients: How many clients there are, None where the file only lists entries.
    """

    rounds: NDArray[np.int64]
    clients: NDArray[np.int64]
    values: NDArray[np.float64]
    num_rounds: int
    num_clients: int | None


Entry = tuple[int, int, float]


def read_table(path: str | Path, cell: Cell) -> Table:
    """The table in a file.

    Raises:
        ConfigError: The file cannot be read or is malformed; names the line, the value, the rule and the remedy.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file {path} cannot be read: {error}; give a CSV or JSON file") from error
    if text.lstrip().startswith("{"):
        return _read_json(text, str(path), cell)
    return _read_csv(text, str(path), cell)


def check_path(path: object) -> None:
    """Raises `ConfigError` unless path is the name of a file; it is read later."""
    if not isinstance(path, str) or not path:
        raise ConfigError(f"path must be the name of a file, got {path!r}; give a CSV or JSON file")


def check_clients(path: str, table: Table, num_clients: int) -> None:
    """Raises `ConfigError` unless the table is one of so many clients."""
    if table.num_clients is not None and table.num_clients != num_clients:
        raise ConfigError(
            f"{path}: there must be one column per client, {num_clients}, got {table.num_clients}; use another trace "
            "or another number of clients"
        )
    last = int(table.clients.max(initial=0))
    if last >= num_clients:
        raise ConfigError(
            f"{path}: clients must be in [0, {num_clients}), got {last}; clients count from 0, use more clients"
        )


def _read_json(text: str, path: str, cell: Cell) -> Table:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}: not JSON ({error.msg}); mend it or use CSV") from error
    if unknown := sorted(set(content) - set(_JSON_KEYS)):
        raise ConfigError(f"{path}: unknown key {unknown[0]!r}; known keys are {', '.join(_JSON_KEYS)}")
    rows = content.get("rounds", content.get("entries"))
    if ("rounds" in content) == ("entries" in content) or not _is_lists(rows):
        raise ConfigError(f"{path}: there must be a list of lists under either 'rounds' or 'entries'; give one of them")
    num_rounds = content.get("num_rounds")
    if num_rounds is not None:
        num_rounds = _index(num_rounds, path, "num_rounds")
    if "rounds" in content:
        return _wide([(f"{path}, round {number}", row) for number, row in enumerate(rows)], path, num_rounds, cell)
    return _long(((f"{path}, entry {number}", row) for number, row in enumerate(rows)), path, num_rounds, cell)


def _is_lists(rows: Any) -> bool:
    return isinstance(rows, list) and all(isinstance(row, list) for row in rows)


def _read_csv(text: str, path: str, cell: Cell) -> Table:
    num_rounds: int | None = None
    lines: list[tuple[str, Sequence[Any]]] = []
    for number, row in enumerate(csv.reader(text.splitlines()), start=1):
        where = f"{path}, line {number}"
        if row and row[0].lstrip().startswith("#"):
            key, _, value = row[0].lstrip(" #").partition("=")
            if key.strip() == "num_rounds":
                num_rounds = _index(value.strip(), where, "num_rounds")
        elif row:
            lines.append((where, [each.strip() for each in row]))
    if not lines:
        raise ConfigError(f"{path}: there must be at least one round, got none; write one line per round")
    where, header = lines[0]
    names = [each.lower() for each in header]
    if names[:2] != ["round", "client"]:
        named = any(not _is_number(each) for each in header)
        return _wide(lines[1:] if named else lines, path, num_rounds, cell)
    full = ["round", "client", cell.name]
    if names != full and (cell.default is None or names != full[:2]):
        raise ConfigError(f"{where}: the header must be {','.join(full)}, got {','.join(header)}; write it so")
    return _long(lines[1:], path, num_rounds, cell)


def _wide(lines: Sequence[tuple[str, Sequence[Any]]], path: str, num_rounds: int | None, cell: Cell) -> Table:
    num_clients = len(lines[0][1]) if lines else 0
    if num_clients == 0:
        raise ConfigError(f"{path}: there must be at least one round and one client, got none; write a line per round")
    entries: list[Entry] = []
    for round, (where, row) in enumerate(lines):
        if len(row) != num_clients:
            raise ConfigError(
                f"{where}: a round must have {num_clients} values like the first, got {len(row)}; one for each client"
            )
        for client, given in enumerate(row):
            value = _value(given, f"{where}, column {client + 1}", cell, missing=cell.may_miss)
            if not math.isnan(value):
                entries.append((round, client, value))
    return _table(entries, path, len(lines), num_rounds, num_clients)


def _long(lines: Iterable[tuple[str, Sequence[Any]]], path: str, num_rounds: int | None, cell: Cell) -> Table:
    entries: dict[tuple[int, int], float] = {}
    widths = (2, 3) if cell.default is not None else (3,)
    for where, row in lines:
        if len(row) not in widths:
            words = f"round, client and {cell.name}" if cell.default is None else "round and client"
            raise ConfigError(f"{where}: an entry must have {words}, got {len(row)} values; mend the line")
        key = (_index(row[0], where, "round"), _index(row[1], where, "client"))
        if key in entries:
            raise ConfigError(f"{where}: round {key[0]}, client {key[1]} must come once, got it twice; remove one")
        entries[key] = _value(row[2] if len(row) == 3 else cell.default, where, cell, missing=False)
    if not entries:
        raise ConfigError(f"{path}: there must be at least one entry, got none; write one line per entry")
    listed = [(*key, value) for key, value in entries.items()]
    return _table(listed, path, 1 + max(round for round, _, _ in listed), num_rounds, None)


def _table(entries: list[Entry], path: str, least: int, num_rounds: int | None, num_clients: int | None) -> Table:
    if num_rounds is not None and num_rounds < least:
        raise ConfigError(f"{path}: num_rounds must be at least {least}, got {num_rounds}; so many rounds are there")
    columns = zip(*entries, strict=True) if entries else ((), (), ())
    rounds, clients, values = columns
    return Table(
        rounds=np.array(rounds, dtype=np.int64),
        clients=np.array(clients, dtype=np.int64),
        values=np.array(values, dtype=np.float64),
        num_rounds=least if num_rounds is None else num_rounds,
        num_clients=num_clients,
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text.lower() in _MISSING
    return True


def _value(given: Any, where: str, cell: Cell, *, missing: bool) -> float:
    """The number in a cell, nan for an empty one where it may be `missing`."""
    value = math.nan
    if isinstance(given, int | float) and not isinstance(given, bool):
        value = float(given)
    elif isinstance(given, str) and given.lower() not in _MISSING:
        try:
            value = float(given)
        except ValueError:
            missing = False
    elif given is not None and not isinstance(given, str):
        missing = False
    if not (missing and math.isnan(value)) and not (math.isfinite(value) and cell.allows(value)):
        raise ConfigError(f"{where}: {cell.name} must be {cell.rule}, got {given!r}; {cell.remedy}")
    return value


def _index(given: Any, where: str, name: str) -> int:
    if isinstance(given, str) and given.isascii() and given.isdigit():
        return int(given)
    if isinstance(given, int) and not isinstance(given, bool) and given >= 0:
        return given
    raise ConfigError(f"{where}: {name} must be an integer counted from 0, got {given!r}; mend it")

"""Partitions that the data themselves make: one client per writer, hospital, device or whatever an id stands for.

Client i is the i-th id in ascending order. The seed changes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distopt.config import check_count
from distopt.errors import ConfigError
from distopt.federated.partition.base import IntArray, Partition, checked_values


@dataclass(frozen=True, kw_only=True)
class _ByGroup(Partition):
    def _number_of_clients(self, values: NDArray[Any], num_clients: int | None) -> int:
        number = len(np.unique(values))
        if num_clients is not None:
            check_count("num_clients", num_clients, low=1, remedy="leave it out: the ids say it")
            if num_clients != number:
                raise ConfigError(
                    f"num_clients must be the number of distinct ids, {number}, got {num_clients}; leave it out"
                )
        return number

    def _owners(self, values: NDArray[Any], num_clients: int, rng: np.random.Generator) -> IntArray:
        return np.unique(values, return_inverse=True)[1].astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class NaturalPartition(_ByGroup, name="natural"):
    """One client per distinct id; `split` takes the vector of ids, (num_samples,) numbers or text."""

    def _values(self, labels: Any) -> NDArray[Any]:
        return checked_values("ids", labels)


@dataclass(frozen=True, kw_only=True)
class ColumnPartition(_ByGroup, name="column"):
    """One client per distinct value of a table's column.

    `split` takes the table: a mapping of columns, a data frame, a structured array, or a list of rows that are
    mappings, as `csv.DictReader` gives them.

    Raises:
        ConfigError: `column` is not a name.
    """

    column: str  # whose values are the ids

    def __post_init__(self) -> None:
        if not isinstance(self.column, str) or not self.column:
            raise ConfigError(f'column must be the name of a column, got {self.column!r}; use column="user"')

    def _values(self, labels: Any) -> NDArray[Any]:
        return checked_values(f"column {self.column!r}", _column(labels, self.column))


def _column(table: Any, column: str) -> Any:
    if isinstance(table, Sequence) and not isinstance(table, str) and table and isinstance(table[0], Mapping):
        for number, row in enumerate(table):
            if not isinstance(row, Mapping) or column not in row:
                known = ", ".join(map(repr, row)) if isinstance(row, Mapping) else repr(row)
                raise ConfigError(
                    f"column must be in every row, got {column!r}, which row {number} lacks; it has {known}; "
                    "mend the row or name another column"
                )
        return [row[column] for row in table]
    names = getattr(getattr(table, "dtype", None), "names", None)
    if names is None:
        names = list(table) if isinstance(table, Mapping) else list(getattr(table, "columns", ()))
    if not names:
        raise ConfigError(
            f"a table must have named columns, got {type(table).__name__}; give a mapping of columns, a data frame, a "
            "structured array or a list of rows, or split by the ids with a natural partition"
        )
    if column not in names:
        raise ConfigError(f"column must be one of {', '.join(map(repr, names))}, got {column!r}; name one of these")
    return table[column]

"""Delays as a file says: seconds per client and round."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from distopt.config import check_choice, check_count
from distopt.errors import ConfigError
from distopt.federated.delays.base import DelayProcess, Delays, FloatArray
from distopt.federated.randomness import check_seed
from distopt.federated.table_files import Cell, check_clients, check_path, read_table

_SECONDS = Cell(
    name="seconds",
    rule="a positive number of seconds",
    remedy="leave out what is not known",
    allows=lambda value: value > 0,
    may_miss=True,
)


@dataclass(frozen=True, kw_only=True)
class TracedDelays(Delays, name="trace"):
    """Seconds per client and round from a file (`table_files`), read when a process begins.

    A client's k-th work takes its k-th time in the file; rounds without a time of it are passed over.

    Raises:
        ConfigError: A value breaks its rule.
    """

    path: str  # of a CSV or JSON file
    at_end: str = "repeat"  # a client's times from its first; "error" refuses more works than it has times

    def __post_init__(self) -> None:
        check_path(self.path)
        check_choice("at_end", self.at_end, ("repeat", "error"))

    def begin(self, num_clients: int, seed: int = 0) -> DelayProcess:
        """See `Delays.begin`; also raises `ConfigError` if the file cannot be read or lacks a client."""
        check_count("num_clients", num_clients, low=1, remedy="give the number of clients")
        check_seed(seed)
        return _TracedProcess(self, num_clients)


class _TracedProcess(DelayProcess):
    def __init__(self, configuration: TracedDelays, num_clients: int) -> None:
        table = read_table(configuration.path, _SECONDS)
        check_clients(configuration.path, table, num_clients)
        counts = np.bincount(table.clients, minlength=num_clients)
        if (counts == 0).any():
            raise ConfigError(
                f"{configuration.path}: there must be a time of every client, got none of client "
                f"{int(counts.argmin())}; add one"
            )
        sums = np.bincount(table.clients, weights=table.values, minlength=num_clients)
        super().__init__(configuration.name, sums / counts, 0, may_grow=False)
        self._configuration = configuration
        self._counts = counts
        self._starts = np.cumsum(counts) - counts
        self._times = table.values[np.lexsort((table.rounds, table.clients))]

    def _seconds(self, client: int, work: int) -> float:
        count = int(self._counts[client])
        if work >= count and self._configuration.at_end == "error":
            raise ConfigError(
                f"the trace {self._configuration.path} must have a time for each work, got only {count} of client "
                f'{client}; use at_end="repeat" or run for a shorter time'
            )
        return float(self._times[self._starts[client] + work % count])

    def _mean_of_joined(self, num_clients: int, mean_s: Any) -> FloatArray:
        raise ConfigError(
            f"num_clients must stay {self.num_clients} with the trace {self._configuration.path}, got {num_clients} "
            "more; the trace does not say how long they take: use another model of delays"
        )

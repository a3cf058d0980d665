"""Participation as a file says: one line of 0 and 1 per round, or a list of rounds and clients (`table_files`)."""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from distopt.config import check_choice
from distopt.errors import ConfigError
from distopt.federated.participation.base import FloatArray, IntArray, Participation, ParticipationProcess
from distopt.federated.process_state import check_saved
from distopt.federated.randomness import check_seed
from distopt.federated.table_files import Cell, check_clients, check_path, read_table

_ACTIVE = Cell(
    name="active",
    rule="0 or 1",
    remedy="write 1 where the client takes part",
    allows=lambda value: value in (0.0, 1.0),
    default=1.0,
)


@dataclass(frozen=True, kw_only=True)
class TracedParticipation(Participation, name="trace"):
    """Who takes part is read from a file, when a process begins.

    Raises:
        ConfigError: A value breaks its rule.
    """

    path: str  # of a CSV or JSON file
    at_end: str = "repeat"  # the trace from its start; "error" refuses more rounds than it has

    def __post_init__(self) -> None:
        check_path(self.path)
        check_choice("at_end", self.at_end, ("repeat", "error"))

    def begin(self, num_clients: int, seed: int = 0) -> "TracedParticipationProcess":
        """See `Participation.begin`; also raises `ConfigError` if the file cannot be read or has other clients."""
        check_seed(seed)
        return TracedParticipationProcess(self, num_clients)


class TracedParticipationProcess(ParticipationProcess):
    """The process of `TracedParticipation`. No client can join: the trace does not say when it would take part."""

    name = "trace"
    keys = ("round", "digest")
    may_grow = False

    def __init__(self, configuration: TracedParticipation, num_clients: int) -> None:
        super().__init__(num_clients)
        table = read_table(configuration.path, _ACTIVE)
        check_clients(configuration.path, table, num_clients)
        self._path = configuration.path
        self._repeats = configuration.at_end == "repeat"
        self._round = 0
        self._num_rounds = table.num_rounds
        taking_part = table.values == 1
        rounds, clients = table.rounds[taking_part], table.clients[taking_part]
        order = np.lexsort((clients, rounds))
        self._clients: IntArray = clients[order]
        self._starts: IntArray = np.searchsorted(rounds[order], np.arange(table.num_rounds + 1))
        self._digest = zlib.crc32(self._clients.tobytes(), zlib.crc32(self._starts.astype(np.int64).tobytes()))

    @property
    def probabilities(self) -> FloatArray:
        """(num_clients,) the share of the trace's rounds in which each client takes part."""
        return np.bincount(self._clients, minlength=self.num_clients) / self._num_rounds

    def next_round(self) -> IntArray:
        """See `ParticipationProcess.next_round`.

        Raises:
            ConfigError: The trace has no more rounds, and `at_end` is "error".
        """
        if self._round >= self._num_rounds and not self._repeats:
            raise ConfigError(
                f"the trace {self._path} must have a round for each round of the run, got only {self._num_rounds}; "
                'use at_end="repeat" or run fewer rounds'
            )
        place = self._round % self._num_rounds
        self._round += 1
        return self._clients[self._starts[place] : self._starts[place + 1]].copy()

    def _join(self, num_clients: int, probability: Any) -> None:
        raise ConfigError(
            f"num_clients must stay {self.num_clients} with the trace {self._path}, got {num_clients} more; "
            "the trace does not say when they take part: use bernoulli, markov or cyclic participation"
        )

    def _values(self) -> dict[str, Any]:
        return {"round": self._round, "digest": self._digest}

    def _take(self, values: dict[str, Any]) -> None:
        check_saved("digest", values["digest"], self._digest)
        self._round = values["round"]

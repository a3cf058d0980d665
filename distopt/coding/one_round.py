"""Schemes of one round per job, delay 0: a gradient code, and no code at all."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distopt.coding.code import Code
from distopt.coding.scheme import Run, Scheme, Task, Term
from distopt.config import check_count


class OneRound(Scheme):
    """A gradient code as a scheme: each round is one job, decoded from whoever has answered."""

    def __init__(self, code: Code) -> None:
        self.code = code
        self._rows = [
            tuple((int(part), float(row[part])) for part in np.flatnonzero(row)) for row in np.asarray(code.matrix)
        ]

    @property
    def name(self) -> str:
        """The code's name."""
        return self.code.name

    @property
    def num_workers(self) -> int:
        """See `Scheme.num_workers`."""
        return self.code.num_workers

    @property
    def load(self) -> float:
        """See `Scheme.load`."""
        return self.code.load

    @property
    def chunks(self) -> NDArray[np.float64]:
        """The weights of the code's parts."""
        return self.code.part_weights

    def begin(self, num_jobs: int) -> Run:
        """See `Scheme.begin`."""
        return _OneRoundRun(self, num_jobs)

    def to_dict(self) -> dict[str, Any]:
        """`{"code": name, "stragglers": s}`."""
        return {"code": self.code.name, "stragglers": self.code.tolerance}

    def __repr__(self) -> str:
        return f"OneRound({self.code!r})"


class _OneRoundRun(Run):
    """Every job lives for one round, so what has answered in the current round is all there is."""

    scheme: OneRound

    def conforms(self, round: int) -> bool:
        """At most s have not answered."""
        return len(self.missing(round)) <= self.scheme.code.tolerance

    def may_end(self, round: int) -> bool:
        """The round's job decodes."""
        return self.decodable(round)

    def _assign(self) -> list[list[Task]]:
        return [[Task(self.round, row)] for row in self.scheme._rows]

    def _keep(self, job: int, round: int, worker: int, index: int) -> None:
        pass  # `record` has noted it

    def _survivors(self) -> list[int]:
        return [int(worker) for worker in np.flatnonzero(self._answered[self.round])]

    def _lacking(self, job: int) -> list[int]:
        return [] if self.scheme.code.decodable(self._survivors()) else self.missing(job)

    def _combination(self, job: int) -> list[Term]:
        coefficients = self.scheme.code.decode(self._survivors())
        return [Term(job, int(worker), 0, float(coefficients[worker])) for worker in np.flatnonzero(coefficients)]


class Uncoded(Scheme):
    """No redundancy: worker i computes part i of n, and every round waits for everybody."""

    def __init__(self, n: int) -> None:
        check_count("n", n, low=1, remedy="give the number of workers")
        self._n = n

    @property
    def name(self) -> str:
        """The word "uncoded"."""
        return "uncoded"

    @property
    def num_workers(self) -> int:
        """See `Scheme.num_workers`."""
        return self._n

    @property
    def load(self) -> float:
        """1/n."""
        return 1 / self._n

    @property
    def chunks(self) -> NDArray[np.float64]:
        """The n equal parts."""
        return np.full(self._n, 1 / self._n)

    def begin(self, num_jobs: int) -> Run:
        """See `Scheme.begin`."""
        return _UncodedRun(self, num_jobs)

    def to_dict(self) -> dict[str, Any]:
        """Any code with s = 0 is uncoded."""
        return {"code": "fractional", "stragglers": 0}

    def __repr__(self) -> str:
        return f"Uncoded({self._n})"


class _UncodedRun(Run):
    def conforms(self, round: int) -> bool:
        """Everybody has answered."""
        return not self.missing(round)

    def may_end(self, round: int) -> bool:
        """Everybody has answered."""
        return not self.missing(round)

    def _assign(self) -> list[list[Task]]:
        return [[Task(self.round, ((worker, 1.0),))] for worker in range(self.scheme.num_workers)]

    def _keep(self, job: int, round: int, worker: int, index: int) -> None:
        pass  # `record` has noted it

    def _lacking(self, job: int) -> list[int]:
        return self.missing(job)

    def _combination(self, job: int) -> list[Term]:
        return [Term(job, worker, 0, 1.0) for worker in range(self.scheme.num_workers)]

"""What the sequential codes have in common: parameters, an inner gradient code, and runs that remember who straggled.

A sequential code gives a job more than one round, so that a worker that was slow in one can make up for it in a later
one. It suits T + 1 models that train at the same time, or one model whose gradient is T steps old.

Source: Krishnan, Ebrahimi & Khisti, *Sequential Gradient Coding For Straggler Mitigation*, ICLR 2023.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distopt.coding.code import CODES, Code
from distopt.coding.scheme import Run, Scheme
from distopt.coding.stragglers import StragglerModel
from distopt.config import Configurable, check_choice, check_count
from distopt.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequentialCode(Configurable, Scheme, tag="scheme"):
    """Base of the sequential codes.

    Raises:
        ConfigError: A parameter breaks its rule.
    """

    n: int  # workers; in a configuration for live training it may be left out, and is the job's
    burst: int  # B, rounds: longer tolerates longer slowness, and decodes later
    window: int  # W, rounds: longer makes slow workers rarer, which costs less load, and decodes later
    stragglers: int  # lambda, distinct stragglers per window: more tolerates more and computes more
    code: str = "binary"  # the gradient code inside: "cyclic" has the least load for any n, but larger rounding errors

    def __post_init__(self) -> None:
        check_count("n", self.n, low=1, remedy="give the number of workers")
        check_count("burst", self.burst, low=1, remedy="give the length of a burst of slowness in rounds")
        check_count("window", self.window, low=2, remedy="give the length of a window in rounds")
        check_count("stragglers", self.stragglers, low=0, remedy="give how many workers may straggle in one window")
        if self.stragglers > self.n:
            raise ConfigError(
                f"stragglers must be at most the {self.n} workers, got {self.stragglers}; a tenth of them is a start"
            )
        check_choice("code", self.code, ("binary", "fractional", "cyclic", "cyclic_mds"))

    @classmethod
    def for_workers(cls, mapping: Mapping[str, Any], num_workers: int) -> "SequentialCode":
        """The scheme that a configuration describes, for a job of `num_workers`; the key "n" may be left out.

        Raises:
            ConfigError: A key is unknown, a value breaks its rule or "n" is not the job's.
        """
        if isinstance(mapping, Mapping) and mapping.get("n", num_workers) != num_workers:
            raise ConfigError(f"n must be the job's {num_workers} workers, got {mapping['n']!r}; leave the key out")
        return cls.from_dict({**mapping, "n": num_workers} if isinstance(mapping, Mapping) else mapping)

    @property
    def num_workers(self) -> int:
        """See `Scheme.num_workers`."""
        return self.n

    @property
    @abstractmethod
    def models(self) -> tuple[StragglerModel, ...]:
        """The straggler models it tolerates: a pattern must keep to one of them throughout."""

    @property
    @abstractmethod
    def inner_stragglers(self) -> int:
        """How many missing results the inner code tolerates."""

    @cached_property
    def inner(self) -> Code:
        """The gradient code inside, for n workers."""
        return CODES[self.code](self.n, self.inner_stragglers)

    @cached_property
    def inner_rows(self) -> list[list[tuple[int, float]]]:
        """For each worker the pairs (part, coefficient) of the inner code."""
        return [[(int(part), float(row[part])) for part in np.flatnonzero(row)] for row in self.inner.matrix]

    def decodes(self, here: NDArray[np.bool_]) -> bool:
        """Whether the inner code decodes from the results that are here, (workers,) bool."""
        enough = int(np.count_nonzero(here)) >= self.n - self.inner.tolerance
        return enough or self.inner.decodable(np.flatnonzero(here).tolist())


class SequentialRun(Run):
    """A run that remembers the pattern of stragglers, and which of the scheme's models it has kept so far."""

    scheme: SequentialCode

    def __init__(self, scheme: SequentialCode, num_jobs: int) -> None:
        super().__init__(scheme, num_jobs)
        self._pattern = np.zeros((scheme.n, self.num_rounds), dtype=np.bool_)
        self._kept = scheme.models

    def conforms(self, round: int) -> bool:
        """See `Run.conforms`: the whole pattern keeps to one model. Outside all of them nobody more may straggle."""
        if round != self.round:
            raise ConfigError(f"round must be the current one, {self.round}, got {round!r}; ask while it runs")
        before, stragglers = self._pattern[:, :round], ~self._answered[round]
        return not stragglers.any() or any(model.allows(before, stragglers) for model in self._kept)

    def _end_round(self, stragglers: NDArray[np.bool_]) -> None:
        before = self._pattern[:, : self.round]
        # One model from the first round to the last: a round of one after a round of another is not tolerated.
        self._kept = tuple(model for model in self._kept if model.allows(before, stragglers))
        self._pattern[:, self.round] = stragglers

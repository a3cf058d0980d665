"""Gradient codes: which parts of the data each worker adds up, and how the whole gradient comes back from some of them.

n workers hold parts of the data, each part on several workers. Worker i sends `m_i = sum_j B[i, j] g_j`, where g_j is
the gradient of the SUM of the losses of part j. From the messages of a set of survivors the sum of all g_j is
`sum_i a_i m_i`, where `a @ B = 1` and a is zero at the missing (Tandon et al., *Gradient Coding*, ICML 2017).

`Code` states this contract; each family of codes is a subclass in a module of its own, and `CODES` finds the
constructors by name.

Limits: a decoded sum has the rounding errors of the messages times `amplification`, the norm of a. Repetition codes
keep it below the square root of n; cyclic codes do not.
"""

import dataclasses
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from distopt.config import check_count
from distopt.errors import ConfigError, DecodeError

FloatArray = NDArray[np.float64]


# Singular values below this fraction of the largest count as zero.
_NO_RANK = 1e-10


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Code(ABC):
    """Base of the codes; cannot change.

    Law: for every set of survivors that lacks at most `tolerance` workers, `decode(survivors) @ matrix` is 1 in every
    part and `decode` is 0 at the missing.

    Attributes:
        name: The constructor's name in `CODES`.
        matrix: B, (num_workers, num_parts) float64, read-only.
        tolerance: s: every set of at most s missing workers decodes.
        part_weights: (num_parts,) float64, read-only: the fraction of the samples in each part; they sum to 1.
        loads: (num_workers,) float64, read-only: the fraction of the samples that each worker computes.
    """

    name: str
    matrix: FloatArray
    tolerance: int
    part_weights: FloatArray
    loads: FloatArray = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "loads", (self.matrix != 0) @ self.part_weights)
        for array in (self.matrix, self.part_weights, self.loads):
            array.flags.writeable = False

    @property
    def num_workers(self) -> int:
        """n, the number of workers."""
        return int(self.matrix.shape[0])

    @property
    def num_parts(self) -> int:
        """The number of parts that the data is split into."""
        return int(self.matrix.shape[1])

    @property
    def load(self) -> float:
        """The largest fraction of the samples that a worker computes."""
        return float(self.loads.max())

    @property
    def exact(self) -> bool:
        """Whether a set that decodes gives the gradient itself, not an estimate."""
        return True

    @property
    def interchangeable(self) -> bool:
        """Whether any worker may take any row: not where the loads were made for the speeds of the workers."""
        return True

    def support(self, worker: int) -> tuple[int, ...]:
        """The parts that this worker computes, ascending."""
        return tuple(np.flatnonzero(self.matrix[worker]).tolist())

    def part_sizes(self, num_samples: int) -> tuple[int, ...]:
        """How many of `num_samples` samples each part has; rounded so that the sizes sum to `num_samples`."""
        check_count("num_samples", num_samples, low=0, remedy="give the samples of one step")
        ends = np.rint(np.cumsum(self.part_weights) * num_samples).astype(int)
        ends[-1] = num_samples
        return tuple(np.diff(ends, prepend=0).tolist())

    @abstractmethod
    def decode(self, survivors: Iterable[int]) -> FloatArray:
        """The coefficients a, (num_workers,) float64, zero at the missing, with `a @ matrix = 1`.

        They depend on the set only, not on its order. Where there is a choice, their norm is small.

        Args:
            survivors: Ids of the workers whose messages are there, in any order: no mask, no duplicates.

        Raises:
            ConfigError: `survivors` is not a set of worker ids.
            DecodeError: It cannot; names the missing.
        """

    @abstractmethod
    def decodable(self, survivors: Iterable[int]) -> bool:
        """Whether `decode` would succeed; cheap enough to be asked after each arrival.

        May say no to a set with more than `tolerance` missing that would decode by luck; see the code.

        Raises:
            ConfigError: `survivors` is not a set of worker ids.
        """

    def parity_checks(self, arrived: Sequence[int]) -> FloatArray:
        """What the messages of these workers must obey: independent rows v with `sum_i v_i m_i = 0`.

        Args:
            arrived: Ids of workers, in the order of the columns.

        Returns:
            (checks, len(arrived)) float64; there are as many as the messages are more than their rank.

        Raises:
            ConfigError: `arrived` is not a set of worker ids.
        """
        self._present(arrived)
        rows = self.matrix[list(arrived)]
        left, sizes, _ = np.linalg.svd(rows)
        rank = int((sizes > sizes.max(initial=0.0) * _NO_RANK).sum())
        return without_noise(left[:, rank:].T)

    def error(self, survivors: Iterable[int]) -> float:
        """The mean over the samples of `(a @ matrix - 1) ** 2`: `||a B - 1||^2 / n` where all parts are equal.

        Raises:
            ConfigError, DecodeError: As `decode`.
        """
        residual = self.decode(survivors) @ self.matrix - 1.0
        return float(residual**2 @ self.part_weights)

    def amplification(self, survivors: Iterable[int]) -> float:
        """`||a||_2` of the decoding: the rounding errors of the messages enter the sum about so many times.

        Raises:
            ConfigError, DecodeError: As `decode`.
        """
        return amplification(self.decode(survivors))

    def __repr__(self) -> str:
        return f"{self.name}(n={self.num_workers}, s={self.tolerance}, load={self.load:.4g})"

    def _present(self, survivors: Iterable[int]) -> NDArray[np.bool_]:
        """(num_workers,) whether each worker is a survivor."""
        present = np.zeros(self.num_workers, dtype=np.bool_)
        for worker in survivors:
            index = _worker_id(worker, self.num_workers)
            if present[index]:
                raise ConfigError(f"survivors must name each worker once, got {index} twice; give ids, not a mask")
            present[index] = True
        return present

    def _undecodable(self, missing: Sequence[int], reason: str) -> DecodeError:
        count = len(missing)
        rule = f"{count} of {self.num_workers} are missing, any {self.tolerance} may be"
        remedy = "a larger s" if count > self.tolerance else f"binary({self.num_workers}, {self.tolerance})"
        return DecodeError(
            f"{self!r} cannot decode without {name_workers(missing)}: {reason} ({rule}); wait for more or use {remedy}",
            missing,
        )


def amplification(coefficients: FloatArray) -> float:
    """`||a||_2` of the coefficients that `Code.decode` gave."""
    return float(math.sqrt(coefficients @ coefficients))


def without_noise(checks: FloatArray) -> FloatArray:
    """Rows of norm 1 without the entries that are zero but for rounding."""
    return np.where(np.abs(checks) > _NO_RANK, checks, 0.0)


def name_workers(workers: Sequence[int]) -> str:
    """`worker 3` or `workers 1, 2, 3`."""
    return f"worker{'s' * (len(workers) != 1)} {', '.join(map(str, workers))}"


def check_workers(num_workers: int, tolerance: int) -> None:
    """Raises `ConfigError` unless n is at least 1 and 0 <= s < n."""
    check_count("n", num_workers, low=1, remedy="give the number of workers")
    check_count("s", tolerance, low=0, remedy="give the number of stragglers to tolerate; 0 waits for all")
    if tolerance >= num_workers:
        raise ConfigError(f"s must be less than n = {num_workers}, got {tolerance}; somebody has to answer")


def uniform_weights(num_parts: int) -> FloatArray:
    """The weights of equal parts."""
    return np.full(num_parts, 1.0 / num_parts)


def _worker_id(worker: Any, num_workers: int) -> int:
    is_bool = isinstance(worker, bool) or "bool" in str(getattr(worker, "dtype", ""))  # also numpy's and torch's
    try:
        index = -1 if is_bool else operator.index(worker)
    except TypeError:
        index = -1
    if not 0 <= index < num_workers:
        raise ConfigError(
            f"survivors must be ids of workers, 0 to {num_workers - 1}, got {worker!r}; give ids, not a mask"
        )
    return index


CODES: dict[str, Callable[..., Code]] = {}

Constructor = TypeVar("Constructor", bound=Callable[..., Code])


def register(constructor: Constructor) -> Constructor:
    """Adds a constructor to `CODES` under its own name."""
    CODES[constructor.__name__] = constructor
    return constructor

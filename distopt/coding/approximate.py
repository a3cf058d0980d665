"""Approximate codes: an estimate of the gradient from whatever arrived, as near as least squares brings it.

The coefficients a minimise `||a B - 1||^2` over the survivors; the error that is left says how unevenly the parts count
(`Code.error`). Any survivors at all decode; `accept` says which error counts as decodable, and with it how many of the
stragglers nobody waits for.

- `approximate`: fractional repetition stopped early (Wang, Charles & Papailiopoulos, *ErasureHead*, 1901.09671): where
  a whole group is missing, its parts are left out. The error is the fraction of the groups that are missing: about p^d
  for d copies where each worker is missing with probability p.
- `random_regular`: each worker holds d parts and each part is held by d workers, at random; `expander` is the draw
  whose second singular value is smallest of many (Raviv et al., 1707.03858).
- `least_squares`: any matrix.

Limits: an expander bounds the error whoever is missing; where stragglers are random, repetition leaves less of it on
average (the table in `tests/coding/test_approximate.py`). The estimate is biased where parts are left out: if the same
workers are missing in every round, their data are not learned from.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from distopt.coding.code import Code, FloatArray, check_workers, register, uniform_weights
from distopt.coding.repetition import fractional
from distopt.config import check_count
from distopt.errors import ConfigError

_DRAWS_OF_AN_EXPANDER = 8
_SWAPS_PER_ONE = 10
# Errors are sums of squares of about 1: what lies nearer to `accept` is a matter of rounding.
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ApproximateCode(Code):
    """A code that decodes by least squares.

    Attributes:
        accept: The largest error at which a set counts as decodable.
    """

    accept: float

    @property
    def exact(self) -> bool:
        """See `Code.exact`: no."""
        return False

    def decode(self, survivors: Iterable[int]) -> FloatArray:
        """See `Code.decode`; the smallest of the coefficients with the least error.

        Raises:
            DecodeError: There are no survivors.
        """
        present = np.flatnonzero(self._present(survivors))
        if not present.size:
            raise self._undecodable(range(self.num_workers), "nothing has arrived")
        coefficients = np.zeros(self.num_workers)
        # Each part counts by its weight.
        scale = np.sqrt(self.part_weights)
        rows = self.matrix[present] * scale
        coefficients[present] = np.linalg.lstsq(rows.T, scale, rcond=None)[0]
        return coefficients

    def decodable(self, survivors: Iterable[int]) -> bool:
        """See `Code.decodable`. True if the error is at most `accept`.

        Solves only where the parts that nobody holds leave a chance.
        """
        present = self._present(survivors)
        held = (self.matrix[present] != 0).any(axis=0)
        if not held.any() or float(self.part_weights[~held].sum()) > self.accept + _ROUNDING:
            return False
        return self.error(np.flatnonzero(present).tolist()) <= self.accept + _ROUNDING

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, accept={self.accept:.4g})"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class EarlyRepetitionCode(ApproximateCode):
    """Fractional repetition that does not wait for all groups. One message per group is all that least squares needs.

    Attributes:
        groups: The workers that hold the same parts.
    """

    groups: tuple[tuple[int, ...], ...]

    def decode(self, survivors: Iterable[int]) -> FloatArray:
        """See `Code.decode`; 1 for one survivor of each group.

        Raises:
            DecodeError: There are no survivors.
        """
        present = self._present(survivors)
        if not present.any():
            raise self._undecodable(range(self.num_workers), "nothing has arrived")
        first = (next((worker for worker in members if present[worker]), None) for members in self.groups)
        coefficients = np.zeros(self.num_workers)
        coefficients[[worker for worker in first if worker is not None]] = 1.0
        return coefficients

    def parity_checks(self, arrived: Sequence[int]) -> FloatArray:
        """See `Code.parity_checks`. The first of each group is compared with each other of the group."""
        self._present(arrived)
        column = {worker: i for i, worker in enumerate(arrived)}
        pairs = []
        for members in self.groups:
            first, *others = [worker for worker in members if worker in column] or [-1]
            pairs += [(first, other) for other in others]
        checks = np.zeros((len(pairs), len(column)))
        for check, (first, other) in zip(checks, pairs, strict=True):
            check[column[first]], check[column[other]] = 1.0, -1.0
        return checks


def least_squares(matrix: FloatArray, *, accept: float, name: str = "least_squares") -> ApproximateCode:
    """An approximate code with any matrix; equal parts.

    Its tolerance is what the second singular value sigma guarantees where the matrix is square and all rows and columns
    have the same sum d: without m of n workers, whichever they are, equal coefficients for the others leave an error of
    at most `(sigma / d)^2 m / (n - m)`, and least squares no more. Of other matrices it is 0, though many sets decode.

    Args:
        matrix: (workers, parts) float64; no row may be zero.
        accept: Largest error at which a set counts as decodable; more waits for fewer, and estimates worse.
        name: What `repr` and errors call it.

    Raises:
        ConfigError: The matrix is not one, or `accept` breaks its rule.
    """
    _check_accept(accept)
    matrix = np.array(matrix, dtype=np.float64)
    if matrix.ndim != 2 or not matrix.size or not np.isfinite(matrix).all() or not matrix.any(axis=1).all():
        raise ConfigError(
            f"matrix must be of workers by parts, finite, no row all zero, got shape {matrix.shape}; leave out workers "
            "that compute nothing"
        )
    return ApproximateCode(
        name=name,
        matrix=matrix,
        tolerance=_guaranteed(matrix, accept),
        part_weights=uniform_weights(matrix.shape[1]),
        accept=accept,
    )


@register
def approximate(n: int, copies: int, *, accept: float = 0.05) -> ApproximateCode:
    """Fractional repetition with `copies` workers per group, decoded before every group has answered.

    Load copies/n.

    Raises:
        ConfigError: `copies` does not divide n, or `accept` breaks its rule.
    """
    _check_degree("copies", n, copies)
    _check_accept(accept)
    if n % copies:
        raise ConfigError(f"copies must divide n = {n}, got {copies}; use random_regular({n}, {copies})")
    repetition = fractional(n, copies - 1)
    spare = math.floor(accept * len(repetition.groups) + _ROUNDING)
    return EarlyRepetitionCode(
        name="approximate",
        matrix=repetition.matrix,
        tolerance=min((spare + 1) * copies - 1, n - 1),
        part_weights=repetition.part_weights,
        accept=accept,
        groups=repetition.groups,
    )


@register
def random_regular(n: int, degree: int, seed: int = 0, *, accept: float = 0.05) -> ApproximateCode:
    """A random 0/1 matrix with `degree` ones in each row and column; load degree/n. The same on every rank.

    Raises:
        ConfigError: A value breaks its rule.
    """
    _check_degree("degree", n, degree)
    check_count("seed", seed, low=0, remedy="use 0")
    matrix = _random_regular_matrix(n, degree, np.random.default_rng(seed))
    return least_squares(matrix, accept=accept, name="random_regular")


@register
def expander(n: int, degree: int, seed: int = 0, *, accept: float = 0.05) -> ApproximateCode:
    """The best expander of many random regular codes: the least worst case; load degree/n. The same on every rank.

    Raises:
        ConfigError: A value breaks its rule.
    """
    _check_degree("degree", n, degree)
    check_count("seed", seed, low=0, remedy="use 0")
    generator = np.random.default_rng(seed)
    draws = [_random_regular_matrix(n, degree, generator) for _ in range(_DRAWS_OF_AN_EXPANDER)]
    return least_squares(min(draws, key=_second_singular_value), accept=accept, name="expander")


def _random_regular_matrix(n: int, degree: int, generator: np.random.Generator) -> FloatArray:
    """Starts from a circulant; random swaps, which keep all sums, then make it forget the start."""
    ones = [(i, (i + shift) % n) for i in range(n) for shift in range(degree)]
    held = set(ones)
    for first, second in generator.integers(len(ones), size=(_SWAPS_PER_ONE * len(ones), 2)).tolist():
        (i, j), (k, m) = ones[first], ones[second]
        if (i, m) not in held and (k, j) not in held:  # (i, j) and (k, m) become (i, m) and (k, j)
            held -= {(i, j), (k, m)}
            held |= {(i, m), (k, j)}
            ones[first], ones[second] = (i, m), (k, j)
    matrix = np.zeros((n, n))
    matrix[tuple(zip(*ones, strict=True))] = 1.0
    return matrix


def _second_singular_value(matrix: FloatArray) -> float:
    sizes = np.linalg.svd(matrix, compute_uv=False)
    return float(sizes[1]) if len(sizes) > 1 else 0.0


def _guaranteed(matrix: FloatArray, accept: float) -> int:
    """The most workers that may be missing, whichever they are, with an error of at most `accept`."""
    n, num_parts = matrix.shape
    sums = np.concatenate([matrix.sum(axis=0), matrix.sum(axis=1)])
    if n != num_parts or sums[0] <= 0 or not np.allclose(sums, sums[0]):
        return 0
    ratio = (_second_singular_value(matrix) / sums[0]) ** 2
    return max(m for m in range(n) if ratio * m / (n - m) <= accept + _ROUNDING)


def _check_degree(field: str, n: int, degree: int) -> None:
    check_count(field, degree, low=1, remedy="3 is a good start; 1 is no repetition at all")
    check_workers(n, 0)
    if degree > n:
        raise ConfigError(f"{field} must be at most n = {n}, got {degree}; every worker computes everything at n")


def _check_accept(accept: float) -> None:
    if isinstance(accept, bool) or not isinstance(accept, int | float) or not 0 <= accept < 1:
        raise ConfigError(
            f"accept must be an error in [0, 1), got {accept!r}; 0.05 leaves about a twentieth of the data out"
        )

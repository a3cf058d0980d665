"""Cyclic codes: worker i computes the parts i to i+s (mod n), with coefficients that any n-s workers can solve for.

- `cyclic` (Tandon et al., *Gradient Coding*, ICML 2017, algorithm 2): random coefficients in the null space of a random
  s x n matrix whose rows sum to 0; any n > s.
- `cyclic_mds` (Raviv et al., 1707.03858): the circulant of the polynomial whose roots are s consecutive n-th roots of
  unity around -1; real if and only if n and s have opposite parity.

How a set decodes: `a @ B = 1` has the solutions `a0 + c @ N`, where a0 is the smallest one and the s rows of N span the
left null space of B, orthonormal. The coefficients of the missing have to be zero: at most s equations for the s
unknowns c. Of several solutions the smallest c gives the smallest a, for N is orthogonal to a0.

Limits: rounding errors of the messages are amplified, the more the larger n and s are, up to 1e4 times (`cyclic`) or,
where neighbours are missing, without any limit (`cyclic_mds`: see `placement`). Use them with float32 messages or
better, small n, and a limit on `Code.amplification`. More than s missing decode only by rare luck.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from distopt.coding.code import Code, FloatArray, check_workers, register, uniform_weights, without_noise
from distopt.config import check_count
from distopt.errors import ConfigError

# A decoding is true if no part counts as more or less than 1 by more than this, a few roundings of float32 messages.
_TRUE = 1e-6


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CyclicCode(Code):
    """A code whose matrix has the rank n - s.

    Attributes:
        full_decoding: a0, (n,) float64: the smallest coefficients that decode when nobody is missing.
        null_rows: N, (s, n) float64: orthonormal rows v with `v @ matrix = 0`.
    """

    full_decoding: FloatArray
    null_rows: FloatArray

    def decode(self, survivors: Iterable[int]) -> FloatArray:
        """See `Code.decode`. The smallest coefficients; time O(n s + s^3) where at most s are missing.

        Raises:
            DecodeError: Also where the equations are so ill-conditioned that float64 does not solve them.
        """
        present = self._present(survivors)
        missing = np.flatnonzero(~present)
        coefficients = self.full_decoding.copy()
        if missing.size:
            solved = np.linalg.lstsq(self.null_rows[:, missing].T, -self.full_decoding[missing], rcond=None)[0]
            coefficients += solved @ self.null_rows
            coefficients[missing] = 0.0
        wrong = float(np.abs(coefficients @ self.matrix - 1.0).max())
        if not wrong <= _TRUE:  # NaN is no decoding either
            allowed = missing.size <= self.tolerance
            cause = "are too ill-conditioned for float64" if allowed else "have no solution"
            reason = f"the equations {cause}, at best a part counts wrong by {wrong:.2g}"
            raise self._undecodable(missing.tolist(), reason)
        return coefficients

    def parity_checks(self, arrived: Sequence[int]) -> FloatArray:
        """See `Code.parity_checks`. As many as there are arrivals beyond n - s."""
        present = self._present(arrived)
        # Sums of null rows that are zero at the missing.
        _, sizes, right = np.linalg.svd(self.null_rows[:, ~present].T)
        free = right[len(sizes) :]
        return without_noise((free @ self.null_rows)[:, list(arrived)])

    def decodable(self, survivors: Iterable[int]) -> bool:
        """See `Code.decodable`. True if at most s are missing, without a look at how well that decodes."""
        return int(self._present(survivors).sum()) >= self.num_workers - self.tolerance


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CyclicMDSCode(CyclicCode):
    """A circulant, which bears evenly spaced stragglers best and neighbours worst."""


@register
def cyclic(n: int, s: int, seed: int = 0) -> CyclicCode:
    """Tandon's cyclic code; load (s+1)/n. The same seed gives the same code on every rank.

    Raises:
        ConfigError: n, s or seed breaks its rule.
    """
    check_workers(n, s)
    check_count("seed", seed, low=0, remedy="use 0")
    if s == 0:
        return CyclicCode(**_identity("cyclic", n))
    check = np.random.default_rng(seed).standard_normal((s, n))
    check[:, -1] = -check[:, :-1].sum(axis=1)
    matrix = np.zeros((n, n))
    for worker in range(n):
        parts = np.arange(worker, worker + s + 1) % n
        matrix[worker, parts[0]] = 1.0
        matrix[worker, parts[1:]] = -np.linalg.solve(check[:, parts[1:]], check[:, parts[0]])
    left, sizes, right = np.linalg.svd(matrix)
    kept = n - s
    full = left[:, :kept] @ ((right[:kept] @ np.ones(n)) / sizes[:kept])
    return CyclicCode(
        name="cyclic",
        matrix=matrix,
        tolerance=s,
        part_weights=uniform_weights(n),
        full_decoding=full,
        null_rows=np.ascontiguousarray(left[:, kept:].T),
    )


@register
def cyclic_mds(n: int, s: int) -> CyclicMDSCode:
    """Raviv's cyclic code; load (s+1)/n.

    Neighbours among the missing are what it bears worst: place the workers of one node far apart (`placement`).

    Raises:
        ConfigError: n and s are both even or both odd, so that the coefficients would not be real.
    """
    check_workers(n, s)
    if s == 0:
        return CyclicMDSCode(**_identity("cyclic_mds", n))
    if (n - s) % 2 == 0:
        raise ConfigError(
            f"n and s must not be both even or both odd in a real cyclic_mds code, got n = {n}, s = {s}; use "
            f"cyclic_mds({n}, {s + 1 if s + 1 < n else s - 1}), binary({n}, {s}) or cyclic({n}, {s})"
        )
    frequencies = (n - s + 1) // 2 + np.arange(s)
    row = np.zeros(n)
    row[: s + 1] = _polynomial(n, frequencies)
    matrix = np.stack([np.roll(row, worker) for worker in range(n)])
    # The left null vectors of a circulant are the waves of those frequencies, and its columns sum to 1.
    return CyclicMDSCode(
        name="cyclic_mds",
        matrix=matrix,
        tolerance=s,
        part_weights=uniform_weights(n),
        full_decoding=np.ones(n),
        null_rows=_waves(n, frequencies),
    )


def _polynomial(n: int, frequencies: np.ndarray) -> FloatArray:
    """The coefficients of prod (x - w^z), ascending, scaled to sum 1; z and n - z are both among the frequencies."""
    coefficients = np.ones(1)
    for z in frequencies[2 * frequencies < n]:
        coefficients = np.convolve(coefficients, [1.0, -2.0 * np.cos(2 * np.pi * z / n), 1.0])
    if (2 * frequencies == n).any():
        coefficients = np.convolve(coefficients, [1.0, 1.0])
    scaled: FloatArray = coefficients / coefficients.sum()
    return scaled


def _waves(n: int, frequencies: np.ndarray) -> FloatArray:
    """Orthonormal rows that span the real waves of these frequencies."""
    steps = np.arange(n)
    rows = []
    for z in frequencies[2 * frequencies <= n]:
        angles = 2 * np.pi * (z * steps % n) / n
        rows += [np.cos(angles)] if 2 * z == n else [np.cos(angles), np.sin(angles)]
    return np.stack([row / np.linalg.norm(row) for row in rows])


def _identity(name: str, n: int) -> dict[str, Any]:
    return {
        "name": name,
        "matrix": np.eye(n),
        "tolerance": 0,
        "part_weights": uniform_weights(n),
        "full_decoding": np.ones(n),
        "null_rows": np.zeros((0, n)),
    }

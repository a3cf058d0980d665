"""Replicas that differ: workers that ought to have computed the same gradient, and did not.

A code makes the messages depend on each other: where v is a row of `Code.parity_checks`, `sum_i v_i m_i = 0`. Dropout
without a seed of its own for each part, BatchNorm statistics that depend on who computes, or a broken machine violate
this, and the decoded gradient is no longer that of any model. Instead of whole messages a few linear fingerprints
`<r, m_i>` are compared: they obey the same equations.

For repetition codes the checks are the plain ones: members of a group are equal, two ways to cover the same parts have
equal sums. For cyclic codes there is one for each arrival beyond n - s.

Limits: what arrived must be more than a decoding needs, else there is nothing to compare. One worker can be told from
the others only if two independent checks see it: of a group of two, both are named. What is within `tolerance` of the
messages that are compared counts as rounding; in the checks of a cyclic code some workers have small weights, so that
only large differences of theirs are seen. NaN and Inf are not compared with each other.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distopt.coding.code import Code, FloatArray, name_workers
from distopt.config import check_count, check_number
from distopt.errors import ConfigError

_COLUMNS = 4096
_ROWS_AT_ONCE = 64

# Workers that explain a violation are told apart by what they leave unexplained, as a fraction of the tolerance.
_NEAR, _EXACT = 10.0, 1e-6


@dataclasses.dataclass(frozen=True)
class Disagreement:
    """Messages that do not fit together.

    Attributes:
        suspects: For each set of messages that are compared with each other and disagree: the workers any one of which
            alone would explain it; where none would, all that take part.
        relative_size: The largest violation, as a fraction of the messages in it; replicas of which one differs by 0.1%
            have about 0.001.
    """

    suspects: tuple[tuple[int, ...], ...]
    relative_size: float

    @property
    def workers(self) -> tuple[int, ...]:
        """All suspects, ascending."""
        return tuple(sorted({worker for some in self.suspects for worker in some}))

    def __str__(self) -> str:
        named = "; ".join(name_workers(some) for some in self.suspects)
        return f"replicas differ by {self.relative_size:.2g} of their size; suspected: {named}"


def disagreement(
    code: Code, arrived: Sequence[int], fingerprints: FloatArray, *, tolerance: float = 1e-4
) -> Disagreement | None:
    """Whether the messages of these workers contradict each other, and who is suspected.

    Args:
        code: The code.
        arrived: The workers whose messages are there, in the order of the fingerprints.
        fingerprints: (len(arrived), projections) float64: the same linear functions of each message.
        tolerance: Relative violation that passes for rounding; 1e-4 for float32 messages, 0.05 for 16-bit ones. Smaller
            finds smaller differences, and rounding errors.

    Returns:
        None if they agree, or if there is nothing to compare.

    Raises:
        ConfigError: What was given does not fit together.
    """
    fingerprints = np.asarray(fingerprints, dtype=np.float64)
    if fingerprints.ndim != 2 or fingerprints.shape[0] != len(arrived) or not fingerprints.shape[1]:
        raise ConfigError(
            f"fingerprints must be {len(arrived)} x projections, one row for each arrived worker, got shape "
            f"{fingerprints.shape}"
        )
    check_number("tolerance", tolerance, rule="in (0, 1]", remedy="use 1e-4", low=0.0, high=1.0)
    arrived = list(arrived)
    finite: NDArray[np.bool_] = np.isfinite(np.abs(fingerprints).sum(axis=1))
    if not finite.all():
        if wrong := _wrongly_infinite(code, arrived, finite):
            return Disagreement(tuple((worker,) for worker in wrong), float("inf"))
        arrived, fingerprints = np.asarray(arrived)[finite].tolist(), fingerprints[finite]
    checks = code.parity_checks(arrived)
    sizes = np.linalg.norm(fingerprints, axis=1)
    if not len(checks):
        return None
    residuals = checks @ fingerprints
    # A check whose messages are all zero has nothing to be relative to, and cannot be violated.
    scales = np.maximum(np.sqrt(checks**2 @ sizes**2), np.finfo(np.float64).tiny)
    relative = np.linalg.norm(residuals, axis=1) / scales
    violated = relative > tolerance
    if not violated.any():
        return None
    workers = np.asarray(arrived)
    suspects = []
    for together in _connected(checks):
        if violated[together].any():
            columns = _suspects(checks[together], residuals[together], tolerance * scales[together])
            suspects.append(tuple(sorted(workers[columns].tolist())))
    return Disagreement(tuple(suspects), float(relative.max()))


def _wrongly_infinite(code: Code, arrived: Sequence[int], finite: NDArray[np.bool_]) -> list[int]:
    """The workers with NaN or Inf all of whose parts others found finite, ascending.

    Who holds a part that nobody found finite may be right: the gradient of the batch is not finite then.
    """
    holds = code.matrix[list(arrived)] != 0
    found_finite = holds[finite].any(axis=0)
    wrong = ~finite & ~(holds & ~found_finite).any(axis=1)
    return sorted(np.asarray(arrived)[wrong].tolist())


def _suspects(checks: FloatArray, residuals: FloatArray, allowed: FloatArray) -> list[int]:
    """The columns any one of which alone explains the residuals, or all that take part in a violated check."""
    columns = np.flatnonzero(checks.any(axis=0))
    unexplained = np.empty((len(columns), len(checks)))
    for left, column in zip(unexplained, columns, strict=True):
        seen = checks[:, column]
        difference = seen @ residuals / (seen @ seen)
        left[:] = np.linalg.norm(residuals - np.outer(seen, difference), axis=1) / allowed
    explains = (unexplained <= 1.0).all(axis=1)
    if explains.any():
        # Of several, those that leave more than a little beside the best one are only near to it.
        most = unexplained.max(axis=1)
        return [int(column) for column in columns[explains & (most <= _NEAR * most.min() + _EXACT)]]
    violated = np.linalg.norm(residuals, axis=1) > allowed
    return [int(column) for column in np.flatnonzero(checks[violated].any(axis=0))]


def _connected(checks: FloatArray) -> list[list[int]]:
    """Checks that share workers, directly or through others."""
    shared = (checks != 0).astype(np.float64)
    linked = shared @ shared.T > 0
    left, found = set(range(len(checks))), []
    while left:
        together, waiting = set(), [min(left)]
        while waiting:
            check = waiting.pop()
            if check not in together:
                together.add(check)
                waiting += np.flatnonzero(linked[check]).tolist()
        found.append(sorted(together))
        left -= together
    return found


@torch.no_grad()
def fingerprint(message: Tensor, num_projections: int = 4, seed: int = 0) -> FloatArray:
    """Random linear functions of a message: the same ones for the same seed and length, on every rank.

    The message, cut into rows of 4,096, is multiplied by random signs from both sides: one pass over memory.

    Args:
        message: Flat, floating-point, on the CPU.
        num_projections: How many; more make a difference that hides from all less likely.
        seed: Of the random signs; change it from round to round.

    Returns:
        (num_projections,) float64.

    Raises:
        ConfigError: The message is not flat, or `num_projections` is not positive.
    """
    check_count("num_projections", num_projections, low=1, remedy="use 4")
    if message.dim() != 1 or not message.is_floating_point():
        raise ConfigError(f"message must be flat and floating-point, got {tuple(message.shape)} {message.dtype}")
    dtype = torch.float32 if message.dtype.itemsize < 4 else message.dtype
    generator = torch.Generator().manual_seed(seed)
    by_column = _signs(num_projections, _COLUMNS, generator).to(dtype)
    total = torch.zeros(num_projections, dtype=torch.float64)
    for chunk in message.split(_COLUMNS * _ROWS_AT_ONCE):
        whole = chunk.numel() // _COLUMNS
        # In this order a product with few rows runs at three times the speed of the other.
        parts = [by_column @ chunk[: whole * _COLUMNS].view(whole, _COLUMNS).to(dtype).t()]
        if rest := chunk.numel() - whole * _COLUMNS:
            parts.append(by_column[:, :rest] @ chunk[-rest:].to(dtype)[:, None])
        for part in parts:
            total += (part.double() * _signs(num_projections, part.shape[1], generator)).sum(1)
    projected: FloatArray = total.numpy()
    return projected


def _signs(num_projections: int, count: int, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, (num_projections, count), generator=generator, dtype=torch.float64)
    return bits * 2 - 1

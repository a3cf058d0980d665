"""Loads in proportion to speed: workers that were measured fast compute more, and s stragglers still cost nothing.

The rule for the loads is that of Wang et al., *Heterogeneity-aware Gradient Coding for Straggler Tolerance*, ICDCS 2019
(1901.09339): with speeds c_i, worker i computes the fraction `(s+1) c_i / sum(c)` of the data, so that all would end at
the same time. In place of the coefficients that the paper solves for, which amplify rounding errors, the workers are
split into s+1 classes that are together about equally fast, and each class splits the whole data in proportion to the
speeds of its members, as in `binary`: coefficients are 1 and -1, and s stragglers leave one class complete.

Limits: the classes are equally fast only as far as the speeds allow: the time of a round is that of the slowest class,
`1 / (its speeds' sum)`, against the `(s+1) / sum(c)` of the paper. A worker that is faster than a class should be
computes the whole data.
"""

import dataclasses
import math
from collections.abc import Sequence
from numbers import Real

import numpy as np

from distopt.coding.code import check_workers, register
from distopt.coding.repetition import RepetitionCode
from distopt.errors import ConfigError

# Boundaries between workers are rounded to this fraction of an average uncoded load: boundaries that nearly coincide
# would give parts of next to no samples.
_STEPS_PER_WORKER = 100


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class HeterogeneousCode(RepetitionCode):
    """A repetition code whose rows belong to workers of known speed, and cannot change places."""

    @property
    def interchangeable(self) -> bool:
        """See `Code.interchangeable`: no."""
        return False


@register
def heterogeneous(speeds: Sequence[float], s: int) -> HeterogeneousCode:
    """A code for workers of these speeds; tolerates any s stragglers exactly.

    Args:
        speeds: Of each worker, samples per second or in any other unit; positive.
        s: The number of stragglers to tolerate.

    Raises:
        ConfigError: A speed is not positive, or so small that the worker would have next to nothing to do.
    """
    check_workers(len(speeds), s)
    for worker, speed in enumerate(speeds):
        if not _is_speed(speed):
            raise ConfigError(f"speeds must be positive numbers, got {speed!r} for worker {worker}; leave it out")
    steps = _STEPS_PER_WORKER * len(speeds)
    classes = balanced_classes(speeds, s + 1)
    marks = [_marks([speeds[worker] for worker in members], steps) for members in classes]
    for members, ends in zip(classes, marks, strict=True):
        for place, worker in enumerate(members):
            if ends[place] == ends[place + 1]:
                raise ConfigError(
                    f"speeds must not differ so much that a worker computes less than 1/{steps} of the data, got "
                    f"{speeds[worker]!r} for worker {worker}; leave it out"
                )
    points = sorted(set().union(*marks))
    index_of = {point: index for index, point in enumerate(points)}
    bounds = [[index_of[mark] for mark in ends] for ends in marks]
    return HeterogeneousCode.of_classes("heterogeneous", classes, bounds, np.diff(points) / steps)


def _is_speed(speed: object) -> bool:
    return not isinstance(speed, bool) and isinstance(speed, Real) and 0 < float(speed) < math.inf


def balanced_classes(speeds: Sequence[float], num_classes: int) -> list[list[int]]:
    """Splits the workers into classes whose slowest is together as fast as exchanges of two workers can make it.

    The fastest worker first goes to the class that is slowest so far; then, as long as that helps, a worker of the
    slowest class changes places with a faster one, or gets one more for company. Within a class the fastest is first.
    """
    classes: list[list[int]] = [[] for _ in range(num_classes)]
    totals = np.zeros(num_classes)
    for worker in sorted(range(len(speeds)), key=lambda i: (-speeds[i], i)):
        # A class that has nobody has to get somebody, however small the speeds.
        slowest = min(range(num_classes), key=lambda c: (bool(classes[c]), totals[c]))
        classes[slowest].append(worker)
        totals[slowest] += speeds[worker]
    while _improve(classes, totals, speeds):
        pass
    return [sorted(members, key=lambda i: (-speeds[i], i)) for members in classes]


def _improve(classes: list[list[int]], totals: np.ndarray, speeds: Sequence[float]) -> bool:
    """The exchange with the slowest class that leaves the slower of the two fastest; False if none helps."""
    slowest = int(totals.argmin())
    given = np.array([0.0, *(speeds[worker] for worker in classes[slowest])])  # 0.0: nobody goes back
    best, found = totals[slowest] * (1 + 1e-9), None
    for c, members in enumerate(classes):
        if c == slowest:
            continue
        taken = np.array([speeds[worker] for worker in members])
        gain = taken[:, None] - given
        slower = np.minimum(totals[slowest] + gain, totals[c] - gain)
        if len(members) == 1:
            slower[:, 0] = 0.0  # nobody would be left
        place = int(slower.argmax())
        if slower.flat[place] > best:
            best, found = slower.flat[place], (c, *divmod(place, len(given)))
    if found is None:
        return False
    c, i, k = found
    worker = classes[c].pop(i)
    if k:
        classes[c].append(classes[slowest].pop(k - 1))
    classes[slowest].append(worker)
    for changed in (c, slowest):
        totals[changed] = sum(speeds[member] for member in classes[changed])
    return True


def _marks(speeds: Sequence[float], steps: int) -> list[int]:
    """Where the members of a class begin and end, in steps of the data."""
    ends = np.cumsum(speeds)
    return [0, *np.rint(ends / ends[-1] * steps).astype(int).tolist()]

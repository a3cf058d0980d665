"""Repetition codes: every worker sends the plain sum of consecutive parts. No solver; the errors stay those of a sum.

Each of s+1 classes of workers splits the whole data among its members, so s stragglers leave one class complete.

- `fractional` (Tandon et al., *Gradient Coding*, ICML 2017, section 3.1), s+1 divides n: all classes split alike, so
  the workers at the same place form a group that holds the same s+1 parts; the first to arrive of each group decodes.
- `binary` (Charalambides, Mahdavifar & Hero, 2109.10484), any n: worker i belongs to class i mod (s+1).

How a set decodes: write a worker that holds the parts [start, stop) as an edge between the points start and stop. A sum
of messages, some of them subtracted, counts each part once if and only if its edges lead from 0 to the number of parts.
So a set decodes if and only if the two ends are connected, and the shortest path is the decoding with fewest messages;
its coefficients are 1 and, where it goes backwards, -1. Complete classes are such paths; others come on top.

Limits: where s+1 does not divide n, `binary` gives the members of the smaller classes more than s+1 parts, up to
ceil(n / floor(n / (s+1))).
"""

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from distopt.coding.code import Code, FloatArray, check_workers, register, uniform_weights
from distopt.errors import ConfigError

Interval = tuple[int, int]
Paths = dict[int, tuple[int, int, float]]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RepetitionCode(Code):
    """Workers that sum consecutive parts.

    Attributes:
        intervals: The parts [start, stop) of each worker.
        classes: Workers that split the whole data, s+1 times, disjoint.
    """

    intervals: tuple[Interval, ...]
    classes: tuple[tuple[int, ...], ...]

    @classmethod
    def of_classes(
        cls, name: str, classes: Sequence[Sequence[int]], bounds: Sequence[Sequence[int]], part_weights: FloatArray
    ) -> Self:
        """Member k of class c holds the parts from `bounds[c][k]` to `bounds[c][k + 1]`."""
        num_workers = sum(map(len, classes))
        matrix = np.zeros((num_workers, len(part_weights)))
        intervals: list[Interval] = [(0, 0)] * num_workers
        for members, ends in zip(classes, bounds, strict=True):
            for place, worker in enumerate(members):
                intervals[worker] = start, stop = ends[place], ends[place + 1]
                matrix[worker, start:stop] = 1.0
        return cls(
            name=name,
            matrix=matrix,
            tolerance=len(classes) - 1,
            part_weights=part_weights,
            intervals=tuple(intervals),
            classes=tuple(tuple(members) for members in classes),
        )

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Workers that hold the same parts: any of them can stand for any other."""
        found: dict[Interval, list[int]] = {}
        for worker, interval in enumerate(self.intervals):
            found.setdefault(interval, []).append(worker)
        return tuple(tuple(members) for members in found.values())

    def decode(self, survivors: Iterable[int]) -> FloatArray:
        """See `Code.decode`. Decodes every set that can decode, with the fewest messages; coefficients are 1 and -1."""
        present = self._present(survivors)
        came_by = self._paths(present)
        point = self.num_parts
        if point not in came_by:
            raise self._undecodable(np.flatnonzero(~present).tolist(), self._why_not(present))
        coefficients = np.zeros(self.num_workers)
        for worker, sign in _way(came_by, point):
            coefficients[worker] = sign
        return coefficients

    def decodable(self, survivors: Iterable[int]) -> bool:
        """See `Code.decodable`. True for exactly the sets that decode."""
        present = self._present(survivors)
        enough = int(present.sum()) >= self.num_workers - self.tolerance
        return enough or self.num_parts in self._paths(present)

    def parity_checks(self, arrived: Sequence[int]) -> FloatArray:
        """See `Code.parity_checks`. One per worker that closes a circle: equal rows, or two ways between points."""
        present = self._present(arrived)
        column = {worker: i for i, worker in enumerate(arrived)}
        trees: dict[int, Paths] = {}
        seen: set[int] = set()
        for root in range(self.num_parts + 1):
            if root not in seen:
                tree = self._paths(present, root)
                seen.update(tree)
                trees.update(dict.fromkeys(tree, tree))
        used = {worker for tree in trees.values() for _, worker, _ in tree.values()}
        closing = [worker for worker in arrived if worker not in used]
        checks = np.zeros((len(closing), len(column)))
        for check, worker in zip(checks, closing, strict=True):
            start, stop = self.intervals[worker]
            check[column[worker]] = 1.0
            # From the root to `stop`, less the way to `start`, is what the worker itself covers.
            for end, factor in ((stop, -1.0), (start, 1.0)):
                for passed, sign in _way(trees[end], end):
                    check[column[passed]] += factor * sign
        return checks

    @cached_property
    def _edges(self) -> tuple[tuple[tuple[int, int, float], ...], ...]:
        """Of each point: the points at the other ends of its workers, the workers, and 1.0 forwards, -1.0 backwards."""
        edges: list[list[tuple[int, int, float]]] = [[] for _ in range(self.num_parts + 1)]
        for worker, (start, stop) in enumerate(self.intervals):
            edges[start].append((stop, worker, 1.0))
            edges[stop].append((start, worker, -1.0))
        return tuple(map(tuple, edges))

    def _paths(self, present: NDArray[np.bool_], root: int = 0) -> Paths:
        """Shortest paths from a point: of each point, the point before it, the worker between and its sign."""
        here = present.tolist()
        came_by: Paths = {root: (root, -1, 0.0)}
        waiting = deque([root])
        while waiting:
            point = waiting.popleft()
            for other, worker, sign in self._edges[point]:
                if here[worker] and other not in came_by:
                    came_by[other] = (point, worker, sign)
                    waiting.append(other)
        return came_by

    def _why_not(self, present: NDArray[np.bool_]) -> str:
        lost = np.flatnonzero(~(self.matrix[present] != 0).any(axis=0))
        if lost.size:
            holders = np.flatnonzero(self.matrix[:, lost[0]]).tolist()
            return f"nobody is left who holds part {lost[0]}, which the group {holders} held"
        first = [next(worker for worker in members if not present[worker]) for members in self.classes]
        return f"no class of workers is complete, for each lacks one of {first}"


def _way(came_by: Paths, end: int) -> Iterator[tuple[int, float]]:
    """The workers between the root and `end`, with their signs; from the end."""
    before, worker, sign = came_by[end]
    while worker >= 0:
        yield worker, sign
        before, worker, sign = came_by[before]


@register
def fractional(n: int, s: int) -> RepetitionCode:
    """Fractional repetition: n / (s+1) groups, each of s+1 workers that hold the same s+1 parts; group i // (s+1).

    Load (s+1)/n; n parts. Put the members of one group on different nodes (`placement`).

    Raises:
        ConfigError: s+1 does not divide n; `binary` takes any n.
    """
    check_workers(n, s)
    if n % (s + 1):
        raise ConfigError(f"s + 1 must divide n = {n} in a fractional code, got s = {s}; use binary({n}, {s})")
    return _of_even_classes("fractional", n, s)


@register
def binary(n: int, s: int) -> RepetitionCode:
    """s+1 classes, worker i in class i mod (s+1), each of which splits the n parts evenly; any n.

    Load ceil(n / floor(n / (s+1))) / n, which is (s+1)/n where s+1 divides n: there it is the fractional code.
    `heterogeneous([1] * n, s)` has a load of 1 / floor(n / (s+1)), with parts of unequal size.

    Raises:
        ConfigError: n or s breaks its rule.
    """
    check_workers(n, s)
    return _of_even_classes("binary", n, s)


def _of_even_classes(name: str, n: int, s: int) -> RepetitionCode:
    classes = [range(c, n, s + 1) for c in range(s + 1)]
    bounds = [[k * n // len(members) for k in range(len(members) + 1)] for members in classes]
    return RepetitionCode.of_classes(name, classes, bounds, uniform_weights(n))

"""When a code decodes, if it is known when each worker answers.

The moment that all the answers needed are there, over the best choice of answers: the same as asking `Code.decodable`
after each arrival, in one pass.
"""

import math

import numpy as np
from numpy.typing import NDArray

from distopt.coding.code import Code
from distopt.coding.repetition import RepetitionCode

FloatArray = NDArray[np.float64]


class DecodeTime:
    """When `code` decodes."""

    def __init__(self, code: Code) -> None:
        self.code = code
        self._groups: NDArray[np.int64] | None = None
        self._intervals: list[tuple[int, int]] | None = None
        if isinstance(code, RepetitionCode):
            covered = sum(stop - start for start, stop in (code.intervals[group[0]] for group in code.groups))
            if covered == code.num_parts and len({len(group) for group in code.groups}) == 1:
                self._groups = np.array(code.groups)  # disjoint parts: one answer of each group is needed
            else:
                self._intervals = list(code.intervals)

    def at(self, times: FloatArray, since: float = -math.inf) -> float:
        """The first moment at which the code decodes.

        Args:
            times: (workers,) seconds of the answers; -inf for one that is there, inf for one that never comes.
            since: Earlier than this does not interest.

        Returns:
            Seconds, at least `since`; inf if never.
        """
        here = int((times <= since).sum())
        if here >= self.code.num_workers - self.code.tolerance:
            return since
        if self._groups is not None:
            return max(since, float(times[self._groups].min(axis=1).max()))
        if self._intervals is not None:
            return max(since, self._connected(times, self._intervals))
        return max(since, self._bisect(times))

    def _connected(self, times: FloatArray, intervals: list[tuple[int, int]]) -> float:
        """When the answers lead from point 0 to the last one, as `RepetitionCode` says: each connects two points."""
        last = self.code.num_parts
        component = list(range(last + 1))  # of each point
        members = [[point] for point in range(last + 1)]
        for worker in np.argsort(times, kind="stable").tolist():
            start, stop = intervals[worker]
            kept, merged = component[start], component[stop]
            if kept == merged:
                continue
            if len(members[kept]) < len(members[merged]):
                kept, merged = merged, kept
            for point in members[merged]:
                component[point] = kept
            members[kept] += members[merged]
            if component[0] == component[last]:
                return float(times[worker])
        return math.inf

    def _bisect(self, times: FloatArray) -> float:
        """Of any code: more answers never make a set undecodable."""
        order = np.argsort(times, kind="stable").tolist()
        low, high = 0, int((times < math.inf).sum())  # decodes with the first `high`, if at all
        if not self.code.decodable(order[:high]):
            return math.inf
        while low < high:
            middle = (low + high) // 2
            if self.code.decodable(order[:middle]):
                high = middle
            else:
                low = middle + 1
        return float(times[order[high - 1]]) if high else -math.inf

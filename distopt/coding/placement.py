"""Which worker takes which row of a code, so that one slow or lost node hurts as little as it can.

Workers of one node become stragglers together. Where they hold rows that stand in for each other, the code tolerates
less than it could:

- repetition codes: the workers of a class split the data, so a class should be on few nodes; then the members of a
  group (equal rows, one per class) are spread over as many nodes as they can be;
- `cyclic_mds`: neighbours among the missing amplify rounding errors without limit, so the workers of a node stand
  evenly spaced in the circle: then they amplify least;
- `cyclic` bears neighbours best of all, so the workers of a node are neighbours.

Limits: a node with more than s workers may still be more than a code tolerates. The rows of `heterogeneous` belong to
the workers whose speeds were measured, and those of `expander`, `random_regular` and `least_squares` have no order:
both stay where they are.
"""

from collections.abc import Hashable, Sequence

from distopt.coding.approximate import ApproximateCode, EarlyRepetitionCode
from distopt.coding.code import Code
from distopt.coding.cyclic import CyclicMDSCode
from distopt.coding.repetition import RepetitionCode
from distopt.errors import ConfigError


def placement(code: Code, nodes: Sequence[Hashable]) -> list[int]:
    """The row of the code for each worker: a permutation.

    Args:
        code: For as many workers as `nodes` names.
        nodes: The node of each worker; equal names are one node.

    Returns:
        `rows`, where worker i takes row `rows[i]` of `code.matrix`; the same for the same `nodes` on every rank.

    Raises:
        ConfigError: There are more or fewer names than workers.
    """
    if len(nodes) != code.num_workers:
        raise ConfigError(
            f"nodes must name the node of each of the {code.num_workers} workers, got {len(nodes)}; name them in rank "
            "order"
        )
    if not code.interchangeable or (isinstance(code, ApproximateCode) and not isinstance(code, EarlyRepetitionCode)):
        return list(range(code.num_workers))
    if isinstance(code, CyclicMDSCode):
        workers, order = _alternating(nodes), list(range(code.num_workers))
    else:
        workers, order = _node_by_node(nodes), _safe_together(code)
    rows = [0] * code.num_workers
    for worker, row in zip(workers, order, strict=True):
        rows[worker] = row
    return rows


def _safe_together(code: Code) -> list[int]:
    """The rows in an order in which consecutive ones do not stand in for each other."""
    if isinstance(code, RepetitionCode):
        return [row for members in code.classes for row in members]
    if isinstance(code, EarlyRepetitionCode):
        return [row for members in zip(*code.groups, strict=True) for row in members]
    return list(range(code.num_workers))


def _members(nodes: Sequence[Hashable]) -> list[list[int]]:
    members: dict[Hashable, list[int]] = {}
    for worker, node in enumerate(nodes):
        members.setdefault(node, []).append(worker)
    return list(members.values())


def _node_by_node(nodes: Sequence[Hashable]) -> list[int]:
    return [worker for members in _members(nodes) for worker in members]


def _alternating(nodes: Sequence[Hashable]) -> list[int]:
    """The workers so that those of each node come at regular intervals."""
    placed = []
    for index, members in enumerate(_members(nodes)):
        placed += [((place + 0.5) / len(members), index, worker) for place, worker in enumerate(members)]
    return [worker for _, _, worker in sorted(placed)]

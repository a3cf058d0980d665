"""Placement is a permutation that spreads groups as far as they can be, and keeps a lost node cheap."""

from collections import Counter

import numpy as np
import pytest
from code_examples import LARGER, SIZES, by_name, examples
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.coding import approximate, binary, cyclic, cyclic_mds, expander, fractional, heterogeneous, placement
from distopt.errors import ConfigError

BY_NAME = by_name(examples(SIZES + LARGER))


def nodes_of(sizes):
    return [node for node, size in enumerate(sizes) for _ in range(size)]


def without(code, rows, nodes, lost):
    """The rows that survive when a node is lost."""
    return [row for row, node in zip(rows, nodes, strict=True) if node != lost]


@st.composite
def placed_groups(draw):
    num_groups, copies = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    nodes = draw(st.lists(st.integers(0, 5), min_size=num_groups * copies, max_size=num_groups * copies))
    return num_groups, copies, nodes


@given(placed_groups())
@pytest.mark.parametrize("make", [lambda n, c: fractional(n, c - 1), lambda n, c: binary(n, c - 1), approximate])
def test_members_of_a_group_are_spread_as_far_as_they_can_be(make, placed):
    num_groups, copies, nodes = placed
    n = num_groups * copies
    rows = placement(make(n, copies), nodes)
    assert sorted(rows) == list(range(n))
    together = Counter((node, row // copies) for node, row in zip(nodes, rows, strict=True))
    for (node, _), count in together.items():
        assert count <= -(-nodes.count(node) // num_groups)  # pigeonhole: fewer cannot be


@pytest.mark.parametrize("name", sorted(BY_NAME))
@pytest.mark.parametrize("num_nodes", [1, 2, 3, 7])
def test_a_permutation_that_is_the_same_on_every_rank(name, num_nodes):
    for code in BY_NAME[name]:
        nodes = [f"host{worker * num_nodes // code.num_workers}" for worker in range(code.num_workers)]
        rows = placement(code, nodes)
        assert sorted(rows) == list(range(code.num_workers))
        assert rows == placement(code, tuple(nodes))


@pytest.mark.parametrize("name", sorted(name for name, codes in BY_NAME.items() if codes[0].exact))
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_node_of_at_most_s_workers_may_be_lost(name, data):
    code = data.draw(st.sampled_from(BY_NAME[name]))
    n = code.num_workers
    nodes = data.draw(st.lists(st.integers(0, max(1, n // 2)), min_size=n, max_size=n))
    rows = placement(code, nodes)
    for node in set(nodes):
        if nodes.count(node) <= code.tolerance:
            assert code.decodable(without(code, rows, nodes, node))
            a = code.decode(without(code, rows, nodes, node))
            assert np.abs(a @ code.matrix - 1).max() < 1e-6


@pytest.mark.parametrize(
    ("n", "s", "sizes"), [(12, 2, (4, 4, 4)), (12, 1, (6, 6)), (64, 7, (16,) * 4), (10, 1, (5, 5))]
)
def test_a_repetition_code_bears_the_loss_of_a_node_of_more_than_s(n, s, sizes):
    nodes = nodes_of(sizes)
    for code in (fractional(n, s), binary(n, s)):
        rows = placement(code, nodes)
        for node in set(nodes):
            assert code.decodable(without(code, rows, nodes, node))
        assert not all(code.decodable(without(code, range(n), nodes, node)) for node in set(nodes))


@pytest.mark.parametrize(("n", "s", "sizes"), [(11, 2, (4, 4, 3)), (9, 1, (5, 4)), (23, 3, (6, 6, 6, 5))])
def test_a_binary_code_of_uneven_classes_bears_the_loss_of_a_node(n, s, sizes):
    nodes, code = nodes_of(sizes), binary(n, s)
    rows = placement(code, nodes)
    for node in set(nodes):
        assert code.decodable(without(code, rows, nodes, node))


@pytest.mark.parametrize(("n", "s", "size"), [(16, 3, 2), (63, 8, 7), (64, 9, 8), (128, 17, 16), (256, 27, 16)])
def test_a_lost_node_costs_a_cyclic_mds_code_next_to_nothing(n, s, size):
    code = cyclic_mds(n, s)
    nodes = [worker // size for worker in range(n)]
    rows = placement(code, nodes)
    for node in set(nodes):
        assert code.amplification(without(code, rows, nodes, node)) < 1.6 * n**0.5


def test_without_placement_a_lost_node_costs_a_cyclic_mds_code_everything():
    code = cyclic_mds(64, 9)
    assert code.amplification(range(8, 64)) > 1e5


def test_uneven_nodes_of_a_cyclic_mds_code_alternate_too():
    code, nodes = cyclic_mds(63, 8), nodes_of((8, 8, 8, 8, 8, 8, 5, 5, 5))
    rows = placement(code, nodes)
    for node in set(nodes):
        assert code.amplification(without(code, rows, nodes, node)) < 100


@pytest.mark.parametrize("code", [cyclic(6, 1), expander(6, 2), heterogeneous([1, 2, 3, 4, 5, 6], 1)], ids=repr)
def test_rows_without_a_better_place_stay(code):
    assert placement(code, [0, 0, 0, 1, 1, 1]) == list(range(6))


def test_every_worker_has_a_node():
    with pytest.raises(ConfigError, match="node of each of the 6 workers, got 5"):
        placement(fractional(6, 1), [0] * 5)

"""Loads follow the measured speeds, and classes of workers are about equally fast."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.coding import heterogeneous
from distopt.coding.heterogeneous import balanced_classes
from distopt.errors import ConfigError

SPEEDS = st.lists(st.floats(0.2, 5.0), min_size=2, max_size=40)


@given(SPEEDS, st.data())
def test_workers_of_a_class_end_at_the_same_time(speeds, data):
    s = data.draw(st.integers(0, len(speeds) - 1))
    code = heterogeneous(speeds, s)
    assert code.tolerance == s == len(code.classes) - 1
    assert sorted(worker for members in code.classes for worker in members) == list(range(len(speeds)))
    for members in code.classes:
        whole = sum(speeds[worker] for worker in members)
        for worker in members:
            assert code.loads[worker] == pytest.approx(speeds[worker] / whole, abs=1 / (100 * len(speeds)))
        assert (code.matrix[list(members)].sum(axis=0) == 1).all()


@given(st.lists(st.floats(0.2, 5.0), min_size=2, max_size=7), st.data())
@settings(max_examples=60, deadline=None)
def test_the_slowest_class_is_nearly_as_fast_as_any_split_makes_it(speeds, data):
    num_classes = data.draw(st.integers(1, min(3, len(speeds))))
    classes = balanced_classes(speeds, num_classes)
    assert all(classes)
    best = max(
        min(sum(v for v, c in zip(speeds, split, strict=True) if c == k) for k in range(num_classes))
        for split in itertools.product(range(num_classes), repeat=len(speeds))
    )
    found = min(sum(speeds[worker] for worker in members) for members in classes)
    assert found > 0.8 * best


def test_workers_change_places_where_the_fastest_first_go_wrong():
    speeds = [3.0, 3.0, 2.0, 2.0, 2.0]  # one after the other they would come to 7 and 5
    assert [sum(speeds[worker] for worker in members) for members in balanced_classes(speeds, 2)] == [6.0, 6.0]


def test_many_workers_come_near_to_the_time_of_the_paper():
    speeds = np.random.default_rng(0).lognormal(0, 0.5, 64).tolist()
    code = heterogeneous(speeds, 8)
    slowest_s = max(code.loads / speeds)
    assert slowest_s < 1.02 * 9 / sum(speeds)
    with_equal_loads_s = max(9 / 64 / speed for speed in speeds)
    assert slowest_s < 0.5 * with_equal_loads_s


def test_equal_speeds_give_groups():
    code = heterogeneous([2.0] * 6, 1)
    assert [len(members) for members in code.groups] == [2, 2, 2]
    assert code.loads == pytest.approx(1 / 3)
    assert heterogeneous([1] * 5, 1).load == pytest.approx(1 / 2)


def test_a_worker_faster_than_a_class_should_be_computes_everything():
    code = heterogeneous([10.0, 1.0, 1.0, 1.0], 1)
    assert code.loads == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3], abs=1e-2)
    assert code.decode([0]).tolist() == [1, 0, 0, 0]


def test_speeds_of_numpy_are_welcome():
    assert heterogeneous(np.array([1.0, 2.0, 3.0], dtype=np.float32), 1).num_workers == 3


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan"), float("inf"), True, "1", None])
def test_speeds_are_positive(speed):
    with pytest.raises(ConfigError, match=r"speeds must be positive numbers, got .* for worker 1; leave it out"):
        heterogeneous([1.0, speed, 2.0], 1)


def test_a_worker_with_next_to_nothing_to_do_is_left_out():
    with pytest.raises(ConfigError, match=r"less than 1/300 of the data, got 0.0001 for worker 2; leave it out"):
        heterogeneous([1.0, 1.0, 1e-4], 0)

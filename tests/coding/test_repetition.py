"""Fractional and binary codes: the groups and classes of the papers, and decodings by few messages."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distopt.coding import RepetitionCode, binary, fractional
from distopt.errors import ConfigError, DecodeError

SIZES = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1)))


@pytest.mark.parametrize(("n", "s"), [(4, 1), (6, 2), (12, 3), (12, 0), (5, 4)])
def test_a_group_of_a_fractional_code_holds_the_same_parts(n, s):
    code = fractional(n, s)
    for worker in range(n):
        group = worker // (s + 1)
        assert code.support(worker) == tuple(range(group * (s + 1), (group + 1) * (s + 1)))
    assert code.groups == tuple(tuple(range(start, start + s + 1)) for start in range(0, n, s + 1))
    assert set(np.unique(code.matrix)) <= {0.0, 1.0}


@given(SIZES)
def test_each_class_of_a_binary_code_splits_the_data_evenly(size):
    n, s = size
    code = binary(n, s)
    assert code.matrix.shape == (n, n)
    for c in range(s + 1):
        members = range(c, n, s + 1)
        assert code.classes[c] == tuple(members)
        assert (code.matrix[members].sum(axis=0) == 1).all()
        sizes = code.matrix[members].sum(axis=1)
        assert set(sizes) <= {n // len(members), -(-n // len(members))}
    assert code.load == pytest.approx(-(-n // (n // (s + 1))) / n)


@pytest.mark.parametrize(("n", "s"), [(4, 1), (6, 2), (16, 3), (7, 0)])
def test_binary_is_fractional_where_that_exists(n, s):
    assert np.array_equal(binary(n, s).matrix, fractional(n, s).matrix)


def test_the_first_of_each_group_is_enough():
    code = fractional(6, 1)
    for survivors in itertools.product((0, 1), (2, 3), (4, 5)):
        assert code.decodable(survivors)
        assert code.decode(survivors).tolist() == [float(worker in survivors) for worker in range(6)]


@given(SIZES, st.randoms())
def test_coefficients_are_whole_and_messages_few(size, random):
    n, s = size
    code = binary(n, s)
    survivors = random.sample(range(n), n - s)
    a = code.decode(survivors)
    assert set(a.tolist()) <= {-1.0, 0.0, 1.0}
    complete = [len(members) for members in code.classes if set(members) <= set(survivors)]
    assert np.count_nonzero(a) <= min(complete)
    assert code.amplification(survivors) <= n**0.5


def test_other_ways_than_complete_classes_decode_too():
    code = binary(5, 1)  # classes (0, 2, 4) and (1, 3): 0, 1, 2 | 3, 4 beside 0, 1 | 2 | 3, 4
    assert [code.support(worker) for worker in range(5)] == [(0,), (0, 1), (1, 2), (2, 3, 4), (3, 4)]
    a = code.decode([0, 1, 2, 3])
    assert a.tolist() == [0, 1, 0, 1, 0]
    # 1 covers the parts of 0 and one of the two parts of 2
    with pytest.raises(DecodeError, match=r"without workers 3, 4: .* part 3, which the group \[3, 4\] held"):
        code.decode([0, 1, 2])


def split_by(*bounds):
    """A code of classes that split the data at these points."""
    ids = iter(range(100))
    classes = [[next(ids) for _ in ends[1:]] for ends in bounds]
    num_parts = bounds[0][-1]
    return RepetitionCode.of_classes("split", classes, bounds, np.full(num_parts, 1 / num_parts))


def test_a_way_may_go_backwards():
    code = split_by([0, 4, 6], [0, 2, 4, 6], [0, 2, 6])
    assert code.decode([0, 3, 6]).tolist() == [1, 0, 0, -1, 0, 0, 1]
    for survivors in itertools.chain(*(itertools.combinations(range(7), count) for count in range(1, 8))):
        rows = code.matrix[list(survivors)]
        possible = np.linalg.matrix_rank(np.vstack([rows, np.ones(6)])) == np.linalg.matrix_rank(rows)
        assert code.decodable(survivors) == possible
        if possible:
            assert (code.decode(survivors) @ code.matrix == 1).all()


def test_the_fewest_messages_though_many_small_ones_come_first_or_last():
    few, many = [0, 3, 12], list(range(0, 13, 2))
    assert np.flatnonzero(split_by(few, many).decode(range(8))).tolist() == [0, 1]
    assert np.flatnonzero(split_by(many, few).decode(range(8))).tolist() == [6, 7]


def test_an_undecodable_set_names_the_lost_group_or_a_gap_in_each_class():
    with pytest.raises(DecodeError, match=r"workers 1, 2, 3: .* part 2, which the group \[2, 3\] held \(3 of 6 are"):
        fractional(6, 1).decode([0, 4, 5])
    code = binary(7, 2)  # all parts are held, but no sum of rows counts each once
    survivors = [1, 3, 6]
    assert code.matrix[survivors].any(axis=0).all()
    with pytest.raises(DecodeError, match=r"0, 2, 4, 5: no class of workers is complete, .* one of \[0, 4, 2\]"):
        code.decode(survivors)


def test_fractional_points_to_binary():
    with pytest.raises(ConfigError, match=r"s \+ 1 must divide n = 7 .* got s = 1; use binary\(7, 1\)"):
        fractional(7, 1)

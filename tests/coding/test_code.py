"""Laws of every registered code: each allowed set of survivors decodes truly; an error names the missing."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from code_examples import LARGER, SIZES, arguments_of, by_name, examples
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.coding import CODES
from distopt.errors import ConfigError, DecodeError

SMALL = by_name(examples(SIZES))
LARGE = by_name(examples(LARGER))
ALL = {name: SMALL[name] + LARGE[name] for name in CODES}
EXACT = sorted(name for name in CODES if SMALL[name][0].exact)

each_exact = pytest.mark.parametrize("name", EXACT)
each = pytest.mark.parametrize("name", sorted(CODES))


def assert_decodes(code, survivors, within=1e-9):
    a = code.decode(survivors)
    assert a.shape == (code.num_workers,)
    assert a.dtype == np.float64
    missing = sorted(set(range(code.num_workers)) - set(survivors))
    assert not a[missing].any()
    assert np.abs(a @ code.matrix - 1).max() < within


def refusal(code, survivors):
    try:
        code.decode(survivors)
    except DecodeError as error:
        return error
    return None


def test_every_registered_code_has_examples_here():
    assert set(SMALL) == set(LARGE) == set(CODES)
    assert {"fractional", "binary", "cyclic", "cyclic_mds", "heterogeneous"} == set(EXACT)


@each_exact
def test_every_allowed_set_decodes(name):
    for code in SMALL[name]:
        workers = range(code.num_workers)
        for count in range(code.tolerance + 1):
            for missing in itertools.combinations(workers, count):
                survivors = [worker for worker in workers if worker not in missing]
                assert_decodes(code, survivors)
                assert code.decodable(survivors)


@each_exact
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_allowed_set_of_many_workers_decodes(name, data):
    code = data.draw(st.sampled_from(LARGE[name]))
    order = data.draw(st.permutations(range(code.num_workers)))
    count = data.draw(st.integers(0, code.tolerance))
    assert_decodes(code, order[count:], within=1e-6)
    assert code.decodable(order[count:])


@each_exact
def test_what_is_not_allowed_decodes_truly_or_names_the_missing(name):
    for code in SMALL[name]:
        workers = set(range(code.num_workers))
        refused = 0
        for count in range(code.tolerance + 1, code.num_workers + 1):
            for missing in itertools.combinations(sorted(workers), count):
                survivors = workers - set(missing)
                error = refusal(code, survivors)
                if error is None:
                    assert_decodes(code, survivors, within=1e-6)
                else:
                    refused += 1
                    assert error.missing == missing
                    assert f"worker{'s' * (count > 1)} {', '.join(map(str, missing))}:" in str(error)
                    assert not code.decodable(survivors)
        assert refused


@each_exact
def test_no_set_that_could_be_decoded_is_refused(name):
    for code in SMALL[name]:
        for count in range(code.num_workers):
            for missing in itertools.combinations(range(code.num_workers), count):
                survivors = [worker for worker in range(code.num_workers) if worker not in missing]
                rows = code.matrix[survivors]
                solved = np.linalg.lstsq(rows.T, np.ones(code.num_parts), rcond=None)[0]
                if np.abs(solved @ rows - 1).max() < 1e-9:
                    assert_decodes(code, survivors, within=1e-6)


@each_exact
def test_the_gradient_itself_comes_back(name):
    for code in ALL[name]:
        generator = np.random.default_rng(0)
        gradients = generator.standard_normal((code.num_parts, 50))
        messages = code.matrix @ gradients
        survivors = generator.permutation(code.num_workers)[code.tolerance :]
        messages[sorted(set(range(code.num_workers)) - set(survivors.tolist()))] = 0.0
        a = code.decode(survivors)
        assert np.abs(a @ messages - gradients.sum(0)).max() < 1e-12 * max(1, np.linalg.norm(a)) * code.num_parts


@each
def test_loads_are_what_the_rows_support(name):
    for code in ALL[name]:
        assert code.part_weights.sum() == pytest.approx(1)
        assert (code.part_weights > 0).all()
        for worker in range(code.num_workers):
            support = code.support(worker)
            assert support == tuple(sorted(support))
            assert support
            assert code.loads[worker] == pytest.approx(code.part_weights[list(support)].sum())
            assert (np.delete(code.matrix[worker], support) == 0).all()
        assert code.load == code.loads.max()
        # each part is held by more workers than may be missing
        assert not code.exact or ((code.matrix != 0).sum(axis=0) > code.tolerance).all()


@pytest.mark.parametrize("name", sorted(set(CODES) - {"binary", "heterogeneous"}))
def test_loads_are_the_least_there_are(name):
    for code in ALL[name]:
        copies = code.tolerance + 1 if code.exact else round(code.load * code.num_workers)
        assert code.loads == pytest.approx(copies / code.num_workers)


@each
def test_error_and_amplification_are_those_of_the_decoding(name):
    for code in ALL[name]:
        survivors = range(code.tolerance, code.num_workers)
        a = code.decode(survivors)
        assert code.amplification(survivors) == pytest.approx(np.linalg.norm(a))
        assert code.error(survivors) == pytest.approx(np.average((a @ code.matrix - 1) ** 2, weights=code.part_weights))


@each
def test_the_order_of_arrival_makes_no_difference(name):
    for code in ALL[name]:
        survivors = list(range(code.tolerance, code.num_workers))
        assert np.array_equal(code.decode(survivors), code.decode(reversed(survivors)))
        assert np.array_equal(code.decode(survivors), code.decode(torch.tensor(survivors)))
        assert np.array_equal(code.decode(set(survivors)), code.decode(np.array(survivors)))


@each
def test_the_same_arguments_make_the_same_code(name):
    for arguments in arguments_of(name, [(12, 3)]):
        assert np.array_equal(CODES[name](*arguments).matrix, CODES[name](*arguments).matrix)


@each
def test_parity_checks_are_all_that_the_messages_obey(name):
    for code in ALL[name]:
        generator = np.random.default_rng(1)
        for count in {0, min(1, code.tolerance), code.tolerance, code.num_workers // 2}:
            arrived = generator.permutation(code.num_workers)[count:].tolist()
            checks = code.parity_checks(arrived)
            rows = code.matrix[arrived]
            assert checks.shape == (len(arrived) - np.linalg.matrix_rank(rows, tol=1e-8), len(arrived))
            assert np.abs(checks @ rows).max(initial=0) < 1e-7
            assert np.linalg.matrix_rank(checks, tol=1e-8) == len(checks)


@each
def test_part_sizes_sum_to_the_samples_and_follow_the_weights(name):
    for code, num_samples in itertools.product(ALL[name], (0, 1, 7, 1000)):
        sizes = code.part_sizes(num_samples)
        assert sum(sizes) == num_samples
        assert np.abs(np.array(sizes) - code.part_weights * num_samples).max() <= 1


@each
def test_a_code_cannot_change(name):
    for code in ALL[name]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            code.tolerance = 3
        for array in (code.matrix, code.part_weights, code.loads):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 3


@pytest.mark.parametrize(
    "survivors",
    [
        [0, 1, 2, 2],
        [0, 6],
        [-1],
        [True, False, True, True, True, True],
        np.ones(6, dtype=bool),
        torch.ones(6, dtype=torch.bool),
        [0.0, 1.0],
        ["0"],
    ],
)
def test_survivors_are_ids_without_duplicates(survivors):
    for code in (code for codes in ALL.values() for code in codes if code.num_workers == 6):
        for asked in (code.decode, code.decodable, code.error, code.amplification, code.parity_checks):
            with pytest.raises(ConfigError, match="survivors must"):
                asked(survivors)


@pytest.mark.parametrize("name", sorted(CODES))
def test_sizes_that_make_no_sense_are_refused(name):
    make = CODES[name]
    bad = [([], 0), ([1.0, 2.0], 2), ([1.0, 2.0], -1), ([1.0, 2.0], 1.0), ([1.0, 0.0], 1), ([1.0, "2"], 1)]
    if name != "heterogeneous":
        bad = [(0, 0), (3, -1), (3, 4), (3.0, 1), (3, 1.0), (3, True), ("3", 1)]
    for arguments in bad:
        with pytest.raises(ConfigError):
            make(*arguments)

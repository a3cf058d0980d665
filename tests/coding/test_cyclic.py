"""Cyclic codes: the supports and equations of the papers, and what they make of rounding errors.

The relative errors of the gradient with float32 messages are those of a table that was measured before these codes were
written; bounds are its orders of magnitude.
"""

import numpy as np
import pytest

from distopt.coding import binary, cyclic, cyclic_mds, fractional
from distopt.errors import ConfigError, DecodeError

BF16_EPSILON = 2.0**-8


def relative_errors(code, missing_sets, rounded=np.float32):
    """Of the decoded gradient, against the sum of the parts in float64; messages are rounded once."""
    generator = np.random.default_rng(7)
    gradients = generator.standard_normal((code.num_parts, 500))
    exact = gradients.sum(0)
    messages = rounded(code.matrix @ gradients).astype(np.float64)
    errors = []
    for missing in missing_sets:
        a = code.decode(set(range(code.num_workers)) - set(missing))
        errors.append(np.linalg.norm(a @ messages - exact) / np.linalg.norm(exact))
    return np.array(errors)


def random_sets(code, missing, count=300):
    generator = np.random.default_rng(11)
    return [generator.permutation(code.num_workers)[:missing].tolist() for _ in range(count)]


def to_bf16(values):
    """Rounds to 8 bits of precision, as bfloat16 has."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(mantissa / BF16_EPSILON) * BF16_EPSILON, exponent)


@pytest.mark.parametrize("make", [cyclic, cyclic_mds])
@pytest.mark.parametrize(("n", "s"), [(4, 1), (7, 2), (16, 3), (64, 9)])
def test_worker_i_holds_the_next_parts_of_the_circle(make, n, s):
    code = make(n, s)
    for worker in range(n):
        assert code.support(worker) == tuple(sorted((worker + k) % n for k in range(s + 1)))


@pytest.mark.parametrize(("n", "s"), [(5, 2), (16, 3), (64, 8)])
def test_rows_of_cyclic_are_in_the_null_space_of_a_random_matrix_whose_rows_sum_to_0(n, s):
    check = np.random.default_rng(3).standard_normal((s, n))
    check[:, -1] = -check[:, :-1].sum(axis=1)
    matrix = cyclic(n, s, seed=3).matrix
    assert (np.diag(matrix) == 1).all()
    assert np.abs(matrix @ check.T).max() < 1e-10 * np.abs(matrix).max()
    assert not np.array_equal(matrix, cyclic(n, s, seed=4).matrix)


@pytest.mark.parametrize(("n", "s"), [(4, 1), (7, 2), (16, 3), (64, 9), (9, 8), (8, 7)])
def test_cyclic_mds_is_the_circulant_of_the_roots_around_minus_1(n, s):
    code = cyclic_mds(n, s)
    roots = np.exp(2j * np.pi * ((n - s + 1) // 2 + np.arange(s)) / n)
    polynomial = np.poly(roots)[::-1]  # ascending
    polynomial /= polynomial.sum()
    assert np.abs(polynomial.imag).max() < 1e-12
    for worker in range(n):
        row = np.roll(code.matrix[worker], -worker)
        assert np.abs(row[: s + 1] - polynomial.real).max() < 1e-12
        assert not row[s + 1 :].any()


@pytest.mark.parametrize(("n", "s", "instead"), [(8, 2, 3), (7, 3, 4), (64, 8, 9), (3, 1, 2)])
def test_cyclic_mds_says_where_it_is_real(n, s, instead):
    with pytest.raises(
        ConfigError, match=rf"both even or both odd .* n = {n}, s = {s}; use cyclic_mds\({n}, {instead}\)"
    ):
        cyclic_mds(n, s)
    assert cyclic_mds(n, instead).tolerance == instead


@pytest.mark.parametrize("make", [cyclic, cyclic_mds])
def test_of_several_decodings_the_smallest(make):
    code = make(16, 3)
    for missing in [(), (3,), (0, 5), (1, 2, 3)]:
        survivors = sorted(set(range(16)) - set(missing))
        smallest = np.linalg.lstsq(code.matrix[survivors].T, np.ones(16), rcond=None)[0]
        assert code.decode(survivors)[survivors] == pytest.approx(smallest, abs=1e-9)


def test_cyclic_mds_decodes_every_other_worker_by_luck():
    code = cyclic_mds(8, 1)
    assert code.decode(range(0, 8, 2)) == pytest.approx([2, 0] * 4)
    assert not code.decodable(range(0, 8, 2))  # asking stays cheap
    with pytest.raises(
        DecodeError, match=r"0, 1: the equations have no solution, .* \(2 of 8 are missing, any 1 may be\)"
    ):
        code.decode(range(2, 8))


def test_what_float64_cannot_solve_is_refused_by_name():
    code = cyclic_mds(256, 27)
    with pytest.raises(
        DecodeError, match=r"too ill-conditioned for float64.*any 27 may be\); .* use binary\(256, 27\)"
    ):
        code.decode(range(27, 256))


@pytest.mark.parametrize(
    ("code", "median", "largest", "adjacent"),
    [
        (fractional(16, 3), (1e-9, 2e-7), (1e-9, 2e-7), (1e-9, 2e-7)),
        (binary(16, 3), (1e-9, 2e-7), (1e-9, 2e-7), (1e-9, 2e-7)),
        (binary(64, 8), (1e-9, 2e-7), (1e-9, 2e-7), (1e-9, 2e-7)),
        (cyclic(16, 3), (1e-7, 5e-6), (2e-6, 1e-3), (1e-7, 1e-5)),
        (cyclic(64, 8), (2e-6, 2e-4), (1e-4, 1e-1), (1e-7, 1e-4)),
        (cyclic_mds(16, 3), (1e-8, 5e-7), (1e-7, 1e-5), (1e-7, 5e-6)),
    ],
    ids=repr,
)
def test_rounding_errors_of_float32_messages(code, median, largest, adjacent):
    found = relative_errors(code, random_sets(code, code.tolerance))
    assert median[0] < np.median(found) < median[1]
    assert largest[0] < found.max() < largest[1]
    (neighbours,) = relative_errors(code, [range(code.tolerance)])
    assert adjacent[0] < neighbours < adjacent[1]


@pytest.mark.parametrize("n", [63, 65])  # with 64 workers and 8 stragglers the coefficients would be complex
def test_rounding_errors_of_cyclic_mds_with_neighbours_among_8_stragglers(n):
    code = cyclic_mds(n, 8)
    found = relative_errors(code, random_sets(code, 8))
    assert 2e-8 < np.median(found) < 3e-6
    assert found.max() < 1e-2
    (neighbours,) = relative_errors(code, [range(8)])
    assert 1e-2 < neighbours < 10
    (neighbours_of_64,) = relative_errors(cyclic_mds(64, 9), [range(8)])
    assert 1e-3 < neighbours_of_64 < 1


def test_rounding_errors_of_the_complex_cyclic_mds_code_of_64_and_8():
    roots = np.exp(2j * np.pi * np.arange(28, 36) / 64)
    polynomial = np.poly(roots)[::-1]
    row = np.zeros(64, dtype=complex)
    row[:9] = polynomial / polynomial.sum()
    matrix = np.stack([np.roll(row, worker) for worker in range(64)])
    generator = np.random.default_rng(7)
    gradients = generator.standard_normal((64, 500))
    messages = (matrix @ gradients).astype(np.complex64).astype(np.complex128)

    def error(survivors):
        a = np.linalg.lstsq(matrix[survivors].T, np.ones(64), rcond=None)[0]
        return np.linalg.norm(a @ messages[survivors] - gradients.sum(0)) / np.linalg.norm(gradients.sum(0))

    found = [error(generator.permutation(64)[8:]) for _ in range(30)]
    assert 2e-8 < np.median(found) < 3e-6
    assert 1e-2 < error(np.arange(8, 64)) < 10


def test_only_repetition_bears_bf16_messages():
    code = fractional(32, 7)
    assert relative_errors(code, random_sets(code, 7, 50), to_bf16).max() < 2.5e-3
    code = cyclic(32, 7)
    assert relative_errors(code, random_sets(code, 7, 50), to_bf16).max() > 0.3


def test_amplification_foretells_the_error():
    code = cyclic(64, 8)
    sets = random_sets(code, 8, 50)
    amplified = [code.amplification(set(range(64)) - set(missing)) for missing in sets]
    ratio = relative_errors(code, sets) / amplified
    assert ratio.max() < 1e-6
    assert ratio.min() > 1e-10

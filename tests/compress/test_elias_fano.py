"""Elias-Fano: every set of positions comes back, in the bits of the formula; what contradicts itself is refused.

Round trips of all index formats are in test_indices.py.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.compress import INDEX_FORMATS
from distopt.compress.elias_fano import num_bits
from distopt.errors import DecodeError

FORM = INDEX_FORMATS["elias-fano"]


def positions(numel, count, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, numel, generator=generator).argsort(1)[:, :count].sort(1).values.int()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_round_trip_of_rows_for_every_numel_and_count(data):
    numel = data.draw(st.integers(1, 300) | st.sampled_from([4095, 4096, 4097]))
    count, rows = data.draw(st.integers(0, numel)), data.draw(st.integers(1, 4))
    indices = positions(numel, count, rows, data.draw(st.integers(0, 99)))
    (packed,) = FORM.encode(indices, numel)
    assert packed.shape == (rows, FORM.nbytes(numel, count))
    decoded = FORM.decode((packed,), numel, count)
    assert decoded.dtype == torch.int32
    assert torch.equal(decoded, indices)


@pytest.mark.parametrize("numel", range(1, 9))
def test_every_set_of_a_small_tensor(numel):
    for count in range(numel + 1):
        sets = list(itertools.combinations(range(numel), count))
        indices = torch.tensor(sets, dtype=torch.int32).view(len(sets), count)
        (packed,) = FORM.encode(indices, numel)
        assert torch.equal(FORM.decode((packed,), numel, count), indices)


@settings(max_examples=200, deadline=None)
@given(numel=st.integers(1, 2**31 - 1), data=st.data())
def test_the_size_is_that_of_the_formula(numel, data):
    count = data.draw(st.integers(1, numel))
    low = math.floor(math.log2(numel / count) + 1e-12)
    low -= count << low > numel  # log2 may round up
    assert num_bits(numel, count) == count * low + count + (numel >> low)
    assert FORM.nbytes(numel, count) == -(-num_bits(numel, count) // 8)


def test_8_bits_a_position_at_64_of_4096():
    assert FORM.nbytes(4096, 64) == 64
    assert FORM.nbytes(4096, 0) == 0


def test_a_changed_bit_is_refused_or_gives_other_positions_in_the_tensor():
    indices = positions(37, 5, 1, seed=3)
    (packed,) = FORM.encode(indices, 37)
    refused = 0
    for bit in range(8 * packed.numel()):
        damaged = packed.clone()
        damaged[0, bit // 8] ^= 1 << (bit % 8)
        try:
            found = FORM.decode((damaged,), 37, 5)
        except DecodeError:
            refused += 1
            continue
        assert not torch.equal(found, indices)
        assert bool(((found >= 0) & (found < 37)).all())
        assert bool((found.diff() > 0).all())
    assert refused >= 5 + (37 >> 2)  # each bit of the unary part


@pytest.mark.parametrize(
    ("bit", "said"),
    [(15, r"must have 5 ones in its unary part, got \d; .*damaged"), (30, "bits behind the last of 25 must be zero")],
)
def test_what_is_refused_is_told(bit, said):
    (packed,) = FORM.encode(positions(40, 5, 2, seed=0), 40)
    packed[1, bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(DecodeError, match=said):
        FORM.decode((packed,), 40, 5)


@pytest.mark.parametrize("second", [0, 1])
def test_positions_that_do_not_ascend_are_refused(second):
    bits = torch.tensor([1, second, 1, 1, 0, 0], dtype=torch.uint8)  # low bits, then unary: both in the first half
    packed = (bits << torch.arange(6, dtype=torch.uint8)).sum().to(torch.uint8).view(1, 1)
    assert num_bits(4, 2) == 6
    with pytest.raises(DecodeError, match=r"positions must ascend and lie below 4"):
        FORM.decode((packed,), 4, 2)

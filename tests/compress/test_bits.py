"""Fields of a few bits in bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.compress.bits import pack, packed_nbytes, unpack
from distopt.errors import DecodeError


@settings(max_examples=50, deadline=None)
@given(width=st.integers(0, 31), count=st.integers(0, 40), rows=st.integers(1, 3), seed=st.integers(0, 99))
def test_round_trip(width, count, rows, seed):
    fields = torch.randint(0, 2**width, (rows, count), generator=torch.Generator().manual_seed(seed)).int()
    packed = pack(fields, width)
    assert packed.shape == (rows, packed_nbytes(width, count))
    assert torch.equal(unpack(packed, width, count), fields)


def test_the_lowest_bits_come_first():
    assert pack(torch.tensor([5, 1, 7], dtype=torch.int32), 3).tolist() == [0b11001101, 0b1]


def test_bits_behind_the_last_field_are_zero():
    with pytest.raises(DecodeError, match=r"behind the last of 9 must be zero, got others; .*damaged"):
        unpack(torch.tensor([0, 0b10], dtype=torch.uint8), 3, 3)

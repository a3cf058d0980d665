"""Decoding adds in order, and refuses an index that does not belong to the tensor before it writes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt import ops
from distopt.errors import DecodeError
from distopt.ops import reference

I32 = torch.int32


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 300), st.integers(0, 500), st.integers(0, 2**32 - 1),
    st.sampled_from([torch.float32, torch.float64]), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_equals_the_reference(n, num, seed, out_dtype, value_dtype):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(n, (num,), generator=generator, dtype=I32)
    values = (torch.randn(num, generator=generator) * 1e3).to(value_dtype)
    out = torch.randn(n, generator=generator, dtype=out_dtype)
    want = out.clone()
    reference.scatter_add_(want, indices, values)
    ops.scatter_add_(out, indices, values)
    assert torch.equal(out, want)


def test_duplicates_add_in_order():
    out = torch.zeros(1)
    ops.scatter_add_(out, torch.zeros(3, dtype=I32), torch.tensor([1e8, 1.0, -1e8]))
    assert out.item() == 0.0  # the 1 is lost in 1e8; in another order it would not be


@pytest.mark.parametrize("op", [ops.scatter_add_, reference.scatter_add_])
@pytest.mark.parametrize("bad", [-1, 10, 2**31 - 1, -(2**31)])
def test_index_out_of_range(op, bad):
    out = torch.zeros(10)
    with pytest.raises(DecodeError, match=rf"indices\[2\] must be in \[0, 10\), got {bad}; .*nothing was written"):
        op(out, torch.tensor([0, 1, bad, 3], dtype=I32), torch.ones(4))
    assert not out.any()


def test_nothing_fits_an_empty_tensor():
    ops.scatter_add_(torch.zeros(0), torch.zeros(0, dtype=I32), torch.zeros(0))
    with pytest.raises(DecodeError, match=r"\[0, 0\)"):
        ops.scatter_add_(torch.zeros(0), torch.zeros(1, dtype=I32), torch.zeros(1))

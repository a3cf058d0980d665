"""One call on a bucket does in each segment what the single operation does, and touches nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import KINDS, same_bits, tensor

from distopt import ops
from distopt.errors import ConfigError

rows = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 400), st.floats(0, 1)), max_size=8)  # gap, numel, density
kinds = st.sampled_from(sorted(KINDS))


def table(rows, scale=1):
    """The table with its count, the entries of the bucket and of the states."""
    found, end, states, count = [], 0, 0, 0
    for gap, numel, density in rows:
        k = round(numel * scale * density)
        found.append((end + gap, numel * scale, k))
        end += gap + numel * scale
        states += numel * scale
        count += k
    return torch.tensor(found, dtype=torch.int64).view(-1, 3), count, end + 3, states


@settings(max_examples=150, deadline=None)
@given(rows=rows, kind=kinds, seed=st.integers(0, 2**31), scale=st.sampled_from([1, 1, 1, 37]), nesterov=st.booleans())
def test_every_segment_as_alone(rows, kind, seed, scale, nesterov):
    segments, count, numel, num_states = table(rows, scale)
    grad = tensor(kind, numel, seed)
    for op in ("ef", "dgc"):
        states = [tensor(kind, num_states, seed + 1), tensor("normal", num_states, seed + 2)][: 1 + (op == "dgc")]
        alone = [state.clone() for state in states]
        before = grad.clone()
        if op == "ef":
            values, indices = ops.ef_sparsify_segments_(grad, *states, segments, count)
        else:
            values, indices = ops.dgc_sparsify_segments_(
                grad, *states, segments, count, momentum=0.5, nesterov=nesterov
            )
        expected, position = [], 0
        for start, length, k in segments.tolist():
            parts = [state[position : position + length] for state in alone]
            gradient = grad[start : start + length].clone()
            if op == "ef":
                found = ops.ef_sparsify_(gradient, *parts, k)
            else:
                found = ops.dgc_sparsify_(gradient, *parts, k, momentum=0.5, nesterov=nesterov)
            expected.append((found[0], found[1] + start))
            position += length
        if expected:
            assert same_bits(values, torch.cat([v for v, _ in expected]))
            assert same_bits(indices, torch.cat([i for _, i in expected]))
        assert values.numel() == indices.numel() == count
        assert all(same_bits(a, b) for a, b in zip(states, alone, strict=True))
        assert same_bits(grad, before)


@settings(max_examples=150, deadline=None)
@given(
    numel=st.one_of(st.integers(0, 300), st.sampled_from([5000, 20011])),
    owners=st.integers(1, 9),
    density=st.floats(0, 1),
    kind=kinds,
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_every_owner_as_alone(numel, owners, density, kind, seed, dtype):
    x = tensor(kind, numel, seed, dtype)
    k = round(numel // owners * density)
    values, indices = ops.topk_abs_interleaved(x, k, owners)
    assert values.shape == indices.shape == (owners, k)
    for owner in range(owners):
        v, i = ops.topk_abs(x[owner::owners].contiguous(), k)
        assert same_bits(values[owner], v)
        assert same_bits(indices[owner], i)


def segmented(rows, count=2, states=8, numel=10):
    segments = torch.tensor(rows, dtype=torch.int64)
    return ops.ef_sparsify_segments_(torch.ones(numel), torch.ones(states), segments, count)


CASES = {
    "a list": (lambda: ops.ef_sparsify_segments_(torch.ones(4), torch.ones(4), [[0, 4, 1]], 1), "int64 tensor.*list"),
    "flat": (lambda: segmented([0, 8, 2]), r"shape \(num_segments, 3\), got \(3,\)"),
    "outside": (lambda: segmented([[3, 8, 2]]), r"inside grad \(10 entries\), got row 0 from 3 with 8"),
    "overlapping": (lambda: segmented([[0, 5, 1], [4, 3, 1]]), "got row 1 from 4 .* after one that ends at 5"),
    "negative": (lambda: segmented([[-1, 8, 2]]), "got row 0 from -1"),
    "huge": (lambda: segmented([[2**63 - 4, 8, 2]]), "got row 0 from 9223372036854775804"),
    "k": (lambda: segmented([[0, 8, 9]], 9), r"must be in \[0, 8\], got 9 in row 0"),
    "k negative": (lambda: segmented([[0, 8, -1]], 0), r"must be in \[0, 8\], got -1 in row 0"),
    "states": (lambda: segmented([[0, 7, 2]]), r"as many entries as the segments \(7\), got 8"),
    "count": (lambda: segmented([[0, 8, 2]], 3), r"sum of all k \(2\), got 3"),
    "owners": (lambda: ops.topk_abs_interleaved(torch.ones(4), 1, 0), "num_owners must be .* at least 1, got 0"),
    "too many": (lambda: ops.topk_abs_interleaved(torch.ones(4), 3, 2), r"k must be in \[0, 2\]"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case):
    call, message = CASES[case]
    with pytest.raises(ConfigError, match=message):
        call()

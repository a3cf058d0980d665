"""The take operations: sparsify, the check for NaN and Inf, and zeros left in the gradient, in one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import KINDS, PATHS, same_bits, tensor

from distopt import ops
from distopt.errors import ConfigError
from distopt.ops import native, reference

OUTSIDE = 7.5
BAD = (float("nan"), -float("nan"), float("inf"), -float("inf"))

rows = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 400), st.floats(0, 1)), max_size=8)  # gap, numel, density
scales = st.sampled_from([1, 1, 1, 37])
grad_dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
state_dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
kernels = st.sampled_from(PATHS or ("reference",))
seeds = st.integers(0, 2**31)


class Bucket:
    """A gradient with OUTSIDE around its segments, and the states of an operation."""

    def __init__(self, op, rows, kind, seed, scale=1, grad_dtype=torch.float32, state_dtype=torch.float32):
        found, end, covered, self.count = [], 0, 0, 0
        for gap, numel, density in rows:
            k = round(numel * scale * density)
            found.append((end + gap, numel * scale, k))
            end += gap + numel * scale
            covered += numel * scale
            self.count += k
        self.op = op
        self.segments = torch.tensor(found, dtype=torch.int64).view(-1, 3)
        self.outside = torch.ones(end + 3, dtype=torch.bool)
        for start, numel, _ in found:
            self.outside[start : start + numel] = False
        self.grad = torch.where(self.outside, OUTSIDE, tensor(kind, end + 3, seed)).to(grad_dtype)
        self.grad.nan_to_num_(2.0, 3.0, -3.0)  # after the rounding, which may overflow
        num_states = 2 if op == "dgc" else 1
        self.states = [tensor("normal", covered, seed + 1 + i, state_dtype) for i in range(num_states)]

    def copy(self):
        same = object.__new__(Bucket)
        vars(same).update(vars(self), grad=self.grad.clone(), states=[state.clone() for state in self.states])
        return same

    def part(self, row):
        start, numel, _ = self.segments[row].tolist()
        return self.grad[start : start + numel]

    def run(self, name, options, module=ops):
        options = options if self.op == "dgc" else {}
        function = getattr(module, f"{self.op}_{name}_segments_")
        return function(self.grad, *self.states, self.segments, self.count, **options)


options = st.fixed_dictionaries(
    {"momentum": st.sampled_from([0.0, 0.5, 0.9]), "nesterov": st.booleans(), "masking": st.booleans()}
)
buckets = st.builds(
    Bucket,
    st.sampled_from(["dgc", "ef"]),
    rows,
    st.sampled_from(sorted(KINDS)),
    seeds,
    scales,
    grad_dtypes,
    state_dtypes,
)


def check_finite(bucket, options):
    want, taken = bucket.copy(), bucket.copy()
    expected = want.run("sparsify", options)
    values, indices, bad = taken.run("take", options)
    assert bad.dtype is torch.int64
    assert bad.shape == ()
    assert bad == -1
    assert same_bits(values, expected[0])
    assert same_bits(indices, expected[1])
    assert all(same_bits(a, b) for a, b in zip(taken.states, want.states, strict=True))
    assert same_bits(taken.grad, torch.where(bucket.outside, bucket.grad, torch.zeros_like(bucket.grad)))


def check_refused(bucket, options, first_bad, module=ops):
    """Nothing that is not finite got in, nothing went out, and the caller can name the segment."""
    taken = bucket.copy()
    values, indices, bad = taken.run("take", options, module)
    assert bad == first_bad
    assert values.shape == (bucket.count,)
    assert values.dtype is reference.compute_dtype(bucket.states[0])
    assert same_bits(values, torch.zeros_like(values))
    assert same_bits(indices, torch.arange(bucket.count, dtype=torch.int32))
    assert all(state.isfinite().all() for state in taken.states)
    assert same_bits(taken.grad[bucket.outside], bucket.grad[bucket.outside])
    assert not taken.part(first_bad).isfinite().all()
    # Each entry of v is as before or as after the update: whatever had been selected is back.
    updated = bucket.copy()
    updated.grad.nan_to_num_(0.0, 0.0, 0.0)
    updated.segments = bucket.segments.clone()
    updated.segments[:, 2] = 0
    updated.count = 0
    updated.run("sparsify", options, module)
    before, after, v = bucket.states[-1], updated.states[-1], taken.states[-1]
    assert bool(((v == before) | (v == after)).all())


@settings(max_examples=300, deadline=None)
@given(bucket=buckets, options=options, path=kernels)
def test_sparsify_and_zeros_where_all_is_finite(bucket, options, path):
    if PATHS:
        native.use_path(path)
    check_finite(bucket, options)


@settings(max_examples=300, deadline=None)
@given(bucket=buckets, options=options, path=kernels, data=st.data())
def test_nothing_that_is_not_finite_gets_in(bucket, options, path, data):
    filled = [row for row, (_, numel, _) in enumerate(bucket.segments.tolist()) if numel]
    if not filled:
        return
    bucket.grad.clamp_(-6e4, 6e4)  # so that no sum of what is finite overflows
    chosen = data.draw(st.lists(st.sampled_from(filled), min_size=1, max_size=3))
    for row in chosen:
        part = bucket.part(row)
        part[data.draw(st.integers(0, part.numel() - 1))] = data.draw(st.sampled_from(BAD))
    if PATHS:
        native.use_path(path)
    check_refused(bucket, options, min(chosen))
    check_refused(bucket, options, min(chosen), reference)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.5], ids=["update only", "few", "many"])
def test_every_position(density, grad_dtype, path):
    """Also where a vector, a block, or the tensor ends; one NaN is enough, and the largest finite number is not."""
    native.use_path(path)
    bucket = Bucket("dgc", [(1, 150, density), (0, 70, density)], "normal", 0, 1, grad_dtype)
    bucket.grad[bucket.outside] = float("nan")  # not of the segments
    bucket.part(0)[::7] = torch.finfo(grad_dtype).max * (1e-3 if grad_dtype is not torch.float16 else 1)
    check_finite(bucket, {"momentum": 0.5})
    for i in range(220):
        each = bucket.copy()
        row, at = (0, i) if i < 150 else (1, i - 150)
        each.part(row)[at] = BAD[i % 4]
        check_refused(each, {"momentum": 0.5}, row)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("density", [0.001, 0.01, 0.25], ids=["by maxima", "by candidates", "by threshold"])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_large_segment_among_small_ones(num_threads, density, path):
    native.use_path(path)
    torch.set_num_threads(num_threads)
    sizes = [500] * 300 + [300_001] + [700] * 250 + [0, 1]
    made = Bucket("dgc", [(2, numel, density) for numel in sizes], "normal", 3)
    check_finite(made, {"momentum": 0.9})
    for bad in ([0], [299, 300], [300], [301, 549], [10, 290], [200, 300, 301], [552], [420, 430, 552]):
        each = made.copy()
        for row in bad:
            part = each.part(row)
            part[part.numel() * 2 // 3] = float("inf")
        check_refused(each, {"momentum": 0.9}, min(bad))


def test_overflow_of_a_state_is_not_bad():
    grad, v = torch.full((100,), 3e38), torch.full((100,), 3e38)
    values, _, bad = ops.ef_take_segments_(grad, v, torch.tensor([[0, 100, 3]]), 3)
    assert bad == -1
    assert bool(values.isinf().all())
    assert not grad.any()


def test_states_that_are_not_finite_come_back_as_they_were():
    grad, v = torch.ones(200), torch.randn(200)
    v[3], v[5] = float("inf"), float("nan")
    grad[150] = float("nan")
    *_, bad = ops.ef_take_segments_(grad, v, torch.tensor([[0, 100, 5], [100, 100, 5]]), 10)
    assert bad == 1
    assert v[3].isinf()
    assert v[5].isnan()
    assert bool(v[torch.arange(200) > 5].isfinite().all())


def test_refused_as_sparsify_and_nothing_written():
    grad, v = torch.ones(10), torch.zeros(8)
    for rows, count, message in (
        ([[3, 8, 2]], 2, "inside grad"),
        ([[0, 8, 9]], 9, "got 9 in row 0"),
        ([[0, 8, 2]], 3, "sum of all k"),
    ):
        for run in (
            lambda table, count: ops.ef_take_segments_(grad, v, table, count),
            lambda table, count: ops.dgc_take_segments_(grad, v.clone(), v, table, count, momentum=0.9),
        ):
            with pytest.raises(ConfigError, match=message):
                run(torch.tensor(rows), count)
    with pytest.raises(ConfigError, match="must not share memory"):
        ops.ef_take_segments_(grad, grad, torch.tensor([[0, 10, 2]]), 2)
    with pytest.raises(ConfigError, match="momentum"):
        ops.dgc_take_segments_(grad[:8], v.clone(), v, torch.tensor([[0, 8, 2]]), 2, momentum=2.0)
    assert bool((grad == 1).all())
    assert not v.any()

"""What is sent whole: scaling with its check, the momentum step, and weight decay, each in one pass."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import PATHS, SIZES, same_bits, tensor

from distopt import ops
from distopt.errors import ConfigError
from distopt.ops import native, reference

BAD = (float("nan"), -float("nan"), float("inf"), -float("inf"))
kinds = st.sampled_from(["normal", "wide", "denormals", "zeros", "specials"])
sizes = st.integers(0, 300) | st.sampled_from(SIZES)
seeds = st.integers(0, 2**31)
kernels = st.sampled_from(PATHS or ("reference",))
momenta = st.sampled_from([0.0, 0.5, 0.9, 1.0])
state_dtypes = st.sampled_from([torch.float32, torch.float64])


def use(path, threads):
    torch.set_num_threads(threads)
    if PATHS:
        native.use_path(path)


# -- scale_ ----------------------------------------------------------------------------------------------------------


@given(kinds, sizes, seeds, st.sampled_from([1.0, 0.5, 1 / 3, 1e-30]), kernels, st.integers(1, 2))
@settings(max_examples=50, deadline=None)
def test_scale_equals_the_reference(kind, numel, seed, factor, path, threads):
    use(path, threads)
    x = tensor(kind, numel, seed)
    same = x.clone()
    finite = ops.scale_(x, factor)
    assert finite == reference.scale_(same, factor)
    if finite:
        assert same_bits(x, same)
    else:
        assert not torch.isfinite(x).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scale_takes_every_float(dtype):
    x = torch.randn(100, dtype=dtype)
    want = x * 0.25
    assert ops.scale_(x, 0.25)
    assert torch.equal(x, want)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", BAD)
def test_one_bad_entry_is_found_wherever_it_is(path, bad):
    use(path, 1)
    for numel in (1, 15, 16, 17, 64, 70, 4096, 4097, 5000):
        for at in {0, numel // 2, numel - 2, numel - 1} - {-1}:
            x = torch.ones(numel)
            x[at] = bad
            assert not ops.scale_(x, 0.5), (numel, at)


def test_two_threads_find_what_either_sees():
    torch.set_num_threads(2)
    for at in (0, 499_999, 250_001):
        x = torch.ones(500_000)
        x[at] = torch.inf
        assert not ops.scale_(x, 0.5)


# -- momentum_step_ --------------------------------------------------------------------------------------------------


@given(kinds, sizes, seeds, momenta, st.booleans(), state_dtypes, kernels, st.integers(1, 2))
@settings(max_examples=50, deadline=None)
def test_the_momentum_step_equals_the_reference(kind, numel, seed, momentum, nesterov, dtype, path, threads):
    use(path, threads)
    grad, u = tensor(kind, numel, seed, dtype), tensor(kind, numel, seed + 1, dtype)
    grad2, u2 = grad.clone(), u.clone()
    ops.momentum_step_(grad, u, momentum=momentum, nesterov=nesterov)
    reference.momentum_step_(grad2, u2, momentum=momentum, nesterov=nesterov)
    assert same_bits(grad, grad2)
    assert same_bits(u, u2)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_momentum_step_is_that_of_sgd(nesterov):
    """torch's own optimizer, 5 steps: Nesterov's form there is g + m u, which is the same update one gradient later."""
    parameter = torch.nn.Parameter(torch.zeros(37))
    sgd = torch.optim.SGD([parameter], lr=1.0, momentum=0.5, nesterov=nesterov)
    u, at = torch.zeros(37), torch.zeros(37)
    for step in range(5):
        parameter.grad = torch.arange(37.0) + step  # exact in float32
        update = parameter.grad.clone()
        sgd.step()
        ops.momentum_step_(update, u, momentum=0.5, nesterov=nesterov)
        at -= update
        assert torch.equal(parameter.detach(), at)


# -- decay_step_ -----------------------------------------------------------------------------------------------------


class Bucket:
    """Parameters with gaps between their updates."""

    def __init__(self, numels, kind, seed, dtype):
        self.starts, end = [], 2
        for numel in numels:
            self.starts.append(end)
            end += numel + 3
        wide = torch.promote_types(dtype, torch.float32)
        self.update = tensor(kind, end, seed, wide)
        self.buffers = [tensor(kind, numel, seed + 1 + i, wide) for i, numel in enumerate(numels)]
        self.parameters = [torch.nn.Parameter(tensor(kind, n, seed + 90 + i, dtype)) for i, n in enumerate(numels)]

    def copy(self):
        same = object.__new__(Bucket)
        vars(same).update(vars(self), update=self.update.clone(), buffers=[d.clone() for d in self.buffers])
        return same

    def decay(self, module=ops, **options):
        with torch.no_grad():
            module.decay_step_(self.update, self.starts, self.buffers, self.parameters, **options)


@given(
    st.lists(st.integers(0, 80) | st.sampled_from([1000, 70001]), max_size=6),
    kinds,
    seeds,
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.fixed_dictionaries({"rate": st.sampled_from([0.0, 1e-4, 0.1]), "momentum": momenta, "nesterov": st.booleans()}),
    kernels,
    st.integers(1, 2),
)
@settings(max_examples=50, deadline=None)
def test_the_decay_step_equals_the_reference(numels, kind, seed, dtype, options, path, threads):
    use(path, threads)
    bucket = Bucket(numels, kind, seed, dtype)
    same = bucket.copy()
    before = bucket.update.clone()
    bucket.decay(**options)
    same.decay(reference, **options)
    assert same_bits(bucket.update, same.update)
    assert all(map(same_bits, bucket.buffers, same.buffers))
    outside = torch.ones(len(before), dtype=torch.bool)
    for start, numel in zip(bucket.starts, numels, strict=True):
        outside[start : start + numel] = False
    assert same_bits(bucket.update[outside], before[outside])


def test_decay_reads_a_parameter_in_memory_order():
    weight = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    update, buffer = torch.zeros(48), torch.zeros(48)
    ops.decay_step_(update, [0], [buffer], [weight], rate=0.5, momentum=0.0)
    in_memory = weight.detach().permute(0, 2, 3, 1).reshape(-1)
    assert torch.equal(update, in_memory * 0.5)


# -- weighted_sum_ ---------------------------------------------------------------------------------------------------


@given(
    sizes | st.sampled_from([32767, 32768, 32769, 70001]),
    st.integers(1, 21),
    kinds,
    seeds,
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    kernels,
    st.integers(1, 2),
)
@settings(max_examples=60, deadline=None)
def test_the_weighted_sum_equals_the_reference(numel, num_rows, kind, seed, dtype, path, threads):
    use(path, threads)
    rows = [tensor(kind, numel, seed + i, dtype) for i in range(num_rows)]
    weights = torch.randn(num_rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    out, same = (torch.full((numel,), math.nan, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2))
    ops.weighted_sum_(out, rows, weights)
    reference.weighted_sum_(same, rows, weights)
    assert same_bits(out, same)


def test_the_weighted_sum_is_that_of_numpy():
    rows = [tensor("normal", 1000, i, torch.float64) for i in range(5)]
    out = torch.empty(1000, dtype=torch.float64)
    ops.weighted_sum_(out, rows, [0.5, -1.0, 0.0, 3.0, 1e-3])
    expected = 0.5 * rows[0] - rows[1] + 3 * rows[3] + 1e-3 * rows[4]
    assert (out - expected).abs().max() < 1e-14


# -- what is refused -------------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused_before_anything_changes():
    x, u = torch.ones(8), torch.ones(8)
    cases = [
        (lambda: ops.scale_(x, float("nan")), "factor must be finite, got nan"),
        (lambda: ops.scale_(x.int(), 1.0), "x must have dtype"),
        (lambda: ops.momentum_step_(x, u[:7], momentum=0.9), "u must have as many elements as grad"),
        (lambda: ops.momentum_step_(x, x, momentum=0.9), "must not share memory"),
        (lambda: ops.momentum_step_(x, u, momentum=1.5), r"momentum must be in \[0, 1\]"),
        (lambda: ops.momentum_step_(x, u.double(), momentum=0.9), "u must have dtype float32"),
        (
            lambda: ops.decay_step_(x, [0], [u], [u.clone()], rate=math.nan, momentum=0.9),
            "rate must be finite, got nan",
        ),
        (lambda: ops.decay_step_(x, [0], [u], [u, u], rate=0.1, momentum=0.9), "one entry per parameter, got 1, 1 and"),
        (lambda: ops.decay_step_(x, [1], [u], [u.clone()], rate=0.1, momentum=0.9), "lie inside update"),
        (lambda: ops.decay_step_(x, [0], [u[:7]], [u.clone()], rate=0.1, momentum=0.9), "buffer of its size"),
        (lambda: ops.decay_step_(x, [0], [u.double()], [u.clone()], rate=0.1, momentum=0.9), "buffer must have dtype"),
        (
            lambda: ops.decay_step_(x, [0], [u], [torch.ones(16)[::2]], rate=0.1, momentum=0.9),
            "dense in memory, got stride",
        ),
        (lambda: ops.decay_step_(x, [0], [u], [u.int()], rate=0.1, momentum=0.9), "a parameter must be floating point"),
        (lambda: ops.decay_step_(x, [0], [u], [u.double()], rate=0.1, momentum=0.9), "not wider than update"),
        (lambda: ops.weighted_sum_(x, [], []), "there must be rows, and one weight for each, got 0 rows"),
        (lambda: ops.weighted_sum_(x, [u], [1.0, 2.0]), "got 1 rows and 2 weights"),
        (lambda: ops.weighted_sum_(x, [u, u[:7]], [1.0, 2.0]), r"rows\[1\] must have as many elements as out"),
        (lambda: ops.weighted_sum_(x, [u, u.bfloat16()], [1.0, 2.0]), "rows must have one dtype, got torch.bfloat16"),
        (lambda: ops.weighted_sum_(x, [u, x], [1.0, 2.0]), "must not share memory"),
        (lambda: ops.weighted_sum_(x, [u.double()], [1.0]), r"rows\[0\] must have dtype float32, bfloat16, float16"),
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=message):
            call()
    assert torch.equal(x, torch.ones(8))
    assert torch.equal(u, torch.ones(8))


def test_the_kernels_check_what_memory_safety_needs():
    """torch.ops.distopt can be called without the checks of distopt.ops."""
    if not PATHS:
        pytest.skip("the native kernels are not built here")
    x, u = torch.ones(8), torch.ones(8)
    calls = [
        lambda: torch.ops.distopt.momentum_step_(x, u[:7], momentum=0.9),
        lambda: torch.ops.distopt.decay_step_(x, [1], [u], [u.clone()], rate=0.1, momentum=0.9),
        lambda: torch.ops.distopt.decay_step_(x, [-1], [u], [u.clone()], rate=0.1, momentum=0.9),
        lambda: torch.ops.distopt.decay_step_(x, [0], [u], [torch.ones(9)], rate=0.1, momentum=0.9),
        lambda: torch.ops.distopt.decay_step_(x, [0], [u], [torch.ones(16)[::2]], rate=0.1, momentum=0.9),
        lambda: torch.ops.distopt.decay_step_(x, [0, 0], [u], [u.clone()], rate=0.1, momentum=0.9),
        lambda: torch.ops.distopt.weighted_sum_(x, [], []),
        lambda: torch.ops.distopt.weighted_sum_(x, [u], [1.0, 2.0]),
        lambda: torch.ops.distopt.weighted_sum_(x, [u, u[:7]], [1.0, 2.0]),
        lambda: torch.ops.distopt.weighted_sum_(x, [u, u.bfloat16()], [1.0, 2.0]),
        lambda: torch.ops.distopt.weighted_sum_(x, [torch.ones(16)[::2]], [1.0]),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="distopt: "):
            call()


# -- of any size -----------------------------------------------------------------------------------------------------


def test_no_limit_where_no_index_is_made():
    """More entries than int32 counts: on the meta device, where they take no memory."""
    x, same = (torch.empty(2**31, device="meta") for _ in range(2))
    ops.momentum_step_(x, same, momentum=0.9)
    ops.decay_step_(x, [0], [same], [same], rate=0.1, momentum=0.9)
    ops.weighted_sum_(x, [same], [0.5])
    for operation in (lambda: ops.all_finite(x), lambda: ops.scale_(x, 0.5)):
        with pytest.raises(RuntimeError, match=r"item\(\)"):  # as far as a tensor without data can go
            operation()
    with pytest.raises(ConfigError, match=r"at most 2\^31-1 elements"):
        ops.topk_abs(x, 1)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_the_last_of_more_entries_than_int32_counts(path):
    use(path, 2)
    x = torch.zeros(2**31 + 3, dtype=torch.bfloat16)  # 4 GiB
    assert ops.all_finite(x)
    x[-1] = torch.nan
    assert not ops.all_finite(x)

"""The CUDA kernels give the bits of the reference, on every input."""

import pytest
import torch
from cuda_cases import NEEDS_CUDA_KERNELS
from op_cases import KINDS, count, same_bits, tensor

from distopt import ops
from distopt.errors import ConfigError, DecodeError
from distopt.ops import reference

pytestmark = NEEDS_CUDA_KERNELS

# Around a slot of 4, a tile of 4,096 and the 16,384 elements that one block finishes; then many tiles.
SIZES = (0, 1, 3, 4, 5, 1000, 4095, 4097, 16_383, 16_384, 16_385, 70_001, 1_000_003)
FRACTIONS = (0.0, 0.001, 0.02, 0.06, 0.5, 1.0)
GRADS = (torch.float32, torch.bfloat16, torch.float16)
STATES = (torch.float32, torch.bfloat16)


def on_gpu(kind, n, seed, dtype=torch.float32, shift=0):
    """`shift` elements into its memory, so that it begins where no wide load may."""
    memory = torch.empty(n + shift, dtype=dtype, device="cuda")
    memory[shift:] = tensor(kind, n, seed, dtype).cuda()
    return memory[shift:]


def assert_same(names, got, want, about=""):
    for name, a, b in zip(names, got, want, strict=True):
        assert same_bits(a.cpu(), b.cpu()), f"{name} differs from the reference {about}"


def check_topk(kind, n, k, dtype=torch.float32, seed=0, shift=0):
    x = on_gpu(kind, n, seed, dtype, shift)
    before = x.clone()
    assert_same(("values", "indices"), ops.topk_abs(x, k), reference.topk_abs(x, k), f"({kind}, {n}, {k})")
    assert same_bits(x, before)


def check_ef(kind, n, k, grad_dtype=torch.float32, state_dtype=torch.float32, seed=0, shift=0):
    grad, residual = on_gpu(kind, n, seed, grad_dtype, shift), on_gpu("normal", n, seed + 1, state_dtype)
    want = residual.clone()
    expected = (*reference.ef_sparsify_(grad, want, k), want)
    got = (*ops.ef_sparsify_(grad, residual, k), residual)
    assert_same(("values", "indices", "residual"), got, expected, f"({kind}, {n}, {k})")


def check_dgc(kind, n, k, grad_dtype=torch.float32, state_dtype=torch.float32, seed=0, shift=0, **options):
    grad = on_gpu(kind, n, seed, grad_dtype, shift)
    u, v = on_gpu("normal", n, seed + 1, state_dtype), on_gpu(kind, n, seed + 2, state_dtype)
    want_u, want_v = u.clone(), v.clone()
    expected = (*reference.dgc_sparsify_(grad, want_u, want_v, k, **options), want_u, want_v)
    got = (*ops.dgc_sparsify_(grad, u, v, k, **options), u, v)
    assert_same(("values", "indices", "u", "v"), got, expected, f"({kind}, {n}, {k})")


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_input(kind, n):
    for fraction in FRACTIONS:
        k = count(n, fraction)
        check_topk(kind, n, k)
        check_ef(kind, n, k)
        check_dgc(kind, n, k, momentum=0.9)


@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("grad_dtype", GRADS)
@pytest.mark.parametrize("n", [999, 70_001])
def test_every_dtype(n, grad_dtype, state_dtype):
    for kind in ("normal", "specials", "ties"):
        k = count(n, 0.01)
        check_topk(kind, n, k, grad_dtype)
        check_ef(kind, n, k, grad_dtype, state_dtype)
        for nesterov in (False, True):
            for masking in (False, True):
                check_dgc(kind, n, k, grad_dtype, state_dtype, momentum=0.1, nesterov=nesterov, masking=masking)


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_tensors_that_begin_anywhere(shift):
    for dtype in GRADS:
        check_topk("normal", 70_001, 100, dtype, shift=shift)
    check_dgc("normal", 70_001, 100, shift=shift, momentum=0.9)


def test_nan_of_any_payload_are_ties():
    words = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, 0x7F800000, 0x3F800000], dtype=torch.int32)
    x = words.view(torch.float32).cuda()
    assert ops.topk_abs(x, 2)[1].tolist() == [0, 1]
    assert ops.topk_abs(x, 5)[1].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("factor", [100.0, 1e-3])
def test_a_sample_that_misleads(factor):
    # Other values exactly where csrc/cuda/geometry.cuh draws: the bound is then far off and all elements are looked at.
    n, k = 1_000_003, 1_000
    size = min(16_384, max(4096, 16 * (n // k)))
    i = torch.arange(size)
    stretch = n // size
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    x[i * stretch + ((i * 2654435761 % 2**32) * stretch >> 32)] *= factor
    x = x.cuda()
    assert_same(("values", "indices"), ops.topk_abs(x, k), reference.topk_abs(x, k))


def table(rows):
    return torch.tensor(rows, dtype=torch.int64, device="cuda").view(-1, 3)


@pytest.mark.parametrize("kind", ["normal", "ties", "specials", "equal"])
@pytest.mark.parametrize("state_dtype", STATES)
def test_segments(kind, state_dtype):
    generator = torch.Generator().manual_seed(7)
    sizes = [0, 1, 3, 16_384, 16_385, 70_001, 5, 300_007, 4096, 1000, 20_000]
    rows, end = [], 0
    for n in sizes:
        start = end + int(torch.randint(0, 4, (), generator=generator))
        rows.append((start, n, count(n, float(torch.rand((), generator=generator) ** 4))))
        end = start + n
    numel, total = sum(sizes), sum(k for _, _, k in rows)
    grad = on_gpu(kind, end + 5, 0)
    u, v = on_gpu("normal", numel, 1, state_dtype), on_gpu(kind, numel, 2, state_dtype)
    want_u, want_v, want_r = u.clone(), v.clone(), v.clone()
    r = v.clone()
    segments = table(rows)
    expected = reference.dgc_sparsify_segments_(grad, want_u, want_v, segments, total, momentum=0.9)
    got = ops.dgc_sparsify_segments_(grad, u, v, segments, total, momentum=0.9)
    assert_same(("values", "indices", "u", "v"), (*got, u, v), (*expected, want_u, want_v))
    expected = reference.ef_sparsify_segments_(grad, want_r, segments, total)
    got = ops.ef_sparsify_segments_(grad, r, segments, total)
    assert_same(("values", "indices", "residual"), (*got, r), (*expected, want_r))
    ops.raise_device_errors("cuda")


def test_a_thousand_small_segments():
    n, num = 1000, 1000
    grad, u, v = (on_gpu("normal", n * num, seed) for seed in range(3))
    want_u, want_v = u.clone(), v.clone()
    segments = table([(n * s, n, 1 + s % 3) for s in range(num)])
    total = int(segments[:, 2].sum())
    expected = reference.dgc_sparsify_segments_(grad, want_u, want_v, segments, total, momentum=0.9)
    got = ops.dgc_sparsify_segments_(grad, u, v, segments, total, momentum=0.9)
    assert_same(("values", "indices", "u", "v"), (*got, u, v), (*expected, want_u, want_v))


def test_no_segments():
    empty = torch.empty(0, device="cuda")
    values, indices = ops.ef_sparsify_segments_(torch.ones(5, device="cuda"), empty, table([]), 0)
    assert values.numel() == indices.numel() == 0


def test_a_table_that_contradicts_itself_is_told_when_asked():
    ops.raise_device_errors("cuda")
    grad, residual = torch.ones(200_000, device="cuda"), torch.ones(200_000, device="cuda")
    ops.ef_sparsify_segments_(grad, residual, table([(0, 100_000, 5), (99_999, 100_000, 5)]), 10)
    with pytest.raises(ConfigError, match=r"segments must be ascending, apart, inside grad .* got 1 tables"):
        ops.raise_device_errors("cuda")
    ops.raise_device_errors("cuda")


@pytest.mark.parametrize("owners", [1, 2, 7, 64, 4096])
@pytest.mark.parametrize("kind", ["normal", "ties", "specials", "equal", "spikes", "ascending"])
def test_interleaved(kind, owners):
    for n in (0, 1, 4097, 70_001, 1_000_003):
        for fraction in (0.0, 0.001, 0.2, 1.0):
            k = count(n // owners, fraction)
            x = on_gpu(kind, n, 0)
            if n * owners > 1e8:  # the reference sorts every class on its own
                continue
            got, want = ops.topk_abs_interleaved(x, k, owners), reference.topk_abs_interleaved(x, k, owners)
            assert_same(("values", "indices"), got, want, f"({kind}, {n}, {k}, {owners})")


@pytest.mark.parametrize("dtype", GRADS)
def test_interleaved_dtypes(dtype):
    x = on_gpu("normal", 300_001, 0, dtype, shift=1)
    got, want = ops.topk_abs_interleaved(x, 40, 5), reference.topk_abs_interleaved(x, 40, 5)
    assert_same(("values", "indices"), got, want)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value_dtype", GRADS)
def test_scatter_add(out_dtype, value_dtype):
    n = 100_000
    generator = torch.Generator().manual_seed(0)
    indices = torch.randperm(n, generator=generator)[: n // 3].to(torch.int32).cuda()
    values = (torch.randn(indices.numel(), generator=generator) * 1e-38).to(value_dtype).cuda()  # denormals among them
    out = (torch.randn(n, generator=generator) * 1e-38).to(out_dtype).cuda()
    want = out.cpu()
    reference.scatter_add_(want, indices.cpu(), values.cpu())
    ops.scatter_add_(out, indices, values)
    assert same_bits(out.cpu(), want)


def test_indices_out_of_range_write_nothing_and_are_told_when_asked():
    ops.raise_device_errors("cuda")
    out = torch.zeros(10, device="cuda")
    indices = torch.tensor([0, -1, 10, 3, 2**31 - 1, -(2**31)], dtype=torch.int32, device="cuda")
    ops.scatter_add_(out, indices, torch.ones(6, device="cuda"))
    assert out.tolist() == [1, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    with pytest.raises(DecodeError, match=r"indices must be in \[0, numel\), got 4 that are not"):
        ops.raise_device_errors("cuda")
    ops.raise_device_errors("cuda")


@pytest.mark.parametrize("dtype", [*GRADS, torch.float64])
def test_all_finite(dtype):
    for n in (0, 1, 2047, 2049, 1_000_003):
        x = torch.randn(n, device="cuda").to(dtype)
        assert ops.all_finite(x)
        for bad in (float("nan"), float("inf"), -float("inf")):
            for at in {0, n // 2, n - 1} if n else ():
                y = x.clone()
                y[at] = bad
                assert not ops.all_finite(y)


def test_float64_runs_on_the_reference():
    grad, u, v = (torch.randn(1000, dtype=torch.float64, device="cuda") for _ in range(3))
    want_u, want_v = u.clone(), v.clone()
    got = ops.dgc_sparsify_(grad, u, v, 10, momentum=0.9)
    want = reference.dgc_sparsify_(grad, want_u, want_v, 10, momentum=0.9)
    assert_same(("values", "indices", "u", "v"), (*got, u, v), (*want, want_u, want_v))


def enough_memory(nbytes):
    free, _ = torch.cuda.mem_get_info()
    if free < nbytes:
        pytest.skip(f"needs {nbytes / 2**30:.0f} GiB of free device memory, {free / 2**30:.0f} are there")


def test_longer_than_an_index_is_refused():
    enough_memory(6 * 2**30)
    x = torch.empty(2**31, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(ConfigError, match=r"at most 2\^31-1 elements"):
        ops.topk_abs(x, 1)
    with pytest.raises(RuntimeError, match=r"fewer than 2\^31 elements"):
        torch.ops.distopt.topk_abs(x, 1)


def test_the_longest():
    enough_memory(12 * 2**30)
    n = 2**31 - 1
    x = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    at = [7, 2**20 + 3, 2**30 + 1, n - 4097, n - 1]
    x[at] = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0], dtype=torch.bfloat16, device="cuda")
    values, indices = ops.topk_abs(x, 5)  # the zeros tie below them: all elements are looked at
    assert indices.tolist() == at
    assert values.tolist() == [1.0, -2.0, 3.0, -4.0, 5.0]
    values, indices = ops.topk_abs_interleaved(x, 1, 2)
    largest = [max((i for i in at if i % 2 == owner), key=lambda i: abs(float(x[i]))) for owner in (0, 1)]
    assert indices.view(-1).tolist() == [i // 2 for i in largest]
    assert values.view(-1).tolist() == [float(x[i]) for i in largest]


@pytest.mark.parametrize("numel", [25_557_032, 102_760_448])
def test_full_size(numel):
    enough_memory(40 * numel)
    k = -(-numel // 1000)
    check_dgc("normal", numel, k, momentum=0.9)

"""Results are the same bits for any number of torch's threads, wherever the call comes from."""

import pytest
import torch
from op_cases import PATHS, same_bits, tensor

from distopt import ops
from distopt.ops import native

pytestmark = pytest.mark.skipif(not PATHS, reason="the native kernels are not built")


def steps(kind, n, k, num_threads, steps=2):
    torch.set_num_threads(num_threads)
    u, v = torch.zeros(n), torch.zeros(n)
    found = []
    for seed in range(steps):
        found += ops.dgc_sparsify_(tensor(kind, n, seed), u, v, k, momentum=0.9)
    return [*found, u, v]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "specials", "ascending", "spikes"])
def test_the_same_bits(kind, path):
    native.use_path(path)
    n = 300_001
    for k in (0, 1, 300, 9_000, 75_000, n):
        alone = steps(kind, n, k, 1)
        for num_threads in (2, 3, 5):
            assert all(same_bits(a, b) for a, b in zip(steps(kind, n, k, num_threads), alone, strict=True))


@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_segments_small_and_large(kind):
    sizes = [10] * 300 + [300_000] + [2_000] * 200 + [280_000, 0, 1]
    rows, start = [], 0
    for numel in sizes:
        rows.append((start, numel, -(-numel // 100)))
        start += numel
    segments, count = torch.tensor(rows), sum(k for _, _, k in rows)
    grad = tensor(kind, start, 0)
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        u, v = torch.zeros(start), tensor("normal", start, 1)
        results.append([*ops.dgc_sparsify_segments_(grad, u, v, segments, count, momentum=0.9), u, v])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(other, results[0], strict=True))


def test_from_threads_of_autograd():
    # Hooks of DDP run in the backward pass: on the caller's thread, or on the threads of the autograd engine.
    n = 200_000
    found = []

    class Selects(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            found.append(ops.topk_abs(grad, 200))
            return grad

    weight = torch.randn(n)
    x = torch.ones(n, requires_grad=True)
    torch.set_num_threads(2)
    for _ in range(3):
        (Selects.apply(x) * weight).sum().backward()
    want = ops.topk_abs(weight, 200)
    assert all(same_bits(a, b) for got in found for a, b in zip(got, want, strict=True))

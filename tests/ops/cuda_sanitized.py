"""Every CUDA kernel on small inputs of every kind, for compute-sanitizer (see .ci/gpu): not a test of its own.

Small, because a sanitizer slows a kernel down by orders of magnitude; results are compared with the reference all the
same.
"""

import torch
from op_cases import KINDS, count, same_bits, tensor

from distopt import ops
from distopt.ops import reference

SIZES = (0, 1, 1000, 16_384, 16_387, 40_001)
FRACTIONS = (0.0, 0.002, 0.2)


def same(got, want):
    if not all(same_bits(a.cpu(), b.cpu()) for a, b in zip(got, want, strict=True)):
        raise SystemExit("a kernel differs from the reference: the gpu tests say which")


def check(kind: str, n: int, k: int, dtype: torch.dtype) -> None:
    grad = tensor(kind, n, 0, dtype).cuda()
    u, v = (tensor("normal", n, seed).cuda() for seed in (1, 2))
    want_u, want_v = u.clone(), v.clone()
    got = ops.dgc_sparsify_(grad, u, v, k, momentum=0.9)
    same((*got, u, v), (*reference.dgc_sparsify_(grad, want_u, want_v, k, momentum=0.9), want_u, want_v))
    same(ops.topk_abs(grad, k), reference.topk_abs(grad, k))
    same(ops.topk_abs_interleaved(grad, k // 3, 3), reference.topk_abs_interleaved(grad, k // 3, 3))
    half = n // 2
    segments = torch.tensor([[0, half, min(k, half)], [half, n - half, k // 2]], device="cuda")
    total = min(k, half) + k // 2
    got = ops.ef_sparsify_segments_(grad, v, segments, total)
    same((*got, v), (*reference.ef_sparsify_segments_(grad, want_v, segments, total), want_v))
    out = torch.zeros(n, device="cuda")
    ops.scatter_add_(out, got[1], got[0])
    ops.all_finite(grad)


if __name__ == "__main__":
    for kind in sorted(KINDS):
        for n in SIZES:
            for fraction in FRACTIONS:
                check(kind, n, count(n, fraction), torch.float32)
    check("normal", 40_001, 100, torch.bfloat16)
    ops.raise_device_errors("cuda")
    print("all operations ran")

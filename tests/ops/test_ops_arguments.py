"""A bad argument is a ConfigError with value, rule and remedy, and nothing was written."""

import pytest
import torch

from distopt import ops
from distopt.errors import ConfigError

N = 8


def x(n=N, dtype=torch.float32):
    return torch.ones(n, dtype=dtype)


def dgc(grad=None, u=None, v=None, k=2, momentum=0.9):
    grad, u, v = (x() if t is None else t for t in (grad, u, v))
    return ops.dgc_sparsify_(grad, u, v, k, momentum=momentum)


T = x(12)
I1 = torch.zeros(1, dtype=torch.int32)
BF16, F16, F64, I64 = torch.bfloat16, torch.float16, torch.float64, torch.int64

# name: call, rule, value, remedy
CASES = {
    "list": (lambda: ops.topk_abs([1.0], 1), "x must be a tensor", "list", "as_tensor"),
    "integers": (lambda: ops.topk_abs(x(dtype=I64), 1), "x must have dtype float32, bfloat16", "int64", r"\.to\("),
    "2-D": (lambda: ops.topk_abs(x().view(2, 4), 1), "x must be 1-D", r"\(2, 4\)", "view"),
    "0-D": (lambda: ops.all_finite(torch.tensor(1.0)), "x must be 1-D", r"\(\)", "view"),
    "strided": (lambda: ops.topk_abs(x()[::2], 1), "x must be contiguous", "stride 2", "contiguous"),
    "sparse": (lambda: ops.topk_abs(x().to_sparse(), 1), "x must be dense", "sparse", "to_dense"),
    "k negative": (lambda: ops.topk_abs(x(), -1), r"k must be in \[0, 8\]", "got -1", "min"),
    "k too large": (lambda: ops.topk_abs(x(), 9), r"k must be in \[0, 8\]", "got 9", "min"),
    "k float": (lambda: ops.topk_abs(x(), 1.5), "k must be an int", "got 1.5", "int"),
    "ef sizes": (lambda: ops.ef_sparsify_(x(), x(7), 1), "residual must have as many elements as grad", "7", "pass"),
    "ef float16": (lambda: ops.ef_sparsify_(x(), x(dtype=F16), 1), "residual must have dtype", "float16", r"\.to"),
    "ef aliased": (lambda: ops.ef_sparsify_(T, T, 1), "residual and grad must not share", "overlapping", "clone"),
    "dgc sizes": (lambda: dgc(v=x(9)), "v must have as many elements as grad", "got 9", "pass"),
    "dgc states differ": (lambda: dgc(v=x(dtype=BF16)), "v must have dtype float32", "bfloat16", r"\.to"),
    "dgc device": (lambda: dgc(u=x().to("meta")), "u must be on the device of grad", "got meta", r"\.to"),
    "dgc overlapping": (lambda: dgc(u=T[:8], v=T[4:]), "v and u must not share memory", "overlapping", "clone"),
    "dgc grad is u": (lambda: dgc(T[:8], u=T[1:9]), "u and grad must not share memory", "overlapping", "clone"),
    "dgc grad is v": (lambda: dgc(T[1:9], v=T[:8]), "v and grad must not share memory", "overlapping", "clone"),
    "dgc strided": (lambda: dgc(u=x(16)[::2]), "u must be contiguous", "stride 2", "contiguous"),
    "momentum": (lambda: dgc(momentum=1.5), r"momentum must be in \[0, 1\]", "got 1.5", "0.9"),
    "momentum NaN": (lambda: dgc(momentum=float("nan")), r"momentum must be in \[0, 1\]", "got nan", "0.9"),
    "indices int64": (
        lambda: ops.scatter_add_(x(), I1.long(), x(1)),
        "indices must have dtype int32",
        "int64",
        r"\.to",
    ),
    "scatter sizes": (lambda: ops.scatter_add_(x(), I1, x(2)), "values must have as many elements", "got 2", "pass"),
    "bfloat16 sum": (lambda: ops.scatter_add_(x(dtype=BF16), I1, x(1)), "out must have dtype", "bfloat16", r"\.to"),
    "wide values": (lambda: ops.scatter_add_(x(), I1, x(1, F64)), "values must have dtype", "float64", r"\.to"),
    "values are out": (
        lambda: ops.scatter_add_(T, torch.arange(12).int(), T),
        "values and out must not",
        "over",
        "clone",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_message(case):
    call, rule, value, remedy = CASES[case]
    with pytest.raises(ConfigError, match=rf"(?s){rule}.*{value}.*{remedy}"):
        call()


def test_too_long():
    # A meta tensor has a size and no memory.
    with pytest.raises(ConfigError, match=r"at most 2\^31-1 elements.*got 2147483648; split"):
        ops.topk_abs(torch.empty(2**31, device="meta"), 1)


def test_neighbours_in_one_buffer_are_apart():
    buffer = torch.ones(3 * N)
    dgc(buffer[:N], buffer[N : 2 * N], buffer[2 * N :])


def test_refused_before_anything_is_written():
    u, v = x(), x()
    with pytest.raises(ConfigError):
        dgc(torch.ones(N), u, v, k=N + 1)
    assert torch.equal(u, x())
    assert torch.equal(v, x())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op, t: op.topk_abs(t, 99), "k must be in"),
        (lambda op, t: op.topk_abs(t.view(2, 4), 1), "1-D"),
        (lambda op, t: op.ef_sparsify_(t, x(9), 1), "differ in size"),
        (lambda op, t: op.scatter_add_(t, torch.tensor([99]).int(), x(1)), r"not in \[0, 8\)"),
    ],
)
def test_the_operators_themselves_stay_inside_memory(call, message):
    if ops.backend() == "reference":
        pytest.skip("the native kernels are not built")
    with pytest.raises(RuntimeError, match=message):
        call(torch.ops.distopt, x())

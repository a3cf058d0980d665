"""The CUDA kernels wait for nothing, follow the current stream, and can be captured in a graph."""

import pytest
import torch
from cuda_cases import NEEDS_CUDA_KERNELS
from op_cases import same_bits

from distopt import ops
from distopt.ops import reference

pytestmark = NEEDS_CUDA_KERNELS

N, K = 300_007, 301


def states(seed=0, n=N):
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(n, generator=generator, device="cuda") for _ in range(3)]


def all_operations(grad, u, v, segments, out):
    """Everything in the hot path, in a row; the results."""
    x = grad.clone()
    first = ops.dgc_sparsify_segments_(grad, u, v, segments, 2 * K, momentum=0.9)
    second = ops.dgc_sparsify_(grad, u, v, K, momentum=0.9, nesterov=True)
    third = ops.ef_sparsify_(grad, v, K)
    fourth = ops.ef_sparsify_segments_(grad, v, segments, 2 * K)
    ops.scatter_add_(out, first[1], first[0])
    return (*first, *second, *third, *fourth, *ops.topk_abs(x, K), *ops.topk_abs_interleaved(x, K // 8, 8))


def expected(grad, u, v, segments, out):
    x = grad.clone()
    first = reference.dgc_sparsify_segments_(grad, u, v, segments, 2 * K, momentum=0.9)
    second = reference.dgc_sparsify_(grad, u, v, K, momentum=0.9, nesterov=True)
    third = reference.ef_sparsify_(grad, v, K)
    fourth = reference.ef_sparsify_segments_(grad, v, segments, 2 * K)
    reference.scatter_add_(out, first[1], first[0])
    return (*first, *second, *third, *fourth, *reference.topk_abs(x, K), *reference.topk_abs_interleaved(x, K // 8, 8))


def inputs(seed=0):
    segments = torch.tensor([[0, 1000, K], [1000, N - 1000, K]], device="cuda")
    return (*states(seed), segments, torch.zeros(N, device="cuda"))


def assert_same(got, want):
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


def test_the_hot_path_waits_for_nothing():
    arguments = inputs()
    same = [a.clone() for a in arguments]
    all_operations(*[a.clone() for a in arguments])  # loads the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = all_operations(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same((*got, *arguments), (*expected(*same), *same))


def test_the_host_runs_ahead():
    # A launch that waited would not return before the device is done with what is queued in front of it.
    arguments = inputs()
    all_operations(*[a.clone() for a in arguments])
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    all_operations(*arguments)
    assert not torch.cuda.current_stream().query(), "the host has waited for the device"
    torch.cuda.synchronize()


def test_the_current_stream_is_respected():
    want = expected(*inputs(1))
    arguments = inputs(0)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # the inputs come late, on this stream
        for a, b in zip(arguments, inputs(1), strict=True):
            a.copy_(b)
        got = all_operations(*arguments)
    stream.synchronize()
    assert_same(got, want)


def test_streams_do_not_share_memory():
    # Temporary memory comes from the caching allocator: per stream.
    streams = [torch.cuda.Stream() for _ in range(4)]
    arguments = [inputs(seed) for seed in range(4)]
    want = [expected(*inputs(seed)) for seed in range(4)]
    torch.cuda.synchronize()
    got = []
    for _ in range(3):
        got = []
        for seed, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                for a, b in zip(arguments[seed], inputs(seed), strict=True):
                    a.copy_(b)
                got.append(all_operations(*arguments[seed]))
    torch.cuda.synchronize()
    for a, b in zip(got, want, strict=True):
        assert_same(a, b)


def test_a_graph_replays_steps():
    arguments = inputs()
    same = [a.clone() for a in arguments]
    warm = [a.clone() for a in arguments]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        all_operations(*warm)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = all_operations(*arguments)
    for step in range(3):
        gradient = states(10 + step)[0]
        arguments[0].copy_(gradient)
        same[0].copy_(gradient)
        graph.replay()
        want = expected(*same)
        assert_same((*got, *arguments), (*want, *same))
    ops.raise_device_errors("cuda")


def test_results_do_not_depend_on_the_order_of_blocks():
    # Atomics hand out room for candidates in whatever order the blocks come.
    want = all_operations(*inputs())
    for _ in range(20):
        assert_same(all_operations(*inputs()), want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_tensors_device_counts_not_the_current_one():
    torch.cuda.set_device(0)
    arguments = [a.to("cuda:1") for a in inputs()]
    same = [a.clone() for a in arguments]
    assert_same(all_operations(*arguments), expected(*same))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("name", ["topk_abs", "ef_sparsify_", "dgc_sparsify_", "scatter_add_", "all_finite"])
def test_opcheck(name):
    g, u, v = states(n=50)
    arguments = {
        "topk_abs": ((g, 5), {}),
        "ef_sparsify_": ((g, v, 5), {}),
        "dgc_sparsify_": ((g, u, v, 5), {"momentum": 0.9}),
        "scatter_add_": ((g, torch.arange(10, dtype=torch.int32, device="cuda"), torch.ones(10, device="cuda")), {}),
        "all_finite": ((g,), {}),
    }
    args, kwargs = arguments[name]
    torch.library.opcheck(getattr(torch.ops.distopt, name).default, args, kwargs)

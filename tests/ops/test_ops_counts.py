"""What is rare stays rare, by the kernels' own counts: second collections, cut buffers, and growing workspaces."""

from dataclasses import astuple
from threading import Thread

import pytest
import torch
from gradients import recorded
from op_cases import PATHS
from torch.distributions import Laplace, StudentT

from distopt import ops
from distopt.ops import reference

pytestmark = pytest.mark.skipif(not PATHS, reason="the native kernels are not built")

SAMPLERS = {
    "normal": lambda n: torch.randn(n),
    "laplace": lambda n: Laplace(0.0, 1.0).sample((n,)),
    "student-t(3)": lambda n: StudentT(3.0).sample((n,)),
}


class Counted:
    """How the counts changed inside a `with` block."""

    def __enter__(self):
        self.before = ops.selection_counts()
        return self

    def __exit__(self, *_):
        change = (b - a for a, b in zip(astuple(self.before), astuple(ops.selection_counts()), strict=True))
        self.selections, self.second_collections, self.full_buffers, self.workspace_growths = change


@pytest.mark.parametrize("kind", SAMPLERS)
def test_continuous_inputs_are_read_once(kind):
    torch.manual_seed(0)
    x = SAMPLERS[kind](5_000_000)
    with Counted() as counted:
        for i in range(300):  # 100,000 elements elsewhere in x each time; by a sample, in a bracket, by owner
            part = x[15_000 * i : 15_000 * i + 100_000]
            ops.topk_abs(part, 2_000)
            ops.topk_abs(part, 25_000)
            ops.topk_abs_interleaved(part, 12, 8)
        for i in range(5):  # long enough for a sample at the usual density
            ops.topk_abs(x[i:], 5_000)
    assert counted.selections == 905
    assert counted.second_collections < 0.01 * counted.selections


def test_real_gradients_are_read_once():
    steps, sizes = recorded()
    u, v = torch.zeros(sum(sizes)), torch.zeros(sum(sizes))
    with Counted() as counted:
        for gradients in steps:
            flat = torch.cat(gradients)
            for k in (flat.numel() // 1000, flat.numel() // 100, flat.numel() // 4):
                ops.dgc_sparsify_(flat, u, v, k, momentum=0.9)
            ops.topk_abs_interleaved(flat, 12, 4)
    assert counted.selections == 80
    assert counted.second_collections == 0


def test_small_tensors_need_no_sample_and_ties_no_second_collection():
    inputs = [torch.ones(200_000), torch.zeros(200_000), torch.randint(-2, 3, (200_000,)).float()]
    with Counted() as counted:
        for x in (*inputs, torch.randn(4_000)):
            for k in (1, x.numel() // 1000, x.numel() // 100, x.numel() // 30):
                ops.topk_abs(x, k)
                ops.topk_abs_interleaved(x, k // 4, 4)
    assert counted.second_collections == 0
    assert counted.full_buffers > 0  # the way of the ties: a full buffer is cut or emptied


@pytest.mark.parametrize(("size", "k"), [(781, 2_000), (4_096, 25_000)])
def test_a_misleading_sample_is_counted(size, k):
    # Large values exactly where csrc/cpu/sample.cpp looks: the bound is then too high for the others.
    n = 100_000
    stretch = n // size
    i = torch.arange(size)
    x = torch.randn(n)
    x[i * stretch + ((i * 2654435761 % 2**32) * stretch >> 32)] *= 1e3
    with Counted() as counted:
        values, indices = ops.topk_abs(x, k)
    assert counted.second_collections == 1
    want = reference.topk_abs(x, k)
    assert torch.equal(values, want[0])
    assert torch.equal(indices, want[1])


def test_an_owner_with_next_to_nothing_is_counted():
    x = torch.randn(80_000)
    x[5::8] *= 1e-6
    with Counted() as counted:
        ops.topk_abs_interleaved(x, 100, 8)
    assert counted.second_collections == 1


def test_no_workspace_grows_in_steady_state():
    sizes = (1_000, 30_000, 300_000, 5_000_000)
    tensors = [[torch.randn(n), torch.zeros(n), torch.zeros(n)] for n in sizes]
    segments = torch.tensor([(i * 1_000, 1_000, 1) for i in range(300)])

    def step():
        for (g, u, v), n in zip(tensors, sizes, strict=True):
            for k in (n // 1000, n // 50, n // 4):
                ops.dgc_sparsify_(g, u, v, k, momentum=0.9)
            ops.topk_abs_interleaved(v, n // 100, 8)
        g, u, v = tensors[2]
        ops.dgc_sparsify_segments_(g, u, v, segments, 300, momentum=0.9)

    step()
    with Counted() as counted:
        for _ in range(10):
            step()
    assert counted.selections == 10 * (4 * 4 + 300)
    assert counted.workspace_growths == 0


def test_the_counts_are_those_of_all_threads():
    x = torch.randn(3_000)

    def work():
        for _ in range(200):
            ops.topk_abs(x, 5)

    with Counted() as counted:
        threads = [Thread(target=work) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert counted.selections == 800
    assert counted.workspace_growths > 0  # each new thread has a workspace of its own

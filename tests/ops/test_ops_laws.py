"""The equations of DGC hold over many steps, whatever does the work. Small integers make them exact."""

from threading import Thread

import pytest
import torch
from op_cases import PATHS

from distopt import ops
from distopt.ops import native, reference

STEPS, N = 20, 5000


class Reference:
    ef_sparsify_ = staticmethod(reference.ef_sparsify_)
    dgc_sparsify_ = staticmethod(reference.dgc_sparsify_)


@pytest.fixture(params=["reference", *PATHS])
def impl(request):
    if request.param == "reference":
        yield Reference
        return
    before = ops.backend()
    native.use_path(request.param)
    yield ops
    native.use_path(before)


def gradients(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(-8, 9, (N,), generator=generator).to(dtype) for _ in range(STEPS)]


def test_error_feedback_loses_nothing(impl):
    residual, sent = torch.zeros(N), torch.zeros(N)
    for g in gradients():
        ops.scatter_add_(sent, *reversed(impl.ef_sparsify_(g, residual, 50)))
    assert torch.equal(sent + residual, sum(gradients()))
    assert sent.count_nonzero() > 50


@pytest.mark.parametrize("nesterov", [False, True])
def test_without_momentum_dgc_loses_nothing(impl, nesterov):
    u, v, sent = torch.zeros(N), torch.zeros(N), torch.zeros(N)
    for g in gradients():
        values, indices = impl.dgc_sparsify_(g, u, v, 50, momentum=0.0, nesterov=nesterov, masking=False)
        ops.scatter_add_(sent, indices, values)
    assert torch.equal(sent + v, sum(gradients()))


def test_velocity_is_what_momentum_made_less_what_was_sent(impl):
    u, v, made, sent = torch.zeros(N), torch.zeros(N), torch.zeros(N), torch.zeros(N)
    for g in gradients():
        values, indices = impl.dgc_sparsify_(g, u, v, 50, momentum=1.0, masking=False)
        made += u
        ops.scatter_add_(sent, indices, values)
    assert torch.equal(v, made - sent)


def test_masking_clears_both_states_exactly_where_sent(impl):
    g, u, v = torch.randn(N), torch.randn(N), torch.randn(N)
    _, indices = impl.dgc_sparsify_(g, u, v, 500, momentum=0.9, masking=True)
    sent = torch.zeros(N, dtype=torch.bool)
    sent[indices.long()] = True
    assert torch.equal(u == 0, sent)
    assert torch.equal(v == 0, sent)


def test_density_one_is_momentum_sgd(impl):
    p, q, u, v = (torch.zeros(N) for _ in range(4))
    q.requires_grad_()
    sgd = torch.optim.SGD([q], lr=0.5, momentum=0.5)
    for g in gradients():
        values, _ = impl.dgc_sparsify_(g, u, v, N, momentum=0.5, masking=False)
        p -= 0.5 * values
        q.grad = g
        sgd.step()
    assert torch.equal(p, q)


def test_a_16_bit_residual_sends_what_it_holds(impl):
    residual = torch.zeros(N, dtype=torch.bfloat16)
    g = torch.randn(N)
    values, indices = impl.ef_sparsify_(g, residual, 100)
    assert values.dtype == torch.float32
    assert torch.equal(values, g.bfloat16().float()[indices.long()])


def test_threads_do_not_share_a_workspace():
    # gloo runs hooks' callbacks on threads of its own.
    inputs = [torch.randn(50_000, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    results = {}

    def work(i):
        results[i] = [ops.topk_abs(inputs[i], 100 + j % 7) for j in range(30)]

    threads = [Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, x in enumerate(inputs):
        for j, (values, indices) in enumerate(results[i]):
            want = reference.topk_abs(x, 100 + j % 7) if j < 7 else results[i][j - 7]
            assert torch.equal(values, want[0])
            assert torch.equal(indices, want[1])

"""A host that feeds its gradients itself: the same updates as DDP's, also into master weights that stand for others."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt.ddp import FeedHost
from distopt.errors import CompatibilityError, ConfigError

STEPS = 6


def model_and_gradients(step, dtype=torch.float32):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 4)).to(dtype)
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return model, [torch.randn(p.shape, generator=generator).to(dtype) for p in model.parameters()]


def fed(algorithm, cap_mb=25.0, bf16_masters=False):
    """Trains by hand-fed gradients; parameters of every step, the optimizer's settings and state at the end."""
    dtype = torch.bfloat16 if bf16_masters else torch.float32
    model, _ = model_and_gradients(0, dtype)
    parameters = dict(model.named_parameters())
    own = [p.detach().float().requires_grad_() for p in parameters.values()] if bf16_masters else [*parameters.values()]
    optimizer = torch.optim.SGD(own, lr=0.1, momentum=0.9)
    stands_for = {id(m): [p] for m, p in zip(own, parameters.values(), strict=True)} if bf16_masters else {}
    host = FeedHost(parameters, dist.group.WORLD, stands_for=stands_for, bucket_cap_mb=cap_mb)
    trace = []
    with algorithm.attach_to(host, optimizer) as attachment:
        taken = [group["momentum"] for group in optimizer.param_groups]
        for step in range(STEPS):
            gradients = model_and_gradients(step, dtype)[1]
            host.exchange([*parameters.values()], gradients)
            for p, g in zip(own, gradients, strict=True):
                p.grad = g.to(p.dtype)
            optimizer.step()
            trace.append(torch.cat([p.detach().float().flatten() for p in own]).numpy())
        stats = attachment.stats()
    buffers = [optimizer.state[p].get("momentum_buffer") for p in own]
    return trace, stats, taken, optimizer.param_groups[0]["momentum"], [b is not None and str(b.dtype) for b in buffers]


def under_ddp(algorithm):
    model, _ = model_and_gradients(0)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    trace = []
    with algorithm.attach(ddp, optimizer):
        for step in range(STEPS):
            optimizer.zero_grad()
            gradients = model_and_gradients(step)[1]
            ddp(torch.zeros(1, 12))  # DDP wants a forward pass before its backward pass
            loss = sum((p * g).sum() for p, g in zip(model.parameters(), gradients, strict=True))
            loss.backward()
            optimizer.step()
            trace.append(torch.cat([p.detach().flatten() for p in model.parameters()]).numpy())
    return trace


@pytest.mark.parametrize("cap_mb", [25.0, 1e-6])  # one bucket, and one for each parameter
def test_a_fed_host_trains_as_ddp_to_the_bit(ranks, cap_mb):
    algorithm = distopt.DGC(density=0.1, exchange="allgather")
    expected = ranks(2)(under_ddp, algorithm)
    got = ranks(2)(fed, algorithm, cap_mb)
    for rank in range(2):
        assert all((a == b).all() for a, b in zip(expected[rank], got[rank][0], strict=True))
    stats = got[0][1]
    assert stats["steps"] == STEPS
    assert stats["buckets_sparse"] + stats["buckets_dense"] == STEPS * (1 if cap_mb > 1 else 4)


def test_master_weights_lend_their_momentum_and_get_it_back(ranks):
    outcomes = ranks(2)(fed, distopt.DGC(density=0.1, exchange="allgather"), bf16_masters=True)
    for trace, stats, taken, given_back, buffers in outcomes:
        assert (trace[-1] == outcomes[0][0][-1]).all()
        assert (trace[-1] != trace[0]).any()
        assert taken == [0.0]
        assert given_back == 0.9
        assert buffers == ["torch.float32"] * 4
        assert "momentum 0.9" in stats["taken_over"]


def refusals():
    model, _ = model_and_gradients(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    host = FeedHost(dict(model.named_parameters()), dist.group.WORLD)
    attachment = distopt.TopK(density=0.5).attach_to(host, optimizer)
    with pytest.raises(CompatibilityError, match="one attachment at a time"):
        distopt.TopK(density=0.5).attach_to(host, optimizer)
    attachment.detach()
    distopt.TopK(density=0.5).attach_to(host, optimizer).detach()
    with pytest.raises(CompatibilityError, match="got none"):
        FeedHost({}, dist.group.WORLD)
    with pytest.raises(CompatibilityError, match="floating point"):
        FeedHost({"a": torch.zeros(3, dtype=torch.int64)}, dist.group.WORLD)
    with pytest.raises(ConfigError, match="bucket_cap_mb"):
        FeedHost(dict(model.named_parameters()), dist.group.WORLD, bucket_cap_mb=0)
    gradients = [torch.full_like(p, dist.get_rank() + 1.0) for p in model.parameters()]
    host.exchange([*model.parameters()], gradients)
    return all(bool((g == 1.5).all()) for g in gradients)


def test_a_host_refuses_and_averages_while_nothing_is_attached(ranks):
    assert ranks(2)(refusals) == [True, True]

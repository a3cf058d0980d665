"""The hook with NCCL on CUDA tensors gives the trajectory of gloo on the CPU. `on_train` runs on every rank."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training import LEARNING_RATE, SHAPES, Chosen, chosen_gradients

import distopt

NUM_DEVICES = torch.cuda.device_count() if dist.is_nccl_available() else 0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    pytest.mark.skipif(torch.cuda.is_available() and not dist.is_nccl_available(), reason="this torch has no NCCL"),
]

ALGORITHMS = {
    "dgc": distopt.DGC(density=0.05, exchange="allgather"),
    "dgc fp16 block16": distopt.DGC(density=0.05, exchange="allgather", values="fp16", indices="block16"),
    "dgc clip": distopt.DGC(density=0.05, exchange="allgather", clip=10.0),
    "topk": distopt.TopK(density=0.05, exchange="allgather"),
    "dense": distopt.DGC(density=0.05, exchange="dense"),
    "balanced": distopt.DGC(density=0.05, exchange="balanced"),
    "auto": distopt.DGC(density=0.05),
}


def on_train(algorithm, kind, steps=8):
    """Parameters after a run, on the CPU, and what `stats()` says."""
    rank = dist.get_rank()
    device = torch.device("cpu") if kind == "gloo" else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    group = dist.new_group(backend=kind)
    model = DistributedDataParallel(Chosen(torch.float32, SHAPES).to(device), process_group=group, bucket_cap_mb=0.002)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.5)
    attachment = algorithm.attach(model, optimizer, process_group=group)
    for step in range(steps):
        gradients = chosen_gradients(step, 0, rank, torch.float32)
        optimizer.zero_grad()
        model({name: gradient.to(device) for name, gradient in gradients.items()}).backward()
        optimizer.step()
    found = [p.detach().cpu().clone() for p in model.parameters()]
    stats = attachment.stats()
    attachment.detach()
    dist.destroy_process_group(group)
    return found, stats


def check(ranks, size, algorithm):
    want = ranks(size)(on_train, algorithm, "gloo")
    got = ranks(size)(on_train, algorithm, "nccl")
    for (parameters, stats), (expected, on_cpu) in zip(got, want, strict=True):
        for a, b, c in zip(parameters, expected, got[0][0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert torch.equal(a, c), "the ranks differ"
        assert stats["steps"] == on_cpu["steps"] == 8
        if algorithm.exchange != "auto":  # which goes by measured times
            assert stats["bytes_sent"] == on_cpu["bytes_sent"]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_rank(ranks, name):
    check(ranks, 1, ALGORITHMS[name])


@pytest.mark.skipif(NUM_DEVICES < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_ranks(ranks, name):
    check(ranks, 2, ALGORITHMS[name])

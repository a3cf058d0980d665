"""torch.compile around DDP."""

import shutil

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import (
    assert_close,
    assert_same_on_all_ranks,
    dgc,
    error_of,
    momentum_sgd,
    step_on_samples,
    topk,
    values_of,
)

import distopt


def two_buckets() -> DistributedDataParallel:
    """With torch.compile a bucket has at least 1 MiB, as its optimizer splits the graph where DDP splits gradients."""
    torch.manual_seed(0)
    wide = [nn.Linear(16, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 4)]
    return DistributedDataParallel(nn.Sequential(*wide), bucket_cap_mb=1)


def on_compiled(backend: str | None, algorithm, attach: str) -> dict:
    torch._dynamo.reset()
    ddp = two_buckets()
    optimizer = momentum_sgd(ddp.parameters(), weight_decay=0.01)
    attachment = algorithm.attach(ddp, optimizer) if attach == "before" else None
    model = torch.compile(ddp, backend=backend) if backend else ddp
    if attach == "after":
        attachment = algorithm.attach(model, optimizer)
    for step in range(4):
        step_on_samples(model, optimizer, step, dist.get_rank())
    stats = attachment.stats()
    assert stats["steps"] == 4
    assert stats["last"]["buckets_sparse"] >= 1
    assert stats["last"]["buckets_sparse"] + stats["last"]["buckets_dense"] == 2
    values = values_of(ddp.module)
    assert_same_on_all_ranks(values)
    return values


def on_backends() -> None:
    for algorithm in (dgc(), topk(values="fp16")):
        expected = on_compiled(None, algorithm, "before")
        for backend, attach in (("eager", "before"), ("aot_eager", "after")):
            assert_close(on_compiled(backend, algorithm, attach), expected)


def test_compiled_ddp_trains_like_ddp(ranks):
    ranks(2)(on_backends)


def on_inductor() -> None:
    expected = on_compiled(None, dgc(), "before")
    # Generated code rounds otherwise, so that single entries may be sent a step earlier or later.
    assert_close(on_compiled("inductor", dgc(), "before"), expected, rtol=0, atol=2e-3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor(ranks):
    ranks(2)(on_inductor)


def on_python_reducer() -> str:
    mode = torch._dynamo.config.optimize_ddp
    torch._dynamo.config.optimize_ddp = "python_reducer"
    try:
        ddp = two_buckets()
        optimizer = momentum_sgd(ddp.parameters())
        model = torch.compile(ddp, backend="eager")
        return error_of(lambda: dgc().attach(model, optimizer), distopt.CompatibilityError)
    finally:
        torch._dynamo.config.optimize_ddp = mode


@pytest.mark.filterwarnings("ignore")
def test_python_reducer_is_refused_at_attach(ranks):
    for message in ranks(2)(on_python_reducer):
        for part in ('optimize_ddp = "python_reducer"', "ignores what hooks return", "set it to True"):
            assert part in message

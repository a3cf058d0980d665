"""Bytes per rank, counted where tensors are handed to torch.distributed, against the formulas: 2 to 16 real ranks."""

import contextlib
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import momentum_sgd

import distopt
from distopt.comm import collectives

NUMEL, BIAS = 40 * 50, 40
DENSITY = 0.05
K = 100
HEADER = 12


@contextlib.contextmanager
def counted(total):
    """Adds up what this rank sends in each collective: rings, and messages to everyone else."""
    originals = collectives._all_gather, dist.all_to_all_single, dist.all_reduce, dist.reduce, dist.broadcast

    def gather(output, tensor, *, group, async_op=False):
        total["link"] += (group.size() - 1) * tensor.nbytes
        return originals[0](output, tensor, group=group, async_op=async_op)

    def to_all(output, tensor, *, group):
        total["link"] += (group.size() - 1) * tensor.nbytes // group.size()
        return originals[1](output, tensor, group=group)

    def all_reduce(tensor, **options):
        size = options["group"].size()
        total["link"] += 2 * (size - 1) * tensor.nbytes // size
        return originals[2](tensor, **options)

    def reduce(tensor, **options):
        total["node"] += tensor.nbytes if options["group"].rank() else 0
        return originals[3](tensor, **options)

    def broadcast(tensor, **options):
        total["node"] += 0 if options["group"].rank() else (options["group"].size() - 1) * tensor.nbytes
        return originals[4](tensor, **options)

    collectives._all_gather = gather
    dist.all_to_all_single, dist.all_reduce, dist.reduce, dist.broadcast = to_all, all_reduce, reduce, broadcast
    try:
        yield
    finally:
        collectives._all_gather = originals[0]
        dist.all_to_all_single, dist.all_reduce, dist.reduce, dist.broadcast = originals[1:]


def one_step(algorithm):
    """Bytes counted in a step (not the first, in which the ranks compare their steps), and what stats() says."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(50, 40))
    optimizer = momentum_sgd(model.parameters())
    attachment = algorithm.attach(model, optimizer)
    total = {"link": 0, "node": 0}
    for step in range(2):
        with counted(total) if step else contextlib.nullcontext():
            model(torch.randn(4, 50)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    last = attachment.stats()["last"]
    attachment.detach()
    return total, last


@pytest.mark.parametrize("num_ranks", [2, 4, 8, 16])
def test_bytes_per_rank(ranks, num_ranks):
    pool = ranks(num_ranks)
    n, bias = num_ranks, 4 * BIAS
    gathered = HEADER + 8 * K + bias  # the bias is so small that it travels with the entries
    expected = {"allgather": (n - 1) * gathered}
    sent, returned = math.ceil(K / n), math.ceil(4 * K / n)
    sent, returned = min(sent, NUMEL // n), min(returned, NUMEL // n)
    expected["balanced"] = (n - 1) * (2 * HEADER + 8 * (sent + returned)) + 2 * (n - 1) * bias // n
    expected["dense"] = (n - 1) * HEADER + 2 * (n - 1) * 4 * (NUMEL + BIAS) // n
    for route, nbytes in expected.items():
        for total, last in pool(one_step, distopt.DGC(density=DENSITY, exchange=route)):
            assert total["link"] == last["link_bytes_sent"] == nbytes, route
            assert total["node"] == last["node_bytes_sent"] == 0
    if num_ranks == 2:
        return
    nodes, payload = n // 2, HEADER + 8 * K
    leader = (n - 1) * HEADER + (nodes - 1) * payload + 2 * (nodes - 1) * bias // nodes
    results = pool(one_step, distopt.DGC(density=DENSITY, exchange="hierarchical", ranks_per_node=2))
    for rank, (total, last) in enumerate(results):
        assert total["link"] == last["link_bytes_sent"] == ((n - 1) * HEADER if rank % 2 else leader)
        inside = 4 * (NUMEL + BIAS) + bias if rank % 2 else nodes * payload + bias
        assert total["node"] == last["node_bytes_sent"] == inside


def test_bytes_of_the_balanced_exchange_do_not_grow_with_the_ranks(ranks):
    found = {n: ranks(n)(one_step, distopt.DGC(density=DENSITY, exchange="balanced"))[0][0]["link"] for n in (4, 16)}
    grown = {n: ranks(n)(one_step, distopt.DGC(density=DENSITY, exchange="allgather"))[0][0]["link"] for n in (4, 16)}
    headers = {n: (n - 1) * 2 * HEADER for n in (4, 16)}
    # (N-1)/N goes from 3/4 to 15/16, and k/N is rounded
    assert found[16] - headers[16] < 1.45 * (found[4] - headers[4])
    assert grown[16] == 5 * grown[4]

"""The two collectives on real ranks: rows in rank order, sums bit-identical, nothing waits before it is asked to."""

import pytest
import torch
import torch.distributed as dist

from distopt.comm import all_gather, all_reduce_sum

GATHERED = [torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]


def gather(dtype, n):
    own = (torch.arange(n) + 10 * dist.get_rank()).to(dtype)
    rows, done = all_gather(own, dist.group.WORLD)
    done.wait()
    return rows


def reduce(dtype, n):
    generator = torch.Generator().manual_seed(dist.get_rank())
    tensor = torch.randn(n, generator=generator).to(dtype)
    own = tensor.clone()
    all_reduce_sum(tensor, dist.group.WORLD).wait()
    return own, tensor


def many_in_flight(n):
    """Launched in order, awaited in another: as the buckets of a step are."""
    started = [all_gather(torch.full((n,), float(i + dist.get_rank())), dist.group.WORLD) for i in range(20)]
    for _, done in reversed(started):
        done.wait()
    return [rows[:, 0].tolist() for rows, _ in started]


@pytest.mark.parametrize("n", [1, 7, 4096])
@pytest.mark.parametrize("dtype", GATHERED, ids=str)
def test_all_gather_keeps_rank_order(ranks, dtype, n):
    expected = torch.stack([(torch.arange(n) + 10 * rank).to(dtype) for rank in range(2)])
    for rows in ranks(2)(gather, dtype, n):
        assert torch.equal(rows, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_all_reduce_is_the_sum_and_the_same_bits_everywhere(ranks, dtype):
    (own, total), (other, same) = ranks(2)(reduce, dtype, 1001)
    assert torch.equal(total, same)
    assert torch.equal(total, own + other)


def test_collectives_may_overlap(ranks):
    expected = [[float(i), float(i + 1)] for i in range(20)]
    assert ranks(2)(many_in_flight, 100) == [expected, expected]

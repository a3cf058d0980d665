"""Values beyond fp16: no infinity on any wire, alone or in the sum over the ranks, and nothing of them is lost."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training import Chosen, dgc, momentum_sgd, topk

SHAPES = {"block0.weight": (6, 5), "block0.bias": (6,)}
HUGE = 200_000.0


def on_huge_gradient(algorithm, dtype: torch.dtype = torch.float32, huge: float = HUGE) -> None:
    model = DistributedDataParallel(Chosen(dtype, shapes=SHAPES))
    optimizer = momentum_sgd(model.parameters(), momentum=0.0)
    algorithm.attach(model, optimizer)
    size = dist.get_world_size()
    total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for step in range(60):
        sign = 1 if dist.get_rank() == 0 or size < 3 else -1
        gradient = sign * huge * (step == 0)
        model({name: torch.full(shape, gradient, dtype=dtype) for name, shape in SHAPES.items()}).backward()
        for name, parameter in model.module.named_parameters():
            assert parameter.grad.isfinite().all(), (step, name)
            total[name] += parameter.grad.double()
        optimizer.step()
        optimizer.zero_grad()
    mean = huge if size < 3 else huge * (2 - size) / size
    for name, summed in total.items():
        expected = torch.full(SHAPES[name], mean, dtype=torch.float64)
        tolerance = {"rtol": 1e-3, "atol": 0.0} if dtype == torch.float16 else {}
        torch.testing.assert_close(summed, expected, **tolerance, msg=name)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize(
    "algorithm",
    [topk(values="fp16"), dgc(values="fp16", density=0.5, exchange="dense"), dgc(values="fp16", density=1.0)],
    ids=["sparse", "dense-wire", "whole"],
)
def test_huge_gradients_arrive_bit_by_bit(ranks, num_ranks, algorithm):
    ranks(num_ranks)(on_huge_gradient, algorithm)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("algorithm", [topk(density=0.5, exchange="dense"), topk(), topk(density=1.0)], ids=str)
def test_gradients_of_a_half_precision_model_arrive_whole(ranks, num_ranks, algorithm):
    ranks(num_ranks)(on_huge_gradient, algorithm, torch.float16, 60_000.0)

"""One rank of benchmarks/gossip_p2p.py: takes the contenders in turn, and measures each.

On hosts with a link of their own torchrun starts it with one argument, a JSON file with the number of parameters,
of rounds, and where rank 0 writes its result.
"""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from rank_result import run
from torch import nn

from distopt.gossip import Gossip, OnePeerExponential

TENSORS = 50
RAW = "raw"


def stepper(numel: int, correction: str) -> Callable[[], None]:
    """A step that only exchanges."""
    torch.manual_seed(dist.get_rank())
    model = nn.ParameterList([torch.randn(numel // TENSORS // 500, 500) for _ in range(TENSORS)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Gossip(topology=OnePeerExponential(), correction=correction).attach(model, optimizer)
    return optimizer.step  # without a gradient the optimizer itself does nothing


def transfer(numel: int) -> Callable[[], None]:
    rank, size = dist.get_rank(), dist.get_world_size()
    own, other = torch.randn(numel), torch.empty(numel)
    rounds = 0

    def exchange() -> None:
        nonlocal rounds
        graph = OnePeerExponential().graph(size, rounds)
        (receiver,), (sender,) = graph.receivers(rank), graph.senders(rank)
        rounds += 1
        operations = [dist.P2POp(dist.irecv, other, sender), dist.P2POp(dist.isend, own, receiver)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    return exchange


def summing(numel: int) -> Callable[[], None]:
    tensor = torch.randn(numel)
    return lambda: dist.all_reduce(tensor)


def measure(numel: int, rounds: int) -> dict[str, list[float]]:
    contenders: dict[str, Callable[[], None]] = {
        RAW: transfer(numel),
        "gossip": stepper(numel, "off"),
        "gossip, corrected": stepper(numel, "on"),
        "all-reduce": summing(numel),
    }
    order = [*contenders, *reversed(contenders)]
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name in order:
            dist.barrier()
            began = time.perf_counter()
            contenders[name]()
            took = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            if number:  # the first round warms up: memory, connections
                samples[name].append(1e3 * took.item())
    return samples


if __name__ == "__main__":
    run(lambda spec: measure(spec["numel"], spec["rounds"]))

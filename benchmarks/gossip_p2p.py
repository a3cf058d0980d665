"""What an exchange of gossip costs beside the bare transfer of the same bytes.

    python benchmarks/gossip_p2p.py --json benchmarks/results/gossip_p2p.json

Real ranks, 25 million fp32 parameters in 50 tensors, one-peer exponential graph: each rank sends its model to one other
and takes one. "gossip" is the whole step of an optimizer without gradients to a model that gossip is attached to, and
nothing else: sending, receiving, averaging into the parameters. "raw" is `torch.distributed.batch_isend_irecv` of one
vector of the same bytes to and from the same ranks, into kept memory. Also with variance correction, which reads the
parameters twice more, and an all-reduce. Each round takes all of them in one order and back (A B C C B A), after a
barrier each; the figure is the slowest rank's time. Medians, quartiles, and the median of the ratios by round.

With more ranks than cores the ranks share them, and all contenders alike.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from federated_jobs import write
from gossip_ranks import run_ranks
from torch import nn

from compress import summary
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


def summarised(samples: dict[str, list[float]]) -> dict[str, Any]:
    """Of each contender, and of its ratio to raw by round, of which there are two samples each."""
    found = {}
    for name, values in samples.items():
        pairs = zip(values[::2], values[1::2], samples[RAW][::2], samples[RAW][1::2], strict=True)
        ratios = [(a + b) / (c + d) for a, b, c, d in pairs]
        found[name] = {"ms": summary(values), "to_raw": summary(ratios), "least_ms": min(values)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--numel", type=int, default=25_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--deadline", type=float, default=900.0, help="seconds for one number of ranks")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    results = {}
    for ranks in options.ranks:
        before = os.getloadavg()[0]
        samples = run_ranks(measure, ranks, options.numel, options.rounds, deadline_s=options.deadline)
        results[str(ranks)] = {"load_before": round(before, 2), **summarised(samples)}
        print(f"{ranks} ranks, {options.numel:,} parameters; load of the machine before: {before:.1f}")
        for name in samples:
            found = results[str(ranks)][name]
            ms, ratio = found["ms"], found["to_raw"]
            print(
                f"  {name:20}{ms['median']:>9.1f} ms [{ms['quartile_1']:.1f}, {ms['quartile_3']:.1f}]".ljust(56)
                + f"{ratio['median']:>6.2f} x raw [{ratio['quartile_1']:.2f}, {ratio['quartile_3']:.2f}]",
                flush=True,
            )
    if options.json:
        write(options.json, options, {"results": results})


if __name__ == "__main__":
    main()

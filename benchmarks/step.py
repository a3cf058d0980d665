"""What a training step costs with and without compression, where the link is the machine's own memory.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/step.py --json results.json

A 10M-parameter MLP, batch 64 per rank, SGD with momentum and weight decay. The contenders take turns in each round, so
that a disturbance hits all of them; each is divided by plain DDP in its own round. Seconds inside the hook are those of
`stats()`, of rank 0.

Limits: loopback carries many Gbit/s, so this shows what compression costs, not what it saves: it is the worst case.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt.cli.machine import machine, versions

INFINITE = distopt.ddp.Link(latency_s=1e-9, bandwidth=1e15)  # on which dense always wins
CONTENDERS = {
    "plain DDP": None,
    "distopt.Dense()": distopt.Dense(),
    "DGC 0.1%": distopt.DGC(density=0.001, exchange="allgather"),
    "DGC 0.1% auto": distopt.DGC(density=0.001),
    "DGC 0.1% balanced": distopt.DGC(density=0.001, exchange="balanced"),
    "DGC 0.1% fp16 block16": distopt.DGC(density=0.001, values="fp16", indices="block16", exchange="allgather"),
    "DGC 25%": distopt.DGC(density=0.25, exchange="allgather"),  # the first stage of the warm-up
    "DGC 25% auto": distopt.DGC(density=0.25),
    "DGC auto, infinite link": distopt.DGC(density=0.25, link=INFINITE),
    "TopK 0.1%": distopt.TopK(density=0.001, exchange="allgather"),
}
HOOK_SECONDS = ("seconds_selecting", "seconds_communicating", "seconds_decoding")
BASELINE = "plain DDP"


def stepper(algorithm: distopt.DGC | None) -> Callable[[], dict[str, Any]]:
    """A function that takes one training step and returns its milliseconds."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 2048))
    model = DistributedDataParallel(module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    attachment = algorithm.attach(model, optimizer) if algorithm else None
    images = torch.randn(64, 784, generator=torch.Generator().manual_seed(dist.get_rank()))

    def step() -> dict[str, Any]:
        dist.barrier()
        began = time.perf_counter()
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
        took = {"step": 1e3 * (time.perf_counter() - began)}
        if attachment is not None:
            stats = attachment.stats()
            took |= {key: 1e3 * stats["last"][key] for key in HOOK_SECONDS} | {"routes": "+".join(stats["routes"])}
        return took

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    steppers = {name: stepper(algorithm) for name, algorithm in CONTENDERS.items()}
    rounds = [{name: step() for name, step in steppers.items()} for _ in range(options.rounds + 3)]
    del rounds[:3]  # buckets are rebuilt, memory is fresh
    results = {}
    for name in CONTENDERS:
        ratios = [each[name]["step"] / each[BASELINE]["step"] for each in rounds]
        low, middle, high = statistics.quantiles(ratios, n=4)
        results[name] = {
            "ms": {
                key: statistics.median(each[name][key] for each in rounds) for key in rounds[0][name] if key != "routes"
            },
            "routes": rounds[-1][name].get("routes", ""),
            "ratio_to_plain_ddp": {"median": middle, "quartile_1": low, "quartile_3": high},
        }
    if dist.get_rank() == 0:
        parameters = sum(p.numel() for p in nn.Linear(784, 2048).parameters()) + 2 * (2048 * 2048 + 2048)
        print(
            f"{dist.get_world_size()} ranks on one machine, {parameters:,} parameters, {options.rounds} rounds; medians"
        )
        print(f"{'':24}{'ms/step':>9} {'x plain DDP':>20} {'selecting':>11} {'communicating':>14} {'decoding':>9}")
        for name, result in results.items():
            ms, ratio = result["ms"], result["ratio_to_plain_ddp"]
            spread = f"{ratio['median']:.2f} [{ratio['quartile_1']:.2f}, {ratio['quartile_3']:.2f}]"
            inside = [f"{ms[key]:.1f}" if key in ms else "" for key in HOOK_SECONDS]
            print(f"{name:24}{ms['step']:>9.1f} {spread:>20} {inside[0]:>11} {inside[1]:>14} {inside[2]:>9}", end="  ")
            print(result["routes"])
        if options.json:
            content = {
                "command": shlex.join(["torchrun", "--nproc-per-node", str(dist.get_world_size()), *sys.argv]),
                "ranks": dist.get_world_size(),
                "parameters": parameters,
                "rounds": options.rounds,
                "machine": machine(),
                "versions": versions(),
                "results": results,
            }
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(content, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

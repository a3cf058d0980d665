"""What a test of the gradient noise costs: a step with `AdaptiveBatch` beside it, and the same step without.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/batch_test.py --json results.json

An MLP of 1.9 million parameters, 64 samples a rank. The ways take turns in blocks of steps, so that a disturbance hits
all of them; each block is divided by the block without tests of the same algorithm and round, in seconds of CPU of the
process (all threads), which other work on the machine disturbs least. Beside that stands what the controller itself
has counted: seconds between the beginning and the end of its own calls, waiting for the other ranks among them, as a
share of the clock's time. The batch is not let grow.

Limits: on loopback; a slow link adds the probe's bytes, which are given.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import distopt
from distopt.cli.machine import machine, versions

BATCH = 64
ALGORITHMS = {"dense": distopt.Dense(), "dgc": distopt.DGC(density=1e-3)}
TESTS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "norm": {},
    "norm, every 1": {"every": 1},
    "augmented": {"test": "augmented"},
    "coordinate": {"test": "coordinate"},
}


class Way:
    """One algorithm with one test, or none."""

    def __init__(self, algorithm: str, test: str, data: TensorDataset, steps: int) -> None:
        torch.manual_seed(0)
        layers = (nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
        self.model = DistributedDataParallel(nn.Sequential(*layers))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.attachment = ALGORITHMS[algorithm].attach(self.model, self.optimizer)
        sampler = distopt.batch.GrowingBatchSampler(data, batch_size=BATCH)
        self.loader = DataLoader(data, batch_sampler=sampler)
        # Without a test: one that never comes, so that the loops are the same.
        settings = {"every": 10**9} if TESTS[test] is None else TESTS[test]
        fixed = distopt.AdaptiveBatch(**{**settings, "max_batch": BATCH * dist.get_world_size()})
        self.batch = fixed.attach(self.model, self.optimizer, self.loader, beside=self.attachment)
        self.steps = steps

    def block(self) -> dict[str, float]:
        """Seconds of a block of steps, which is an epoch."""
        dist.barrier()
        counted, cpu_s, began = self.batch.stats()["seconds_testing"], time.process_time(), time.perf_counter()
        for micro_batches in self.batch.steps():
            for inputs, targets in micro_batches:
                self.batch.backward(nn.functional.cross_entropy(self.model(inputs), targets))
            self.optimizer.step()
            self.optimizer.zero_grad()
        return {
            "step_s": (time.perf_counter() - began) / self.steps,
            "cpu_s": (time.process_time() - cpu_s) / self.steps,
            "testing_s": (self.batch.stats()["seconds_testing"] - counted) / self.steps,
        }


def measured(rounds: int, steps: int) -> list[dict[str, Any]]:
    """A row for each way."""
    torch.manual_seed(1)
    samples = steps * BATCH * dist.get_world_size()
    data = TensorDataset(torch.randn(samples, 784), torch.randint(10, (samples,)))
    ways = {(algorithm, test): Way(algorithm, test, data, steps) for algorithm in ALGORITHMS for test in TESTS}
    blocks: dict[tuple[str, str], list[dict[str, float]]] = {key: [] for key in ways}
    for number in range(rounds + 1):
        for key, way in ways.items():
            found = way.block()
            if number:  # the first warms up
                blocks[key].append(found)
    rows = []
    for (algorithm, test), own in blocks.items():
        without = blocks[algorithm, "none"]
        stats = ways[algorithm, test].batch.stats()
        rows.append(
            {
                "algorithm": algorithm,
                "test": test,
                "step_ms": 1e3 * statistics.median(each["step_s"] for each in own),
                "cpu_ms": 1e3 * statistics.median(each["cpu_s"] for each in own),
                "more_cpu": statistics.median(a["cpu_s"] / b["cpu_s"] - 1 for a, b in zip(own, without, strict=True)),
                "testing_share": statistics.median(each["testing_s"] / each["step_s"] for each in own),
                "bytes_per_test": stats["bytes_sent"] // max(1, stats["tests"]),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=30, help="of a block")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = measured(options.rounds, options.steps)
    if dist.get_rank() == 0:
        print(
            f"{'algorithm':<10} {'test':<22} {'step ms':>10} {'CPU ms':>8} {'more CPU':>9} {'testing':>8} {'bytes':>8}"
        )
        for row in rows:
            print(
                f"{row['algorithm']:<10} {row['test']:<22} {row['step_ms']:>10.2f} {row['cpu_ms']:>8.2f} "
                f"{row['more_cpu']:>9.2%} {row['testing_share']:>8.2%} {row['bytes_per_test']:>8}"
            )
        if options.json:
            command = f"torchrun --standalone --nproc-per-node {dist.get_world_size()} {shlex.join(sys.argv)}"
            result = {"command": command, "machine": machine(), "versions": versions(), "rows": rows}
            options.json.write_text(json.dumps(result, indent=2) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""What a second rank saves a federated simulation: the clients of a round on one process and spread over two.

    python benchmarks/federated_sharded.py --json benchmarks/results/federated_sharded.json

100 clients of 640 samples each, 20 per round, 30 local steps of batches of 64, an MLP 784-128-10, one thread per rank.
Rules of three kinds: FedAvg adds up with one all-reduce, FedVarp gathers the replies, SCAFFOLD's clients stay with the
rank that has their control variates. Seconds per round, without starting; the kinds of run in turns. One process and a
rank's share are computed in the same mode, which is chosen there. The final models of one and of two ranks are
compared. The aim is 1.6 times as fast where a client takes 10 ms or more.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

from compress import commit
from distopt import federated
from distopt.cli.machine import machine, versions

DEADLINE_S = 300
WARM_UP = 2
ALGORITHMS = ("fedavg", "fedvarp", "scaffold")


def work(algorithm: str, ranks: int, rounds: int, saved: str) -> None:
    """One run, as a rank or alone; rank 0 prints seconds per round and per client, and saves the model."""
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    inputs, labels = torch.randn(64_000, 784), torch.randint(10, (64_000,))
    job = federated.Simulation(
        model=nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)),
        clients=federated.ClientData.split((inputs, labels), federated.IIDPartition(), 100),
        algorithm=federated.FederatedAlgorithm.from_dict({"algorithm": algorithm}),
        local=federated.LocalTraining(steps=30, batch_size=64, lr=0.05),
        participation=federated.UniformSampling(count=20),
        mode="auto",  # the fastest in one process, and the same for a rank's share
    )
    job.run(WARM_UP)
    start = time.perf_counter()
    job.run(WARM_UP + rounds)
    seconds = (time.perf_counter() - start) / rounds
    if ranks == 1 or dist.get_rank() == 0:
        torch.save(job.model.state_dict(), saved)
        print(json.dumps(seconds))
    if ranks > 1:
        dist.destroy_process_group()


def run(algorithm: str, ranks: int, rounds: int, saved: str) -> float:
    arguments = [__file__, "--work", algorithm, str(ranks), str(rounds), saved]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    ran = subprocess.run(
        [sys.executable, *torchrun, *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if ran.returncode:
        raise SystemExit(f"{algorithm} on {ranks} ranks failed:\n{ran.stdout}{ran.stderr}")
    return float(ran.stdout.split()[-1])


def measure(rounds: int, repeats: int) -> list[dict]:
    seconds: dict[tuple[str, int], list[float]] = {}
    differences = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            for algorithm in ALGORITHMS:
                models = []
                for ranks in (1, 2):
                    saved = f"{folder}/{ranks}.pt"
                    seconds.setdefault((algorithm, ranks), []).append(run(algorithm, ranks, rounds, saved))
                    models.append(torch.cat([t.flatten() for t in torch.load(saved).values()]))
                differences[algorithm] = (models[0] - models[1]).abs().max().item()
    rows = []
    for algorithm in ALGORITHMS:
        one, two = (statistics.median(seconds[algorithm, ranks]) for ranks in (1, 2))
        rows.append(
            {
                "algorithm": algorithm,
                "one_rank_s": one,
                "two_ranks_s": two,
                "speed_up": one / two,
                "per_client_s": one / 20,
                "largest_difference": differences[algorithm],
                "all_s": {str(ranks): seconds[algorithm, ranks] for ranks in (1, 2)},
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        algorithm, ranks, rounds, saved = args.work
        work(algorithm, int(ranks), int(rounds), saved)
        return
    rows = measure(args.rounds, args.repeats)
    table = Table(title=f"20 clients per round, median of {args.repeats} runs of {args.rounds} rounds")
    for heading in ("rule", "ms per client", "1 rank, ms/round", "2 ranks", "speed-up", "largest difference"):
        table.add_column(heading, justify="left" if heading == "rule" else "right")
    for row in rows:
        milliseconds = (f"{1e3 * row[key]:.1f}" for key in ("per_client_s", "one_rank_s", "two_ranks_s"))
        table.add_row(row["algorithm"], *milliseconds, f"{row['speed_up']:.2f}", f"{row['largest_difference']:.1e}")
    Console(width=120).print(table)
    if args.json:
        content = {
            "command": f"python {shlex.join(sys.argv)}",
            "commit": commit(),
            "machine": machine(),
            "versions": versions(),
            "rows": rows,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()

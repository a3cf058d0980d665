"""What gradient coding saves in a live training, and what arrives at rank 0 with one master and with a sharded one.

    OMP_NUM_THREADS=1 python benchmarks/coded_training.py --json benchmarks/results/coded-NAME.json

Starts examples/coded_training.py under torchrun, the kinds of run in turns:

- stragglers: 4 workers and a master, 100 steps, with nobody slow and with one worker after the other asleep for 0.5 s;
  coded (s = 1) and waiting for all (s = 0). Seconds of the loop, not of starting. The final parameters of each run are
  compared with those of s = 0 with nobody slow.
- bytes: received by rank 0 per step, n = 4, 8 and 16 workers, fractional s = 1. The master is one rank more.

Limits: the ranks share the machine's cores, so a sleeping worker leaves its core to the others; on machines of their
own the coded run would not get faster than the one with nobody slow.
"""

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from compress import commit
from distopt.cli.machine import machine, versions

EXAMPLE = Path(__file__).parents[1] / "examples" / "coded_training.py"
DEADLINE_S = 300
KINDS = {
    "waiting for all, nobody slow": ["--tolerate", "0"],
    "coded, nobody slow": [],
    "coded, rotating sleeper": ["--stragglers", "rotating:0.5"],
    "coded, sharded, rotating sleeper": ["--stragglers", "rotating:0.5", "--decoder", "sharded"],
    "waiting for all, rotating sleeper": ["--stragglers", "rotating:0.5", "--tolerate", "0"],
}


def run(ranks: int, arguments: list[str]) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    ran = subprocess.run(
        [*command, str(EXAMPLE), *arguments], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    if ran.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{ran.stdout}{ran.stderr}")
    return ran.stdout


def number(pattern: str, said: str) -> float:
    found = re.search(pattern, said)
    assert found is not None, said
    return float(found[1].replace(",", ""))


def measure_stragglers(steps: int, repeats: int) -> dict:
    results: dict[str, dict] = {name: {"seconds": []} for name in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            for index, (name, arguments) in enumerate(KINDS.items()):
                saved = f"{folder}/{index}.pt"
                ranks = 4 if "sharded" in name else 5
                said = run(ranks, ["--steps", str(steps), "--save", saved, *arguments])
                results[name]["seconds"].append(number(r"steps in ([\d.]+) s", said))
                parameters = torch.cat([p.flatten() for p in torch.load(saved).values()])
                reference = torch.cat([p.flatten() for p in torch.load(f"{folder}/0.pt").values()])
                results[name]["largest_difference"] = (parameters - reference).abs().max().item()
    base = statistics.median(results["coded, nobody slow"]["seconds"])
    for result in results.values():
        result["median_s"] = statistics.median(result["seconds"])
        result["ratio"] = result["median_s"] / base
    return results


def measure_bytes(steps: int) -> list[dict]:
    rows = []
    for workers in (4, 8, 16):
        row: dict = {"workers": workers}
        for decoder, ranks in (("first", workers + 1), ("sharded", workers)):
            # Nobody is skipped: everybody's messages arrive, as with workers that take equally long.
            said = run(
                ranks, ["--steps", str(steps), "--decoder", decoder, "--stragglers", "none", "--deadline", "200"]
            )
            row[decoder] = 1e6 * number(r"received ([\d.,]+) MB", said) / steps
        rows.append(row)
    parameters = sum(p.numel() for p in torch.nn.Linear(64, 256).parameters()) + 256 * 10 + 10
    return [{**row, "gradient": 8 * parameters} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    stragglers, in_bytes = measure_stragglers(args.steps, args.repeats), measure_bytes(20)

    console = Console(width=120)
    table = Table(title=f"{args.steps} steps, 4 workers, median of {args.repeats}", title_justify="left")
    for heading in ("run", "seconds", "x nobody slow", "largest difference"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for name, result in stragglers.items():
        difference = f"{result['largest_difference']:.1e}"
        table.add_row(name, f"{result['median_s']:.2f}", f"{result['ratio']:.2f}", difference)
    console.print(table)
    table = Table(title="received by rank 0 per step, in gradients", title_justify="left")
    for heading in ("workers", "one master", "sharded"):
        table.add_column(heading, justify="right")
    for row in in_bytes:
        table.add_row(
            str(row["workers"]), *(f"{row[decoder] / row['gradient']:.2f}" for decoder in ("first", "sharded"))
        )
    console.print(table)
    if args.json:
        content = {
            "command": f"python {shlex.join(sys.argv)}",
            "commit": commit(),
            "machine": machine(),
            "versions": versions(),
            "stragglers": stragglers,
            "bytes_into_rank_0": in_bytes,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()

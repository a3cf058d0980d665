"""Gossip against DDP on a slow link: Fashion-MNIST on hosts with a link rate of their own, on one machine.

    sudo python benchmarks/gossip_link.py --json benchmarks/results/gossip_link.json

Four hosts (network namespaces, launch/netns_cluster.sh) with 100 Mbit/s each way, a rank on each. An MLP
784-128-64-10 of 109,386 parameters, SGD with momentum 0.9, batches of 128 per rank, each rank with a random quarter of
the images, all from the same start. DDP averages gradients in every step; gossip averages models on the one-peer
exponential graph, in every step or every fourth, after the step (synchronous) or while the next ones are computed
(overlapped). All take equally many steps with the same rate, which falls to nothing in the last third.

Accuracy is the mean over the ranks of the test accuracy of each rank's own model; seconds are those of the steps, and
of taking in what was under way at the end of each block, without evaluation; bytes are those that the interface of
host 1 has sent. The seeds decide start and batches. The ways take turns by seed, so they all see the machine alike.

How much of an exchange is hidden is from a trace of torch.profiler of the overlapped way: the part of the time of
exchanges (`distopt::gossip::exchange`, in a thread of its own) in which the training thread does not wait
(`distopt::gossip::wait`).

Limits: the hosts share the machine's cores, two to a core where there are two: the computation of all ways takes longer
for it, alike. Needs root.
"""

import argparse
import os
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

from federated_jobs import write
from gossip_link_worker import WAYS
from link import job

from distopt.plotting import COLOURS, load_matplotlib

WORKER = "gossip_link_worker.py"


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A list of the ways' records for each seed."""
    found = []
    for seed in range(options.seeds):
        spec = {
            "seed": seed,
            "steps": options.steps,
            "evaluate_every": options.evaluate_every,
            "trace": str(options.trace.resolve()) if options.trace and not seed else None,
            "profile": not seed,
        }
        load = os.getloadavg()[0]
        result = job(4, options.rate, spec, options.deadline, pinned=False, worker=WORKER)
        if "failed" in result:
            raise SystemExit(f"seed {seed}: {result['failed']}\n" + "\n".join(result["log"]))
        found.append(result | {"seed": seed, "load_before": round(load, 2)})
        for name, each in result["ways"].items():
            print(f"seed {seed}, {WAYS[name].label}: {each['accuracy']:.2%} in {each['seconds']:.1f} s", flush=True)
    return found


def summarised(seeds: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    rows = {}
    for name in WAYS:
        each = [seed["ways"][name] for seed in seeds]
        base = [seed["ways"]["ddp"] for seed in seeds]
        rows[name] = {
            "accuracy": statistics.mean(one["accuracy"] for one in each),
            "points_to_ddp": [100 * (a["accuracy"] - b["accuracy"]) for a, b in zip(each, base, strict=True)],
            "seconds": statistics.median(one["seconds"] for one in each),
            "time_of_ddp": statistics.median(a["seconds"] / b["seconds"] for a, b in zip(each, base, strict=True)),
            "mb_sent": statistics.mean(one["bytes"] for one in each) / 1e6,
        }
    return rows


def show(rows: dict[str, dict[str, Any]], seeds: list[dict[str, Any]], options: argparse.Namespace) -> None:
    print(f"\n4 hosts at {options.rate}, {options.steps} steps, loads before {[seed['load_before'] for seed in seeds]}")
    print(f"{'':34}{'accuracy':>10}{'points to DDP, by seed':>28}{'seconds':>10}{'x DDP':>8}{'MB sent':>10}")
    for name, row in rows.items():
        points = " ".join(f"{value:+.2f}" for value in row["points_to_ddp"])
        print(
            f"{WAYS[name].label:34}{row['accuracy']:>10.2%}{points:>28}{row['seconds']:>10.1f}"
            f"{row['time_of_ddp']:>8.2f}{row['mb_sent']:>10.1f}"
        )
    for name, hidden in seeds[0]["profile"].items():
        print(
            f"{WAYS[name].label}: {hidden['hidden_fraction']:.0%} of {hidden['exchange_ms']:.0f} ms of exchanges hidden"
            f" (computation {hidden['compute_ms']:.0f} ms)"
        )


def plot(seeds: list[dict[str, Any]], path: Path, title: str) -> None:
    """Accuracy over steps, megabytes and seconds; a thin line for each seed."""
    figure = load_matplotlib()(figsize=(13, 4), layout="constrained")
    scales = (("step", 1.0, "step"), ("bytes", 1e-6, "MB sent by a rank"), ("seconds", 1.0, "seconds"))
    for axes, (key, unit, label) in zip(figure.subplots(1, 3, sharey=True), scales, strict=True):
        for (name, way), colour in zip(WAYS.items(), COLOURS, strict=False):
            for number, seed in enumerate(seeds):
                curve = seed["ways"][name]["curve"]
                x, y = [unit * row[key] for row in curve], [100 * row["accuracy"] for row in curve]
                axes.plot(x, y, color=colour, linewidth=0.9, label=None if number else way.label)
        axes.set(xlabel=label, xscale="linear" if key == "step" else "log")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("mean test accuracy of the ranks' models, %")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="100mbit", help="as `tc` takes it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--evaluate-every", type=int, default=50)
    parser.add_argument("--deadline", type=int, default=900, help="seconds for one seed")
    parser.add_argument("--trace", type=Path, help="write rank 0's chrome trace of the overlapped way here")
    parser.add_argument("--json", type=Path, help="also write the figures here, and a plot beside them")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("network namespaces need root; use sudo")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the hosts are removed
    seeds = measure(options)
    rows = summarised(seeds)
    show(rows, seeds, options)
    if options.json:
        options.trace = None  # a path of this machine
        write(options.json, options, {"summary": rows, "seeds": seeds})
        plot(seeds, options.json.with_suffix(".png"), f"Fashion-MNIST, 4 hosts at {options.rate}")


if __name__ == "__main__":
    main()

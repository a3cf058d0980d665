"""Training over a slow link: dense DDP, DGC, DiLoCo and SparseLoCo, each for the same time, on hosts on one machine.

    sudo python benchmarks/local_link.py --json benchmarks/results/local_link.json

A transformer of 420,000 parameters (examples/internet_training.py) learns to predict the characters of the King James
Bible (Debian's package bible-kjv), in sequences of 64, 8 per rank and step, on 2 and on 4 hosts (network namespaces,
launch/netns_cluster.sh) with 100 and with 20 Mbit/s each way. Every way gets the same seconds; the learning rate falls
along a cosine of the time that has passed. AdamW in all but DGC, which has SGD with momentum, as momentum correction
needs it.

Loss is the mean over the ranks of the loss of each rank's own model on held-out text, in nats per character. Seconds
are those of the steps and exchanges, without looking at the loss; bytes those that the interface of host 1 has sent.
"computing" is steps x the seconds of a step without any exchange (measured before and after, with all hosts at work)
over all seconds; "in exchanges" is what the attachment says that it waited and worked for them, over all seconds;
"predicted" is the share of computing that `distopt.local.forecast` foresees on the link as it was measured.

Limits: the hosts share the machine's cores: with more hosts than cores the computation takes longer for it, in all ways
alike, and a host that waits leaves its core to another, so that "computing" may exceed 100%. Needs root.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

from federated_jobs import write
from link import job
from local_link_worker import WAYS

from distopt.comm import Link
from distopt.local import LocalSteps, forecast
from distopt.plotting import COLOURS, load_matplotlib

WORKER = "local_link_worker.py"
OVERHEAD_S = 120  # of one job beside its seconds of training, at most


def measure(hosts: int, rate: str, options: argparse.Namespace) -> dict[str, Any]:
    """One number of hosts at one rate, all ways."""
    text = str(options.text.resolve()) if options.text else None
    spec = {"ways": options.ways, "seconds": options.seconds, "seed": options.seed, "text": text}
    load = os.getloadavg()[0]
    deadline_s = round(OVERHEAD_S + 2 * options.seconds * len(options.ways))
    found = job(hosts, rate, spec, deadline_s, pinned=True, worker=WORKER)
    if "failed" in found:
        raise SystemExit(f"{hosts} hosts at {rate}: {found['failed']}\n" + "\n".join(found["log"]))
    step_s = sum(found["compute_step_s"]) / 2
    for name, way in found["ways"].items():
        way["compute_share"] = way["steps"] * step_s / way["seconds"]
        if way["exchanging_s"] is not None:
            way["exchanging_share"] = way["exchanging_s"] / way["seconds"]
        if isinstance(algorithm := WAYS[name].algorithm, LocalSteps):
            way["predicted_share"] = forecast(
                algorithm,
                Link(**found["link"]),
                num_ranks=hosts,
                parameters=found["parameters"],
                step_seconds=step_s,
            ).compute_share
    return found | {"hosts": hosts, "rate": rate, "load_before": round(load, 2)}


def show(cell: dict[str, Any]) -> None:
    step_ms = " and ".join(f"{1e3 * each:.1f}" for each in cell["compute_step_s"])
    print(
        f"\n{cell['hosts']} hosts at {cell['rate']} (measured: {8e-6 * cell['link']['bandwidth']:.1f} Mbit/s, "
        f"{1e3 * cell['link']['latency_s']:.2f} ms), {cell['parameters']:,} parameters; a step without exchange "
        f"{step_ms} ms (before, after); load before {cell['load_before']}"
    )
    print("| | loss | steps | MB sent by a rank | kB per step | computing | in exchanges | predicted |")
    print("|---|---|---|---|---|---|---|---|")
    for name, way in cell["ways"].items():
        exchanging = f"{way['exchanging_share']:.1%}" if "exchanging_share" in way else ""
        foreseen = f"{way['predicted_share']:.1%}" if "predicted_share" in way else ""
        print(
            f"| {WAYS[name].label} | {way['loss']:.3f} | {way['steps']:,} | {way['bytes'] / 1e6:,.1f} "
            f"| {way['bytes'] / way['steps'] / 1e3:,.2f} | {way['compute_share']:.1%} | {exchanging} | {foreseen} |"
        )
    sys.stdout.flush()


def plot(cell: dict[str, Any], path: Path) -> None:
    """Held-out loss over seconds and over bytes."""
    figure = load_matplotlib()(figsize=(10, 4), layout="constrained")
    scales = (("seconds", 1.0, "seconds", "linear"), ("bytes", 1e-6, "MB sent by a rank", "log"))
    for axes, (key, unit, label, scale) in zip(figure.subplots(1, 2, sharey=True), scales, strict=True):
        for (name, way), colour in zip(cell["ways"].items(), COLOURS, strict=False):
            rows = [row for row in way["curve"] if row["step"]]
            x, y = [unit * row[key] for row in rows], [row["loss"] for row in rows]
            axes.plot(x, y, "o-", markersize=3, color=colour, label=WAYS[name].label)
        axes.set(xlabel=label, xscale=scale)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out loss, nats per character")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Transformer of {cell['parameters']:,} parameters, {cell['hosts']} hosts at {cell['rate']}")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rates", nargs="+", default=["100mbit", "20mbit"], help="as `tc` takes them")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seconds", type=float, default=60.0, help="for each way, number of hosts and rate")
    parser.add_argument("--text", type=Path, help="a file in place of the Bible")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures here, and a plot for each cell beside them")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("network namespaces need root; use sudo")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the hosts are removed
    cells = []
    for hosts in options.hosts:
        for rate in options.rates:
            cells.append(measure(hosts, rate, options))
            show(cells[-1])
            if options.json:
                write(options.json, options, {"cells": cells})
                plot(cells[-1], options.json.with_name(f"{options.json.stem}-{hosts}-{rate}.png"))


if __name__ == "__main__":
    main()

"""What A2CiD2's second vector is worth: asynchronous gossip with and without it, at the same rate of exchanges.

    python benchmarks/gossip_a2cid2.py --json benchmarks/results/gossip_a2cid2.json

Event-driven simulation with Poisson clocks: each node computes one gradient and takes part in one exchange per unit of
time, with a neighbour drawn evenly. Both ways see the same events at the same times. 20 coordinates, float64, 3 seeds.

- consensus: models drawn from a normal distribution, no gradients; the time until the root of the mean squared distance
  to the mean is 1e-4 of what it was. "drift" is the largest change of a coordinate of the mean, at any look.
- heterogeneity: node i's function is |x - b_i|^2 / 2, exact gradients with a small rate; all nodes start at the optimum
  of the sum, from which their different functions pull them away. The figure is the mean squared distance to it over
  nodes and over the second half of the time. The b_i are drawn independently for each node, or lie "along the graph":
  on a circle in each pair of coordinates, in the order of the nodes, so that neighbours are alike, as where data differ
  by place. A larger rate leaves less for either to gain: each node then stays near its own optimum.
"""

import argparse
import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from federated_jobs import run_all, write
from torch import Tensor

from distopt.gossip import Complete, EdgeList, Ring, Topology, Torus
from distopt.gossip.asynchronous_simulation import simulate_asynchronous
from distopt.gossip.description import chis, mean_laplacian
from distopt.plotting import COLOURS, load_matplotlib

COORDINATES, AGREED = 20, 1e-4
RINGS = (16, 32, 64)
OTHERS = ("torus", "exponential", "complete")  # on 64 nodes
PLACED = ("at random", "along the graph")
WAYS = {"plain": False, "A2CiD2": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One simulation."""

    part: str
    graph: str
    nodes: int
    accelerated: bool
    seed: int
    lr: float = 0.0
    placed: str = ""
    duration: float = 2e4


def topology(run: Run) -> Topology:
    if run.graph == "exponential":  # with both directions of each hop: exchanges are mutual
        hops = [1 << power for power in range((run.nodes - 1).bit_length())]
        return EdgeList(edges=tuple((i, (i + hop) % run.nodes) for hop in hops for i in range(run.nodes)))
    return {"ring": Ring(), "torus": Torus(), "complete": Complete()}[run.graph]


def drawn(run: Run) -> Tensor:
    """(nodes, COORDINATES)."""
    random = torch.Generator().manual_seed(run.seed)
    values = torch.randn(run.nodes, COORDINATES, generator=random, dtype=torch.float64)
    if run.placed != PLACED[1]:
        return values
    angles = 2 * math.pi * torch.arange(run.nodes, dtype=torch.float64) / run.nodes
    phases = 2 * math.pi * torch.rand(COORDINATES, generator=random, dtype=torch.float64)
    return math.sqrt(2) * torch.cos(angles[:, None] + phases)


def perform(run: Run) -> dict[str, Any]:
    values = drawn(run)
    mean = values.mean(0)
    common = {
        "topology": topology(run),
        "duration": run.duration,
        "accelerated": run.accelerated,
        "seed": run.seed,
    }
    if run.part == "consensus":
        begin = float((values - mean).square().sum(1).mean().sqrt())
        found = simulate_asynchronous(
            start=values,
            evaluate=lambda models: {"drift": float((models.mean(0) - mean).abs().max())},
            until=lambda row: row["consensus_distance"] <= AGREED * begin,
            **common,
        )
        last = found.rows[-1]
        curve = [[row["time"], row["consensus_distance"] / begin] for row in found.rows]
        return {
            "time": last["time"] if last["consensus_distance"] <= AGREED * begin else None,
            "messages": int(last["messages"]),
            "drift": max(row["drift"] for row in found.rows),
            "curve": [[time, float(f"{value:.3g}")] for time, value in curve[:: max(1, len(curve) // 100)]],
        }
    found = simulate_asynchronous(
        start=mean.repeat(run.nodes, 1),
        gradient=lambda node, x: x - values[node],
        lr=run.lr,
        look_every=run.duration / 400,
        evaluate=lambda models: {"error": float((models - mean).square().sum(1).mean())},
        **common,
    )
    half = found.rows[len(found.rows) // 2 :]
    return {
        "error": statistics.mean(row["error"] for row in half),
        "disagreement": statistics.mean(row["consensus_distance"] ** 2 for row in half),
        "messages": int(found.rows[-1]["messages"]),
    }


def say(run: Run, result: dict[str, Any]) -> str:
    figure = result.get("time", result.get("error"))
    return f"{run.part}, {run.graph} {run.nodes} {run.placed} lr {run.lr} accelerated {run.accelerated}: {figure}"


def all_runs(options: argparse.Namespace) -> list[Run]:
    graphs = [("ring", nodes) for nodes in options.rings] + [(name, max(options.rings)) for name in OTHERS]
    settings = [("consensus", graph, nodes, "", 0.0, 2e4) for graph, nodes in graphs]
    settings += [
        ("heterogeneity", graph, nodes, placed, lr, duration)
        for graph, nodes in graphs
        for lr, duration in ((1e-2, 1000.0), (1e-3, options.duration))
        for placed in (PLACED if graph == "ring" else PLACED[:1])
    ]
    return [
        Run(part=part, graph=graph, nodes=nodes, placed=placed, lr=lr, duration=duration, seed=seed, accelerated=way)
        for part, graph, nodes, placed, lr, duration in settings
        for way in WAYS.values()
        for seed in range(options.seeds)
    ]


def rows_of(results: list[tuple[Run, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each set-up: the figures of both ways by seed, and their ratios."""
    keyed: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
    for run, result in results:
        key = (run.part, run.graph, run.nodes, run.placed, run.lr)
        keyed.setdefault(key, {}).setdefault("A2CiD2" if run.accelerated else "plain", []).append(result)
    rows = []
    for (part, graph, nodes, placed, lr), ways in keyed.items():
        name = "time" if part == "consensus" else "error"
        pairs = [(a[name], b[name]) for a, b in zip(ways["plain"], ways["A2CiD2"], strict=True)]
        chi1, chi2 = chis(mean_laplacian([topology(Run(part=part, graph=graph, nodes=nodes, accelerated=False, seed=0))
                                          .graph(nodes)]))  # fmt: skip
        row = {"part": part, "graph": graph, "nodes": nodes, "placed": placed, "lr": lr, "chi1": chi1, "chi2": chi2}
        rows.append(row | ways | {"ratios": [None if None in pair else pair[0] / pair[1] for pair in pairs]})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(
        f"\ntime to {AGREED:g} of the first disagreement\n{'':28}{'plain':>24}{'A2CiD2':>24}{'ratio':>22}{'drift':>10}"
    )
    for row in (row for row in rows if row["part"] == "consensus"):
        cells = [" / ".join("never" if e["time"] is None else f"{e['time']:.0f}" for e in row[way]) for way in WAYS]
        drift = max(each["drift"] for way in WAYS for each in row[way])
        print(f"{row['graph']:>12} {row['nodes']:>4}{'':11}{cells[0]:>24}{cells[1]:>24}{ratios(row):>22}{drift:>10.1e}")
    print(f"\nheterogeneity error\n{'':48}{'plain':>26}{'A2CiD2':>26}{'ratio':>22}")
    for row in (row for row in rows if row["part"] == "heterogeneity"):
        cells = [" / ".join(f"{each['error']:.3g}" for each in row[way]) for way in WAYS]
        name = f"{row['graph']} {row['nodes']}, {row['placed']}, lr {row['lr']:g}"
        print(f"{name:48}{cells[0]:>26}{cells[1]:>26}{ratios(row):>22}")


def ratios(row: dict[str, Any]) -> str:
    return " / ".join("-" if each is None else f"{each:.2f}" for each in row["ratios"])


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    figure = load_matplotlib()(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for row in (row for row in rows if row["part"] == "consensus"):
        axes = left if row["graph"] == "ring" else right
        colour = COLOURS[len(axes.lines) // 2]
        for way, style in (("plain", "dotted"), ("A2CiD2", "solid")):
            times, values = zip(*row[way][0]["curve"], strict=True)
            axes.plot(times, values, color=colour, linestyle=style, label=f"{row['graph']} {row['nodes']}, {way}")
    for axes, title in ((left, "rings"), (right, "other graphs")):
        axes.set(title=title, xlabel="time, in gradients per node", yscale="log", xscale="log")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=7)
    left.set_ylabel("disagreement, of the first")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rings", type=int, nargs="+", default=list(RINGS))
    parser.add_argument(
        "--duration", type=float, default=6000.0, help="of the heterogeneity runs with the smaller rate"
    )
    parser.add_argument("--processes", type=int, default=2, help="simulations at a time")
    parser.add_argument("--json", type=Path, help="also write the figures here, and a plot beside them")
    options = parser.parse_args()
    runs = all_runs(options)
    rows = rows_of(list(zip(runs, run_all(perform, runs, options.processes, say), strict=True)))
    show(rows)
    if options.json:
        write(options.json, options, {"agreed": AGREED, "rows": rows})
        plot(rows, options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()

"""What averaging does to models that do not know each other, and what variance correction gives back.

    python benchmarks/gossip_variance.py --json benchmarks/results/gossip_variance.json

scikit-learn's digits, 1,437 images to train on and 360 to test, an MLP 64-64-64-64-64-10 with ReLU, Xavier's weights,
SGD with rate 0.01, momentum 0.9 and weight decay 1e-4, batches of 32 per node. The figure is the first evaluated step
(every fifth) at which the nodes' mean test accuracy is 80%, for each seed.

- ranks: four processes with gloo, one-peer exponential graph, each with a quarter of the images, exchanges after each
  step and after every fourth.
- nodes: 4 to 128 nodes in one process, with pixels divided by 16, as above, and standardised. Every node draws from
  all images, in an order of its own, because a 64th of them does not fill a batch. "left" is the least that a layer's
  weights had of Xavier's variance at any evaluation, of the plain average.
- graphs: 16 nodes on other graphs.
- labels: 16 nodes whose labels are draws of Dir(0.1), all with equally many images; accuracy after 1,500 steps.
- layer norm: the counter-example. With LayerNorm behind each hidden layer the scale of the weights does not matter.

Steps are counted, not seconds: the machine's load changes nothing.
"""

import argparse
import contextlib
import dataclasses
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from federated_jobs import run_all, write
from gossip_ranks import accuracy, deep_mlp, digits, run_ranks
from torch import nn

from distopt.federated import DirichletPartition
from distopt.gossip import Gossip, NodeBatches, simulate
from distopt.plotting import COLOURS, load_matplotlib

TARGET, EVALUATE_EVERY, BATCH = 0.8, 5, 32
ONE_PEER = "one-peer-exponential"
STARTS = {  # of the ranks: the nodes' first models, and the correction
    "same start, plain": ("same", "off"),
    "different starts, plain": ("different", "off"),
    "different starts, corrected": ("different", "on"),
    "different starts, auto": ("different", "auto"),
}
CORRECTIONS = {"plain": "off", "corrected": "on", "auto": "auto"}
GRAPHS = (ONE_PEER, "exponential", "complete", "torus", "ring", "star", "scale-free")


class ReachedError(Exception):
    """The target is: the rest of the run would say nothing more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training of simulated nodes."""

    part: str
    nodes: int
    correction: str
    seed: int
    steps: int
    topology: str = ONE_PEER
    inputs: str = "/16"
    labels: str = "shared"
    layer_norm: bool = False
    initial: str = "different"


def sgd(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4)


def spread(model: nn.Module) -> float:
    """The least variance of a layer's weights, as a part of that which Xavier's initialisation gives them."""
    weights = [each.weight for each in model.modules() if isinstance(each, nn.Linear)]
    return min(float(weight.var() * (weight.shape[0] + weight.shape[1]) / 2) for weight in weights)


def shares(run: Run, labels: torch.Tensor) -> list[np.ndarray]:
    if run.labels == "dirichlet":
        return DirichletPartition(alpha=0.1, sizes="equal").split(labels, run.nodes, seed=run.seed)
    return [np.arange(len(labels))] * run.nodes


def train(run: Run) -> dict[str, Any]:
    images, labels, test_images, test_labels = digits(run.inputs)
    curve: list[tuple[int, float]] = []
    left: list[float] = []

    def progress(row: Any) -> None:
        curve.append((int(row["step"]), round(row["accuracy"], 4)))
        left.append(row["spread"])
        if run.part != "labels" and row["accuracy"] >= TARGET:
            raise ReachedError

    with contextlib.suppress(ReachedError):
        simulate(
            Gossip(topology=run.topology, correction=run.correction),
            make_model=lambda: deep_mlp(layer_norm=run.layer_norm),
            batches=NodeBatches((images, labels), shares(run, labels), BATCH, run.seed),
            steps=run.steps,
            optimizer=sgd,
            evaluate=lambda model: {"accuracy": accuracy(model, test_images, test_labels), "spread": spread(model)},
            evaluate_every=EVALUATE_EVERY,
            initial=run.initial,
            seed=1000 * run.seed,
            progress=progress,
        )
    return {"step": first(curve), "accuracy": curve[-1][1], "left": round(min(left), 4), "curve": curve}


def first(curve: list[tuple[int, float]]) -> int | None:
    return next((step for step, value in curve if value >= TARGET), None)


def say(run: Run, result: dict[str, Any]) -> str:
    kind = f"{run.part}: {run.nodes} nodes, {run.topology}, {run.inputs}, {run.correction}, seed {run.seed}"
    return f"{kind}: step {result['step']}, {result['accuracy']:.1%}, left {result['left']:.3f}"


def simulated(options: argparse.Namespace) -> list[Run]:
    """All of them, the long ones first."""
    found = []
    for seed in range(options.seeds):
        for name in CORRECTIONS.values():
            common = {"correction": name, "seed": seed, "steps": options.steps}
            for nodes in options.nodes:
                found.append(Run(part="nodes", nodes=nodes, **common))
                if nodes <= 32:
                    found.append(Run(part="nodes", nodes=nodes, inputs="standardised", **common))
            found += [Run(part="graphs", nodes=16, topology=graph, **common) for graph in GRAPHS]
            found += [Run(part="layer norm", nodes=nodes, layer_norm=True, **common) for nodes in (4, 16)]
            found.append(Run(part="labels", nodes=16, labels="dirichlet", **common))
    return sorted(found, key=lambda run: (run.correction != "off", -run.nodes))


# -- real ranks --------------------------------------------------------------------------------------------------------


def on_ranks(seeds: int, steps: int) -> list[dict[str, Any]]:
    """Each row of the ranks' table, as one rank sees it; the figures are of all ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    images, labels, test_images, test_labels = digits("/16")
    rows = []
    for name, (initial, correction) in STARTS.items():
        for every in (1, 4):
            curves = []
            for seed in range(seeds):
                parts = np.array_split(np.random.default_rng(seed).permutation(len(labels)), size)
                given = NodeBatches((images, labels), parts, BATCH, seed)
                torch.manual_seed(1000 * seed + (rank if initial == "different" else 0))
                model = deep_mlp()
                optimizer = sgd(list(model.parameters()))
                gossip = Gossip(topology=ONE_PEER, correction=correction, every=every)
                curve: list[tuple[int, float]] = []
                with gossip.attach(model, optimizer):
                    while len(curve) * EVALUATE_EVERY < steps and first(curve) is None:
                        for step in range(len(curve) * EVALUATE_EVERY, (len(curve) + 1) * EVALUATE_EVERY):
                            inputs, targets = given.of(rank, step)
                            optimizer.zero_grad()
                            nn.functional.cross_entropy(model(inputs), targets).backward()
                            optimizer.step()
                        mean = torch.tensor(accuracy(model, test_images, test_labels), dtype=torch.float64)
                        dist.all_reduce(mean)
                        curve.append(((len(curve) + 1) * EVALUATE_EVERY, round(mean.item() / size, 4)))
                curves.append(curve)
                if rank == 0:
                    print(f"ranks: {name}, every {every}, seed {seed}: step {first(curve)}", flush=True)
            rows.append({"start": name, "every": every, "steps": [first(curve) for curve in curves], "curves": curves})
    return rows


# -- tables ------------------------------------------------------------------------------------------------------------


def listed(steps: list[int | None]) -> str:
    return " / ".join("never" if step is None else str(step) for step in steps)


def show(ranks: list[dict[str, Any]], results: list[tuple[Run, dict[str, Any]]], options: argparse.Namespace) -> None:
    print(f"\n4 ranks, {ONE_PEER}: steps to {TARGET:.0%}, at most {options.steps}")
    print(f"{'':32}{'every step':>24}{'every 4 steps':>24}")
    for name in STARTS:
        cells = [listed(next(r["steps"] for r in ranks if (r["start"], r["every"]) == (name, n))) for n in (1, 4)]
        print(f"{name:32}{cells[0]:>24}{cells[1]:>24}")
    for title, rows in grouped(results).items():
        print(f"\n{title}: {'accuracy at the end' if title.startswith('labels') else f'steps to {TARGET:.0%}'}")
        print(f"{'':24}" + "".join(f"{name:>24}" for name in CORRECTIONS) + f"{'left, plain':>14}")
        for row, cells in rows.items():
            ended = title.startswith("labels")
            texts = [
                " / ".join(f"{each['accuracy']:.3f}" for each in cells[value])
                if ended
                else listed([each["step"] for each in cells[value]])
                for value in CORRECTIONS.values()
            ]
            left = statistics.mean(each["left"] for each in cells["off"])
            print(f"{row:24}" + "".join(f"{text:>24}" for text in texts) + f"{left:>14.3f}")


def grouped(results: list[tuple[Run, dict[str, Any]]]) -> dict[str, dict[str, dict[str, list[dict[str, Any]]]]]:
    """Results by table, row and correction, in the order of seeds."""
    tables: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = {}
    order = sorted(results, key=lambda pair: (pair[0].part != "nodes", pair[0].part, pair[0].nodes, pair[0].seed))
    for run, result in order:
        row = run.topology if run.part == "graphs" else f"{run.nodes} nodes"
        title = f"{run.part}, pixels {run.inputs}"
        tables.setdefault(title, {}).setdefault(row, {}).setdefault(run.correction, []).append(result)
    return tables


def plot(ranks: list[dict[str, Any]], tables: dict[str, Any], path: Path) -> None:
    figure = load_matplotlib()(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, colour in zip(STARTS, COLOURS, strict=False):
        for seed, curve in enumerate(next(r["curves"] for r in ranks if (r["start"], r["every"]) == (name, 1))):
            steps, values = zip(*curve, strict=True)
            left.plot(steps, [100 * v for v in values], color=colour, linewidth=0.9, label=None if seed else name)
    left.set(title=f"4 ranks, {ONE_PEER}, to {TARGET:.0%}", xlabel="step", ylabel="mean test accuracy, %")
    for (row, cells), colour in zip(tables["nodes, pixels /16"].items(), COLOURS, strict=False):
        for correction, style in (("off", "dotted"), ("on", "solid")):
            steps, values = zip(*cells[correction][0]["curve"], strict=True)
            label = f"{row}, {'plain' if correction == 'off' else 'corrected'}"
            right.plot(steps, [100 * v for v in values], color=colour, linestyle=style, linewidth=1.0, label=label)
    right.set(title="simulated nodes, first seed", xlabel="step", xscale="log")
    for axes in (left, right):
        axes.axhline(100 * TARGET, color="grey", linewidth=0.8, linestyle="dashed")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500, help="at most")
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--processes", type=int, default=2, help="simulations at a time")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it works")
    parser.add_argument("--json", type=Path, help="also write the figures here, and a plot beside them")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.steps, options.nodes = 1, 20, [4]
    ranks = run_ranks(on_ranks, 4, options.seeds, options.steps, deadline_s=3600)
    runs = simulated(options)
    results = list(zip(runs, run_all(train, runs, options.processes, say), strict=True))
    show(ranks, results, options)
    if options.json:
        rows = [dataclasses.asdict(run) | result for run, result in results]
        brief = [row | {"curve": row["curve"][:: 1 if len(row["curve"]) < 60 else 10]} for row in rows]
        write(options.json, options, {"target": TARGET, "ranks": ranks, "simulated": brief})
        plot(ranks, grouped(results), options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()

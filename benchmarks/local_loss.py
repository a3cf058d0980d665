"""Is the loss of local steps that of dense training, at equal samples? A small transformer, simulated, several seeds.

    python benchmarks/local_loss.py --json benchmarks/results/local_loss.json

The transformer of examples/internet_training.py, narrower, on the King James Bible (Debian's package bible-kjv). Four
workers of 32 sequences of 64 characters each take 500 steps of AdamW; dense training takes as many on all 128
sequences, from the same start and with the same learning rate, which rises for 30 steps and falls along a cosine to a
tenth.
`distopt.local.simulate` holds the workers in one process; what they would send is encoded and decoded as on a link.

The learning rate is the best of 3e-3, 6e-3 and 1e-2 for dense training. Loss is that of the model that all share, on
held-out text, in nats per character; "above dense" is paired by seed.

Limits: early in a training, of a small model on one text; the papers' runs are thousands of times as long.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from federated_jobs import run_all, write
from local_task import Task
from torch import nn

from distopt.local import DiLoCo, LocalSteps, SparseLoCo, simulate
from distopt.plotting import COLOURS, load_matplotlib

WIDTH, SEQUENCES, WORKERS, STEPS = 64, 128, 4, 500
LR, LOWEST_LR, RISE = 6e-3, 0.1, 30
LOOKS = 10
TARGET_PERCENT = 1.0


@dataclass(frozen=True)
class Way:
    """How workers train together.

    Attributes:
        label: In the table.
        algorithm: None for dense training.
        workers: They share the sequences of a step.
        seeds: How many of the seeds are trained.
    """

    label: str
    algorithm: LocalSteps | None = None
    workers: int = WORKERS
    seeds: int | None = None


WAYS = {
    "dense": Way("dense"),
    "diloco": Way("DiLoCo, H = 5", DiLoCo(inner_steps=5)),
    "sparse": Way("SparseLoCo, H = 5", SparseLoCo(inner_steps=5, k=512)),
}


@dataclass(frozen=True)
class Run:
    """One training."""

    way: str
    seed: int
    steps: int
    text: str | None


def learning_rate(step: int, steps: int) -> float:
    """A part of the highest."""
    falling = LOWEST_LR + (1 - LOWEST_LR) * (1 + math.cos(math.pi * step / steps)) / 2
    return min(1.0, (step + 1) / RISE) * falling


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, LR, betas=(0.9, 0.95), weight_decay=0.1)


def schedule(steps: int) -> Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]:
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))


def train(run: Run) -> dict[str, Any]:
    """The held-out loss over the steps, and the bytes that a worker sends."""
    torch.set_num_threads(1)
    way, began = WAYS[run.way], time.perf_counter()
    task = Task(run.text, width=WIDTH, batch_size=SEQUENCES)
    every = max(1, run.steps // LOOKS)
    if way.algorithm is None:
        curve, nbytes = dense(task, run, every)
    else:
        history = simulate(
            way.algorithm,
            make_model=lambda: task.model(run.seed),
            batches=lambda step: (task.batch(run.seed, step, 0).unflatten(0, (way.workers, -1)),),
            steps=run.steps,
            optimizer=adamw,
            scheduler=schedule(run.steps),
            loss=lambda model, batch: task.loss(model, batch[0]),
            evaluate=lambda model: {"held_out": task.held_out_loss(model)},
            evaluate_every=every,
            seed=run.seed,
        )
        curve = [[row["step"], row["held_out"]] for row in history.rows]
        nbytes = history.rows[-1]["bytes_sent"] / way.workers
    return {"loss": curve[-1][1], "bytes": nbytes, "curve": curve, "seconds": time.perf_counter() - began}


def dense(task: Task, run: Run, every: int) -> tuple[list[list[float]], float]:
    """As many steps on all the workers' sequences; the bytes are those of DDP, in fp32."""
    model = task.model(run.seed)
    optimizer = adamw(list(model.parameters()))
    scheduler, curve = schedule(run.steps)(optimizer), []
    for step in range(run.steps):
        optimizer.zero_grad()
        task.loss(model, task.batch(run.seed, step, 0)).backward()
        optimizer.step()
        scheduler.step()
        if (step + 1) % every == 0 or step + 1 == run.steps:
            curve.append([step + 1, task.held_out_loss(model)])
    return curve, 4.0 * run.steps * sum(each.numel() for each in model.parameters())


def summarised(runs: list[Run], results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found = {(run.way, run.seed): result for run, result in zip(runs, results, strict=True)}
    rows = {}
    for name in dict.fromkeys(run.way for run in runs):
        seeds = [run.seed for run in runs if run.way == name]
        percent = [100 * (found[name, seed]["loss"] / found["dense", seed]["loss"] - 1) for seed in seeds]
        algorithm = WAYS[name].algorithm
        rows[name] = {
            "label": WAYS[name].label,
            "algorithm": None if algorithm is None else algorithm.to_dict(),
            "workers": WAYS[name].workers,
            "losses": [found[name, seed]["loss"] for seed in seeds],
            "percent_above_dense": percent,
            "mean_percent_above_dense": mean(percent),
            "times_fewer_bytes": found["dense", seeds[0]]["bytes"] / found[name, seeds[0]]["bytes"],
            "curves": [found[name, seed]["curve"] for seed in seeds],
            "seconds": mean(found[name, seed]["seconds"] for seed in seeds),
        }
    return rows


def show(rows: dict[str, dict[str, Any]]) -> None:
    print("\n| | workers | loss | above dense (each seed) | within 1% | fewer bytes |")
    print("|---|---|---|---|---|---|")
    for row in rows.values():
        each = ", ".join(f"{percent:+.2f}" for percent in row["percent_above_dense"])
        above = row["mean_percent_above_dense"]
        print(
            f"| {row['label']} | {row['workers']} | {mean(row['losses']):.4f} | {above:+.2f}% ({each}) "
            f"| {'yes' if above <= TARGET_PERCENT else 'no'} | {row['times_fewer_bytes']:,.0f}x |"
        )


def plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Held-out loss over steps, a line per seed."""
    figure = load_matplotlib()(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for row, colour in zip(rows.values(), COLOURS, strict=False):
        for number, curve in enumerate(row["curves"]):
            steps, losses = zip(*curve, strict=True)
            axes.plot(steps, losses, color=colour, linewidth=0.9, label=None if number else row["label"])
    axes.set(xlabel="steps of each worker", ylabel="held-out loss, nats per character")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--text", type=Path, help="a file in place of the Bible")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time; no figure but seconds depends on it")
    parser.add_argument("--json", type=Path, help="also write the figures here, and a plot beside them")
    options = parser.parse_args()
    ways = ["dense", *(name for name in options.ways if name != "dense")]
    text = str(options.text.resolve()) if options.text else None
    runs = [
        Run(name, seed, options.steps, text)
        for name in ways
        for seed in range(min(options.seeds, WAYS[name].seeds or options.seeds))
    ]
    results = run_all(
        train, runs, options.processes, lambda run, found: f"{run.way}, seed {run.seed}: {found['loss']:.4f}"
    )
    rows = summarised(runs, results)
    show(rows)
    if options.json:
        write(options.json, options, {"ways": rows})
        plot(rows, options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()

"""Is the loss of local steps that of dense training, at equal samples? A small transformer, simulated, several seeds.

    python benchmarks/local_loss.py --json benchmarks/results/local_loss.json

The transformer of examples/internet_training.py, narrower, on the King James Bible (Debian's package bible-kjv). Four
workers of 8 sequences of 64 characters each take 400 steps of AdamW; dense training takes as many on all 32 sequences.
All begin with what 800 dense steps have made of a new model, as a training does that goes over to local steps when the
first, wild ones are done; "from scratch" without these, for 800 steps. `distopt.local.simulate` holds the workers in
one process; what they would send is encoded and decoded as on a link. Beside that 64 workers of one sequence, from the
same start, against dense training on all 64, for 100 steps.

The learning rate rises for 30 steps and falls along a cosine to a tenth. The highest is the best of four on seed 0,
once for dense training and once for workers (SparseLoCo, H = 5, k = 512), whose own gradients are noisier than the mean
of all. Loss is that of the model that all share, on held-out text, in nats per character; "above dense" is paired by
seed.

Limits: early in a training of a small model with small batches; the papers' are thousands of times as large.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from federated_jobs import run_all, write
from local_task import Task
from torch import Tensor, nn

from distopt.local import DiLoCo, LocalSteps, SparseLoCo, simulate
from distopt.plotting import COLOURS, load_matplotlib

WIDTH, SEQUENCES, WORKERS, STEPS = 64, 8, 4, 400
RATES = {"dense": (4e-3, 6e-3, 9e-3, 1.35e-2), "workers": (6e-3, 9e-3, 1.35e-2, 2e-2)}
BETA2 = {"dense": 0.95, "workers": 0.99}  # of AdamW; a worker's own gradients are noisier than the mean of all
SCRATCH_LR, LOWEST_LR, RISE = 6e-3, 0.1, 30
LOOKS = 8
TARGET_PERCENT = 1.0


@dataclass(frozen=True, kw_only=True)
class Way:
    """How workers train together.

    Attributes:
        label: In the table.
        algorithm: None for dense training on the sequences of all workers.
        base: The dense way to compare with.
        begins: The way whose model it begins with; None for a new one.
        workers: How many.
        sequences: Of each worker in a step.
        seeds: How many of the seeds are trained; None for all.
        steps_part: Of the steps.
    """

    label: str
    algorithm: LocalSteps | None = None
    base: str = "dense"
    begins: str | None = "scratch"
    workers: int = WORKERS
    sequences: int = SEQUENCES
    seeds: int | None = None
    steps_part: float = 1.0


def _sparse(inner_steps: int, k: int, **options: Any) -> SparseLoCo:
    return SparseLoCo(inner_steps=inner_steps, k=k, **options)


_DILOCO = DiLoCo(inner_steps=5, outer_lr=1.0, outer_momentum=0.0, nesterov=False)
_SCRATCH: dict[str, Any] = {"base": "scratch", "begins": None, "steps_part": 2.0}
_MANY: dict[str, Any] = {"base": "dense-64", "workers": 64, "sequences": 1, "seeds": 1, "steps_part": 0.25}

WAYS = {
    "scratch": Way(label="dense, from scratch", **_SCRATCH),
    "dense": Way(label="dense"),
    "sparse-2": Way(label="SparseLoCo, H = 2, k = 512", algorithm=_sparse(2, 512)),
    "sparse": Way(label="SparseLoCo, H = 5, k = 512", algorithm=_sparse(5, 512)),
    "sparse-64": Way(label="SparseLoCo, H = 5, k = 64", algorithm=_sparse(5, 64)),
    "diloco": Way(label="DiLoCo, H = 5, outer rate 1, no momentum", algorithm=_DILOCO),
    "diloco-default": Way(label="DiLoCo, H = 5, outer step as published", algorithm=DiLoCo(inner_steps=5), seeds=1),
    "sparse-16": Way(label="SparseLoCo, H = 16, k = 512", algorithm=_sparse(16, 512), seeds=1),
    "sparse-scratch": Way(
        label="SparseLoCo, H = 5, k = 512, from scratch", algorithm=_sparse(5, 512), seeds=1, **_SCRATCH
    ),
    "dense-64": Way(label="dense, 64 sequences", **_MANY),
    "sparse-64-workers": Way(label="SparseLoCo, H = 5, k = 512, 64 workers", algorithm=_sparse(5, 512), **_MANY),
}


@dataclass(frozen=True)
class Run:
    """All trainings of one seed, in the order in which they need each other."""

    seed: int
    ways: tuple[str, ...]
    steps: int
    text: str | None
    rates: tuple[tuple[str, float], ...]


def learning_rate(step: int, steps: int) -> float:
    """A part of the highest."""
    falling = LOWEST_LR + (1 - LOWEST_LR) * (1 + math.cos(math.pi * step / steps)) / 2
    return min(1.0, (step + 1) / RISE) * falling


def adamw(way: Way, lr: float) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    betas = (0.9, BETA2[_kind(way)])
    return lambda parameters: torch.optim.AdamW(parameters, lr, betas=betas, weight_decay=0.1)


def _kind(way: Way) -> str:
    return "dense" if way.algorithm is None else "workers"


def schedule(steps: int) -> Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]:
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))


def train_all(run: Run) -> dict[str, dict[str, Any]]:
    """The ways' figures, for one seed."""
    torch.set_num_threads(1)
    models: dict[str, nn.Module] = {}
    return {name: train(run, name, models) for name in run.ways}


def best_rate(run: Run) -> tuple[float, list[float]]:
    """Of one kind, trained as the last way of the run: the learning rate of the least loss, and the loss of each."""
    torch.set_num_threads(1)
    models: dict[str, nn.Module] = {}
    *before, name = run.ways
    for each in before:
        train(run, each, models)
    kind = _kind(WAYS[name])
    losses = [train(replace(run, rates=((kind, lr),)), name, models)["loss"] for lr in RATES[kind]]
    return min(zip(losses, RATES[kind], strict=True))[1], losses


def train(run: Run, name: str, models: dict[str, nn.Module]) -> dict[str, Any]:
    """The held-out loss over the steps, and the bytes that a worker sends; its model is added to `models`."""
    way, began = WAYS[name], time.perf_counter()
    lr = SCRATCH_LR if name == "scratch" else dict(run.rates)[_kind(way)]
    make_optimizer = adamw(way, lr)
    task = Task(run.text, width=WIDTH, batch_size=way.workers * way.sequences)
    steps = max(1, round(way.steps_part * run.steps))
    every = max(1, steps // LOOKS)
    part = way.begins is not None  # other samples than the dense steps before it

    def sequences(step: int) -> Tensor:
        return task.batch(run.seed, step, int(part))

    def start() -> nn.Module:
        return copy.deepcopy(models[way.begins]) if way.begins is not None else task.model(run.seed)

    if way.algorithm is None:
        model, curve = dense(task, start(), sequences, make_optimizer, steps, every)
        nbytes = 4.0 * steps * sum(each.numel() for each in model.parameters())
    else:
        history = simulate(
            way.algorithm,
            make_model=start,
            batches=lambda step: (sequences(step).unflatten(0, (way.workers, -1)),),
            steps=steps,
            optimizer=make_optimizer,
            scheduler=schedule(steps),
            loss=lambda model, batch: task.loss(model, batch[0]),
            evaluate=lambda model: {"held_out": task.held_out_loss(model)},
            evaluate_every=every,
            seed=run.seed,
        )
        model, curve = history.model, [[row["step"], row["held_out"]] for row in history.rows]
        nbytes = history.rows[-1]["bytes_sent"] / way.workers
    models[name] = model
    seconds = time.perf_counter() - began
    print(f"  seed {run.seed}, {way.label}, {lr:g}: {curve[-1][1]:.4f} in {seconds:.0f} s", flush=True)
    return {"loss": curve[-1][1], "bytes": nbytes, "curve": curve, "seconds": seconds}


def dense(
    task: Task,
    model: nn.Module,
    sequences: Callable[[int], Tensor],
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    steps: int,
    every: int,
) -> tuple[nn.Module, list[list[float]]]:
    """As many steps on all the workers' sequences."""
    optimizer = make_optimizer(list(model.parameters()))
    scheduler, curve = schedule(steps)(optimizer), []
    for step in range(steps):
        optimizer.zero_grad()
        task.loss(model, sequences(step)).backward()
        optimizer.step()
        scheduler.step()
        if (step + 1) % every == 0 or step + 1 == steps:
            curve.append([step + 1, task.held_out_loss(model)])
    return model, curve


def summarised(results: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    rows = {}
    for name in results[0]:
        way, each = WAYS[name], [found for found in results if name in found]
        percent = [100 * (found[name]["loss"] / found[way.base]["loss"] - 1) for found in each]
        rows[name] = {
            "label": way.label,
            "algorithm": None if way.algorithm is None else way.algorithm.to_dict(),
            "workers": way.workers,
            "losses": [found[name]["loss"] for found in each],
            "percent_above_dense": percent,
            "mean_percent_above_dense": mean(percent),
            "times_fewer_bytes": each[0][way.base]["bytes"] / max(1.0, each[0][name]["bytes"]),
            "curves": [found[name]["curve"] for found in each],
            "seconds": mean(found[name]["seconds"] for found in each),
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
    shown = [
        row for name, row in rows.items() if name in ("dense", "diloco", "sparse-2", "sparse", "sparse-64", "sparse-16")
    ]
    for row, colour in zip(shown, COLOURS, strict=False):
        for number, curve in enumerate(row["curves"]):
            steps, losses = zip(*curve, strict=True)
            axes.plot(steps, losses, color=colour, linewidth=0.9, label=None if number else row["label"])
    axes.set(xlabel="steps of each worker", ylabel="held-out loss, nats per character")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--text", type=Path, help="a file in place of the Bible")
    parser.add_argument("--processes", type=int, default=2, help="seeds at a time; no figure but seconds depends on it")
    parser.add_argument("--json", type=Path, help="also write the figures here, and a plot beside them")
    options = parser.parse_args()
    text = str(options.text.resolve()) if options.text else None
    tried = [Run(0, ("scratch", name), options.steps, text, ()) for name in ("dense", "sparse")]
    found = run_all(best_rate, tried, options.processes, lambda run, best: f"{run.ways[-1]}: {best[0]:g}")
    rates = tuple(zip(RATES, (lr for lr, _ in found), strict=True))
    runs = [
        Run(
            seed,
            tuple(name for name, way in WAYS.items() if seed < (way.seeds or options.seeds)),
            options.steps,
            text,
            rates,
        )
        for seed in range(options.seeds)
    ]
    rows = summarised(run_all(train_all, runs, options.processes, lambda run, _: f"seed {run.seed}"))
    show(rows)
    if options.json:
        tuning = {
            kind: dict(zip(RATES[kind], losses, strict=True)) for kind, (_, losses) in zip(RATES, found, strict=True)
        }
        write(options.json, options, {"rates": dict(rates), "losses_of_rates": tuning, "ways": rows})
        plot(rows, options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()

"""How many rounds, and how long, to an accuracy: small, large and growing batches, dense and with DGC.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 4 benchmarks/batch_fashion.py --results benchmarks/results

A network of two hidden layers on Fashion-MNIST, SGD with momentum 0.9. Each contender trains with every seed until the
test accuracy, looked at every 3,000 samples or each larger step, has been at the target three times in a row, or for
--epochs epochs. A round is a step of the optimizer: one exchange of gradients over all ranks. The ranks are real
processes; as they share the machine's cores and its memory is the link, the time on hosts with a core and a link of
their own is modelled beside the measured one: the seconds of a forward and backward pass and a step of one rank alone,
by size of its batch, plus the bytes that the collectives put on the link over its rate, plus its latency times the
messages that follow each other. Evaluations count for neither. Writes batch_fashion.json and, where matplotlib is
installed, batch_fashion.png.

Limits: one machine; nothing of the exchange is hidden in the model of the time. The learning rates were chosen by a
grid for seed 0, see docs/batch.md.
"""

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import distopt
from distopt.batch import GrowingBatchSampler
from distopt.cli import datasets
from distopt.cli.machine import machine, versions
from distopt.cli.models import MLP
from distopt.plotting import COLOURS, load_matplotlib

SMALL, LARGE = 64, 2048  # samples of a step, over all ranks
LR = {"small": 0.02, "large": 0.2, "norm": 0.05, "augmented": 0.05}
GROWING = {"max_batch": LARGE, "max_accumulation": 1, "every": 10}  # memory is no limit here
BATCHES = {
    "small": None,
    "large": None,
    "norm": distopt.AdaptiveBatch(test="norm", eta=0.3, **GROWING),
    "augmented": distopt.AdaptiveBatch(test="augmented", theta=0.3, nu=1.0, **GROWING),
}
LINKS = {"dense": distopt.Dense(), "dgc": distopt.DGC(density=0.01)}
LABELS = {
    "small": f"fixed, {SMALL}",
    "large": f"fixed, {LARGE}",
    "norm": "growing, norm test",
    "augmented": "growing, augmented test",
}
EVERY = 3_000  # samples from one look at the accuracy to the next
IN_A_ROW = 3


class Images(Dataset):
    """Images by number, a whole micro-batch at a time."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(indices)
        return self.images[chosen], self.labels[chosen]


def as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Each rank judges its share; all get the same."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with torch.no_grad():
        correct = (model(images[rank::ranks]).argmax(1) == labels[rank::ranks]).sum().double()
    dist.all_reduce(correct)
    return float(correct) / len(labels)


def compute_seconds(data: datasets.Dataset) -> dict[int, float]:
    """Seconds of a step of one rank alone, by the samples of its batch; measured on rank 0 while the others wait."""
    found = {}
    if dist.get_rank() == 0:
        model = MLP().build(data.shape, data.num_classes)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        for samples in (1, 16, 64, 256, 1024, 4096):
            seconds = []
            for _ in range(12):
                began = time.perf_counter()
                optimizer.zero_grad()
                cross_entropy(model(data.train_images[:samples]), data.train_labels[:samples]).backward()
                optimizer.step()
                seconds.append(time.perf_counter() - began)
            found[samples] = statistics.median(seconds[2:])
    told = [found]
    dist.broadcast_object_list(told)
    return told[0]


def train(batches: str, link: str, seed: int, data: datasets.Dataset, options: argparse.Namespace) -> dict[str, Any]:
    """One training; its curve, and where it reached the target."""
    ranks = dist.get_world_size()
    torch.manual_seed(seed)
    model = DistributedDataParallel(MLP().build(data.shape, data.num_classes))
    optimizer = torch.optim.SGD(model.parameters(), options.lr or LR[batches], momentum=0.9)
    train_set = Images(data.train_images, data.train_labels)
    start = LARGE if batches == "large" else SMALL
    sampler = GrowingBatchSampler(train_set, batch_size=start // ranks, seed=seed)
    loader = DataLoader(train_set, batch_sampler=sampler, collate_fn=as_it_is)
    attachment = LINKS[link].attach(model, optimizer)
    algorithm = BATCHES[batches]
    controller = None if algorithm is None else algorithm.attach(model, optimizer, loader, beside=attachment)

    def steps() -> Any:
        if controller is not None:
            return controller.steps()
        return ((batch,) for batch in loader)

    curve: list[dict[str, Any]] = []
    seconds = computing = 0.0
    samples = rounds = above = 0
    look_at = EVERY
    while samples < options.epochs * len(train_set) and above < IN_A_ROW:
        model.train()
        dist.barrier()
        began = time.perf_counter()
        for micro_batches in steps():
            own = 0
            for inputs, targets in micro_batches:
                loss = cross_entropy(model(inputs), targets)
                loss.backward() if controller is None else controller.backward(loss)
                own += len(targets)
            optimizer.step()
            optimizer.zero_grad()
            rounds += 1
            samples += own * ranks  # ranks may differ by a sample in the last step of an epoch
            computing += float(np.interp(own, options.sizes, options.seconds))
            if samples >= look_at:
                look_at = samples + EVERY
                seconds += time.perf_counter() - began
                reached = accuracy(model, data.test_images, data.test_labels)
                above = above + 1 if reached >= options.target else 0
                linked = on_the_link(attachment.stats(), controller, rounds, ranks, options)
                curve.append(
                    {
                        "samples": samples,
                        "rounds": rounds,
                        "accuracy": reached,
                        "batch": sampler.batch_size,
                        "noise_scale": None if controller is None else controller.noise_scale,
                        "seconds": seconds,
                        "modelled_seconds": computing + linked,
                    }
                )
                if above >= IN_A_ROW or samples >= options.epochs * len(train_set):
                    break
                dist.barrier()
                began = time.perf_counter()
        else:
            seconds += time.perf_counter() - began
    stats = attachment.stats()
    result = {
        "batches": batches,
        "link": link,
        "seed": seed,
        "reached": curve[-1] if above >= IN_A_ROW else None,
        "best_accuracy": max(point["accuracy"] for point in curve),
        "bytes_sent": stats["bytes_sent"],
        "saving": stats["bytes_dense"] / stats["bytes_sent"],
        "curve": curve,
    }
    if controller is not None:
        result["tests"] = {
            name: controller.stats()[name] for name in ("tests", "grown", "bytes_sent", "seconds_testing")
        }
        controller.detach()
    attachment.detach()
    return result


def on_the_link(stats: dict[str, Any], controller: Any, rounds: int, ranks: int, options: argparse.Namespace) -> float:
    """Modelled seconds that a rank's bytes are on a link of its own, one message after the other."""
    tests = controller.stats() if controller is not None else {"bytes_sent": 0, "tests": 0}
    in_bytes = stats["link_bytes_sent"] + 2 * (ranks - 1) / ranks * tests["bytes_sent"]
    messages = 2 * (ranks - 1) * (rounds + tests["tests"])  # of a ring
    return 8e-6 * in_bytes / options.mbit + 1e-3 * options.latency_ms * messages


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the seeds, of those that reached the target."""
    summary = {}
    for batches in BATCHES:
        for link in LINKS:
            own = [run for run in runs if (run["batches"], run["link"]) == (batches, link)]
            there = [run["reached"] for run in own if run["reached"]]
            if own:
                summary[f"{batches}-{link}"] = {
                    "reached": f"{len(there)} of {len(own)}",
                    **{
                        name: statistics.median(each[name] for each in there) if there else None
                        for name in ("rounds", "samples", "seconds", "modelled_seconds")
                    },
                    "best_accuracy": statistics.median(run["best_accuracy"] for run in own),
                    "saving": statistics.median(run["saving"] for run in own),
                }
    return summary


def table(summary: dict[str, Any], target: float, mbit: float) -> str:
    lines = [
        f"| batch | gradients | reached {target:.1%} | rounds | samples | measured s | s at {mbit:g} Mbit/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, figures in summary.items():
        batches, _, link = name.rpartition("-")
        cells = [LABELS[batches], "dense" if link == "dense" else f"DGC, {figures['saving']:.0f}x fewer bytes"]
        cells += [figures["reached"]]
        cells += [
            "-" if figures[key] is None else f"{figures[key]:,.{digits}f}"
            for key, digits in (("rounds", 0), ("samples", 0), ("seconds", 1), ("modelled_seconds", 1))
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]], target: float, path: Path) -> None:
    """Accuracy, batch and noise scale over samples, a line per seed; accuracy over rounds."""
    figure = load_matplotlib()(figsize=(10, 7.5), layout="constrained")
    panels = figure.subplots(2, 2)
    wanted = (
        ("samples", "accuracy", "test accuracy", "linear"),
        ("rounds", "accuracy", "test accuracy", "log"),
        ("samples", "batch", "samples of a step", "linear"),
        ("samples", "noise_scale", "noise scale, samples", "linear"),
    )
    for axes, (x, y, label, scale) in zip(panels.flat, wanted, strict=True):
        for run in runs:
            points = [point for point in run["curve"] if point[y] is not None and np.isfinite(point[y])]
            if points:
                axes.plot(
                    [point[x] for point in points], [point[y] for point in points],
                    color=COLOURS[1 + list(BATCHES).index(run["batches"])],
                    linestyle="-" if run["link"] == "dense" else ":", alpha=0.7,
                    label=f"{LABELS[run['batches']]}, {run['link']}" if run["seed"] == 0 else None,
                )  # fmt: skip
        axes.set(xlabel=x, ylabel=label, xscale=scale)
        if y == "accuracy":
            axes.set_ylim(bottom=0.7)
            axes.axhline(target, color=COLOURS[0], linewidth=0.8)
        else:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="as distopt compare takes it; default: Fashion-MNIST if it is installed")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ...")
    parser.add_argument("--epochs", type=float, default=8.0, help="most that a training may take")
    parser.add_argument("--target", type=float, default=0.85, help="test accuracy to be reached")
    parser.add_argument("--batches", nargs="+", choices=list(BATCHES), default=list(BATCHES))
    parser.add_argument("--links", nargs="+", choices=list(LINKS), default=list(LINKS))
    parser.add_argument("--lr", type=float, help="in place of the learning rates that were chosen")
    parser.add_argument("--mbit", type=float, default=100.0, help="rate of the modelled links, Mbit/s")
    parser.add_argument("--latency-ms", type=float, default=0.5, help="of the modelled links")
    parser.add_argument("--results", type=Path, default=Path("runs/batch_fashion"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    data = datasets.load(options.data)
    first = dist.get_rank() == 0
    alone = compute_seconds(data)
    options.sizes, options.seconds = list(alone), list(alone.values())
    runs = []
    began = time.perf_counter()
    for seed in range(options.seeds):
        for batches in options.batches:
            for link in options.links:
                runs.append(run := train(batches, link, seed, data, options))
                if first:
                    said = run["reached"] or run["curve"][-1]
                    print(
                        f"{time.perf_counter() - began:5.0f} s  seed {seed}  {LABELS[batches]:24} {link:5} "
                        f"{'reached' if run['reached'] else 'MISSED'}: best {run['best_accuracy']:.3f}, "
                        f"{said['rounds']:,} rounds, {said['samples']:,} samples, {said['seconds']:.1f} s, "
                        f"modelled {said['modelled_seconds']:.1f} s, batch {said['batch']}, "
                        f"noise scale {said['noise_scale'] or math.nan:.0f}",
                        flush=True,
                    )
    if first:
        summary = summarise(runs)
        print(table(summary, options.target, options.mbit))
        options.results.mkdir(parents=True, exist_ok=True)
        content = {
            "command": shlex.join(["torchrun", "--nproc-per-node", str(dist.get_world_size()), *sys.argv]),
            "data": data.name,
            "ranks": dist.get_world_size(),
            "parameters": sum(p.numel() for p in MLP().build(data.shape, data.num_classes).parameters()),
            "target": options.target,
            "learning_rates": LR if options.lr is None else options.lr,
            "configurations": {name: made.to_dict() for name, made in BATCHES.items() if made is not None},
            "links": {name: made.to_dict() for name, made in LINKS.items()},
            "modelled_link": {"mbit": options.mbit, "latency_ms": options.latency_ms},
            "step_seconds_alone": alone,
            "machine": machine(),
            "versions": versions(),
            "summary": summary,
            "runs": runs,
        }
        (options.results / "batch_fashion.json").write_text(json.dumps(content, indent=1) + "\n")
        try:
            plot(runs, options.target, options.results / "batch_fashion.png")
        except distopt.CompatibilityError as error:
            print(error)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

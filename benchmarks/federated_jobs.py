"""What the benchmarks of the federated algorithms have in common: models, accuracy, runs side by side, and the JSON.

Every run is a process of its own with one thread, so neither the number of runs at a time nor the machine's load
changes a figure: the same seed gives the same history.
"""

import argparse
import json
import multiprocessing
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from compress import commit
from distopt.cli import datasets
from distopt.cli.machine import machine, versions
from distopt.federated import History

Job = TypeVar("Job")
Result = TypeVar("Result")


def arguments(description: str, *, processes: int = 2) -> argparse.ArgumentParser:
    """The options that all of them have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=processes, help="runs at a time")
    parser.add_argument("--mode", default="auto", help="of distopt's Simulation")
    parser.add_argument("--quick", action="store_true", help="a few rounds of everything, to see that it works")
    parser.add_argument("--json", type=Path, help="where to write the figures, and a plot beside them")
    return parser


def mlp(inputs: int, hidden: int, classes: int, seed: int) -> nn.Module:
    """One hidden layer."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def group_norm_cnn(channels: int, classes: int, seed: int) -> nn.Module:
    """Two convolutions of stride 2 (5x5 and 3x3), each with GroupNorm of 4 groups, and a linear layer; for 28x28."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, channels, 5, stride=2, padding=2), nn.GroupNorm(4, channels), nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1), nn.GroupNorm(4, 2 * channels), nn.ReLU(),
        nn.Flatten(), nn.Linear(2 * channels * 49, classes),
    )  # fmt: skip


@lru_cache
def load(name: str | None) -> datasets.Dataset:
    """See `datasets.load`; once in each process."""
    return datasets.load(name)


def test_accuracy(data: datasets.Dataset) -> Callable[[nn.Module], Mapping[str, float]]:
    """What a Simulation evaluates: the share of all test samples that a model gets right."""

    def evaluate(model: nn.Module) -> Mapping[str, float]:
        parts = zip(data.test_images.split(1000), data.test_labels.split(1000), strict=True)
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in parts)
        return {"accuracy": right / len(data.test_labels)}

    return evaluate


def training_tensors(data: datasets.Dataset) -> tuple[Tensor, Tensor]:
    return data.train_images, data.train_labels


def late_accuracy(history: History, rounds: int) -> float:
    """The mean over the evaluations in the last tenth of the rounds."""
    return statistics.mean(value for number, value in history.column("accuracy") if number > 0.9 * rounds)


def run_all(
    train: Callable[[Job], Result], jobs: Sequence[Job], processes: int, say: Callable[[Job, Result], str]
) -> list[Result]:
    """The result of each job, in their order, `processes` at a time; prints what `say` makes of each."""
    began = time.perf_counter()
    results = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for job, result in zip(jobs, pool.map(train, jobs), strict=True):
            results.append(result)
            passed = time.perf_counter() - began
            print(f"{passed:6.0f} s  {len(results)}/{len(jobs)}  {say(job, result)}", flush=True)
    return results


def mean_and_spread(values: Sequence[float], unit: float = 100.0, digits: int = 2) -> str:
    """ "mean ± standard deviation" of values times `unit`."""
    spread = f" ± {unit * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{unit * statistics.mean(values):.{digits}f}{spread}"


_INNERMOST = re.compile(r"\[[^\[\]{}]*\]")  # lists of numbers, which stand on a line each: there are thousands


def write(path: Path, options: argparse.Namespace, content: Mapping[str, Any]) -> None:
    """The figures, with what they depend on."""
    header = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "options": {name: value for name, value in vars(options).items() if name != "json"},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**header, **content}, indent=1)
    path.write_text(_INNERMOST.sub(lambda found: " ".join(found[0].split()), text) + "\n")

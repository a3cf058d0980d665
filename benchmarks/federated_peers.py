"""Seconds per round, start-up, memory and accuracy of distopt's simulation beside pfl, flwr and a plain torch loop.

    python benchmarks/federated_peers.py --tasks linear --json benchmarks/results/federated_peers_linear.json

Three tasks on Fashion-MNIST, 1,000 clients of 60 samples each, drawn at random, FedAvg with plain SGD, one local epoch
in batches of 10. *linear*: 10 clients per round, one linear layer of 784x10 and BatchNorm. *cnn*: 100 clients per
round, two convolutions of 8 and 16 channels and one linear layer, 9,098 parameters, as one writes it. *large cnn*: 16
and 32 channels and two linear layers, 206,922 parameters, converted to the channels-last layout, which is faster on a
CPU for the others. All systems get the same data, the same clients, the same initial parameters and the same
hyperparameters; each draws its own cohorts and batches.

Each system runs in a process and an environment of its own (federated_systems/), pinned to one core and to two; where
there are two ways to use two cores, threads and processes, both are measured. The systems take turns; the seconds per
round are the median over the rounds but the first, then the median over the repeats (each with another seed), and the
ratios are of those. Start-up counts from the start of the process to the end of the first round, imports included.
Memory is the largest sum, over the processes of a system, of the proportional set size, in a run of its own.

The environments of the peers are made with venv and pip in --peers-env where they are missing (minutes).
"""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from compress import commit
from distopt.cli import datasets
from distopt.cli.machine import machine, versions

WORKERS = Path(__file__).parent / "federated_systems"
DEADLINE_S = 900
OWN = "distopt"  # the environment that runs this script
PACKAGES = {"pfl": "pfl[pytorch]==0.6.0", "flwr": "flwr[simulation]==1.41.0"}
TASKS: dict[str, dict[str, Any]] = {
    "linear": {"clients_per_round": 10, "batch_size": 10, "lr": 0.1, "rounds": 100},
    "cnn": {"clients_per_round": 100, "batch_size": 10, "lr": 0.05, "rounds": 8},
    "large cnn": {"clients_per_round": 100, "batch_size": 10, "lr": 0.05, "rounds": 6},
}
FLWR_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True, kw_only=True)
class System:
    """One way to run one of the systems."""

    label: str
    worker: str
    environment: str = OWN
    threads: int = 1
    ranks: int = 1  # under torchrun
    actors: int = 1  # of flwr
    mode: str = "auto"  # of distopt's Simulation
    tasks: tuple[str, ...] = tuple(TASKS)


def systems(cores: int, mode: str) -> list[System]:
    """All ways to use so many cores; distopt's come first."""
    found = [System(label="distopt", worker="distopt", threads=cores, mode=mode)]
    if cores > 1:
        found += [System(label=f"distopt, {cores} processes", worker="distopt", ranks=cores)]
    found += [System(label="torch loop", worker="naive", threads=cores)]
    found += [System(label="pfl", worker="pfl", environment="pfl", threads=cores)]
    if cores > 1:
        found += [System(label=f"pfl, {cores} processes", worker="pfl", environment="pfl", ranks=cores)]
    return [*found, System(label="flwr", worker="flwr", environment="flwr", actors=cores, tasks=("linear",))]


# -- environments ------------------------------------------------------------------------------------------------------


def make_environments(folder: Path) -> dict[str, Path]:
    """The interpreter of each environment; those that are missing are made, with distopt's version of torch."""
    interpreters = {OWN: Path(sys.executable)}
    for name, package in PACKAGES.items():
        interpreters[name] = folder / name / "bin" / "python"
        done = folder / name / "installed"
        if done.exists() and done.read_text() == package:
            continue
        print(f"installing {package} in {folder / name}", flush=True)
        venv.create(folder / name, with_pip=True)
        pip = [str(interpreters[name]), "-m", "pip", "--disable-pip-version-check"]
        for wanted in (f"torch=={torch.__version__.partition('+')[0]}", package):
            subprocess.run([*pip, "install", "-q", wanted], check=True)
        subprocess.run([*pip, "check"], check=True)
        done.write_text(package)
    return interpreters


def versions_in(interpreter: Path, names: tuple[str, ...]) -> dict[str, str | None]:
    program = (
        "import importlib.metadata as m, json, sys\n"
        "def of(name):\n"
        "    try: return m.version(name)\n"
        "    except m.PackageNotFoundError: return None\n"
        "print(json.dumps({name: of(name) for name in sys.argv[1:]}))"
    )
    said = subprocess.run([str(interpreter), "-c", program, *names], capture_output=True, text=True, check=True)
    return json.loads(said.stdout)


# -- one run -----------------------------------------------------------------------------------------------------------


def run(system: System, task: dict[str, Any], interpreter: Path, cores: int, watch: Callable[[int], None]) -> dict:
    """What the worker reports; `watch` is called with its process id while it runs."""
    with tempfile.TemporaryDirectory() as folder:
        description = Path(folder) / "task.json"
        description.write_text(json.dumps({**task, "mode": system.mode, "processes": system.actors}))
        command = [str(interpreter)]
        if system.ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={system.ranks}"]
        command += [str(WORKERS / f"{system.worker}_worker.py"), str(description)]
        paths = [str(WORKERS), str(WORKERS.parents[1])] if system.environment == OWN else [str(WORKERS)]
        environment = {
            **os.environ,
            **FLWR_QUIET,
            "FLWR_HOME": folder,
            "PYTHONPATH": os.pathsep.join(paths),  # Ray's actors import task.py too
            "OMP_NUM_THREADS": str(system.threads),
            "FEDERATED_STARTED_AT": repr(time.time()),
        }
        chosen = sorted(os.sched_getaffinity(0))[:cores]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, chosen),
        ) as process:  # fmt: skip
            watcher = threading.Thread(target=watch, args=(process.pid,))
            watcher.start()
            try:
                said, errors = process.communicate(timeout=DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.terminate()
                raise
            finally:
                watcher.join()
        reports = [line for line in said.splitlines() if line.startswith('{"import_s"')]
        if len(reports) != 1:  # what happens at a process's end, after its report, changes no figure
            raise SystemExit(f"{system.label} failed:\n{said}{errors}")
        return json.loads(reports[0])


def do_not_watch(pid: int) -> None:
    """Watching costs time."""


class MemoryWatch:
    """The largest sum of the proportional set sizes of a process and all below it, looked at every 0.1 s."""

    def __init__(self) -> None:
        self.peak_bytes = 0

    def __call__(self, pid: int) -> None:
        while tree := [found for each in self._tree(pid) if (found := self._pss_bytes(each)) is not None]:
            self.peak_bytes = max(self.peak_bytes, sum(tree))
            time.sleep(0.1)

    def _tree(self, pid: int) -> list[int]:
        found = [pid]
        try:
            for thread in Path(f"/proc/{pid}/task").iterdir():
                for child in (thread / "children").read_text().split():
                    found += self._tree(int(child))
        except OSError:  # it has ended
            pass
        return found

    def _pss_bytes(self, pid: int) -> int | None:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            return None
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), None)


# -- all runs ----------------------------------------------------------------------------------------------------------


def write_data(folder: Path, seed: int) -> str:
    """Puts the arrays of `federated_systems/task.py` there; the name of the data set."""
    data = datasets.load(None)
    if data.shape != (1, 28, 28):
        raise SystemExit("this benchmark needs Fashion-MNIST, on Debian the package dataset-fashion-mnist")
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        np.save(folder / f"{name}.npy", getattr(data, name).numpy())
    samples = np.random.default_rng(seed).permutation(len(data.train_labels))
    np.save(folder / "parts.npy", samples.reshape(1000, -1))
    return data.name


def measure(name: str, options: argparse.Namespace, interpreters: dict[str, Path], folder: Path) -> list[dict]:
    """The rows of a task."""
    rows = []
    settings = {**TASKS[name], "folder": str(folder), "model": name}
    settings["rounds"] = options.rounds or settings["rounds"]
    for cores in options.cores:
        chosen = [each for each in systems(cores, options.mode) if name in each.tasks]
        reports: dict[str, list[dict]] = {each.label: [] for each in chosen}
        peaks = {}
        for seed in range(options.repeats):
            for each in chosen:
                interpreter = interpreters[each.environment]
                reports[each.label].append(run(each, {**settings, "seed": seed}, interpreter, cores, do_not_watch))
                print(f"{name}, {cores} cores, {each.label}, seed {seed}: {said(reports[each.label][-1])}", flush=True)
        for each in chosen:
            watch = MemoryWatch()
            short = {**settings, "seed": 0, "rounds": min(3, settings["rounds"])}
            run(each, short, interpreters[each.environment], cores, watch)
            peaks[each.label] = watch.peak_bytes
        rows += summarise(name, cores, reports, peaks)
    return rows


def said(report: dict) -> str:
    return f"{1e3 * statistics.median(report['rounds_s']):.1f} ms per round, accuracy {report['accuracy']:.2%}"


def summarise(task: str, cores: int, reports: dict[str, list[dict]], peaks: dict[str, int]) -> list[dict]:
    base = [report["accuracy"] for report in reports["torch loop"]]
    rows = []
    for label, runs in reports.items():
        per_round = [statistics.median(report["rounds_s"]) for report in runs]
        accuracies = [report["accuracy"] for report in runs]
        rows.append(
            {
                "task": task,
                "cores": cores,
                "system": label,
                "round_s": statistics.median(per_round),
                "round_s_of_repeats": per_round,
                "import_s": statistics.median(report["import_s"] for report in runs),
                "start_s": statistics.median(report["start_s"] for report in runs),
                "peak_bytes": peaks[label],
                "accuracies": accuracies,
                "accuracy": statistics.mean(accuracies),
                "accuracy_minus_loop": statistics.mean(accuracies) - statistics.mean(base),
                "standard_error": standard_error(accuracies, base),
            }
        )
    own = [row["round_s"] for row in rows if row["system"].startswith(OWN)]
    return [row | {"ratio_to_distopt": row["round_s"] / min(own)} for row in rows]


def standard_error(some: list[float], others: list[float]) -> float | None:
    """Of the difference of two means."""
    if min(len(some), len(others)) < 2:
        return None
    return math.sqrt(statistics.variance(some) / len(some) + statistics.variance(others) / len(others))


def show(rows: list[dict], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for heading in ("task", "cores", "system", "ms per round", "x distopt", "import s", "to end of round 1, s", "MB"):
        table.add_column(heading, justify="left" if heading in ("task", "system") else "right")
    table.add_column("accuracy, minus loop", justify="right")
    for row in rows:
        error = "" if row["standard_error"] is None else f" ± {100 * row['standard_error']:.2f}"
        table.add_row(
            row["task"], str(row["cores"]), row["system"], f"{1e3 * row['round_s']:.1f}",
            f"{row['ratio_to_distopt']:.2f}", f"{row['import_s']:.1f}", f"{row['start_s']:.1f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{100 * row['accuracy']:.2f}%, {100 * row['accuracy_minus_loop']:+.2f}{error}",
        )  # fmt: skip
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=list(TASKS))
    parser.add_argument("--cores", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--rounds", type=int, help=f"default: { {name: each['rounds'] for name, each in TASKS.items()} }"
    )
    parser.add_argument("--mode", default="auto", help="of distopt's Simulation where it is one process")
    parser.add_argument("--peers-env", type=Path, default=Path("runs/peers"), help="folder of the peers' environments")
    parser.add_argument("--quick", action="store_true", help="one repeat of 3 rounds, to see that everything works")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.rounds = 1, 3
    interpreters = make_environments(options.peers_env.resolve())
    with tempfile.TemporaryDirectory() as folder:
        name = write_data(Path(folder), seed=0)
        rows: list[dict] = []
        for task in options.tasks:
            rows += measure(task, options, interpreters, Path(folder))
            show(rows, f"{name}, 1,000 clients of 60 samples, median of {options.repeats}")
            if options.json:  # after each task: a system that fails later does not take everything with it
                write(options, name, interpreters, rows)


def write(options: argparse.Namespace, data: str, interpreters: dict[str, Path], rows: list[dict]) -> None:
    content = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "data": data,
        "tasks": {each: {**TASKS[each], "rounds": options.rounds or TASKS[each]["rounds"]} for each in options.tasks},
        "repeats": options.repeats,
        "mode": options.mode,
        "machine": machine(),
        "versions": versions()
        | {each: versions_in(interpreters[each], ("torch", "numpy", each, "ray")) for each in PACKAGES},
        "rows": rows,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

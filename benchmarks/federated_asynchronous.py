"""What not waiting for slow clients saves, and what it costs: accuracy over virtual time.

    python benchmarks/federated_asynchronous.py --json benchmarks/results/federated_asynchronous.json

Fashion-MNIST, 25 clients of 2,400 samples each whose labels are draws of Dir(0.1), all at work all the time, an MLP
784-64-10, 10 local steps in batches of 32. The fastest client takes 0.2 virtual seconds for them, the slowest 5 and 50
times as much, those between linearly more. So who forgets the slow clients forgets labels.

Synchronous FedAvg waits for the slowest. FedFix, FedBuff and asynchronous FedAvg with unbiased weights are told the
clients' times or ("estimated") learn from who replies how often each does, by FedAU's estimator; FedBuff and FedAsync
as published discount old replies and lean towards the fast clients.

Each algorithm's rate and one parameter are chosen from four candidates by the mean accuracy over a shorter time with a
seed that is not used again. Compared are, with the same virtual time for all, the late accuracy, the mean over the last
tenth of the time, and the virtual seconds to a target, the whole percent below synchronous FedAvg's mean late accuracy.
"""

import argparse
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federated_jobs import arguments, load, mean_and_spread, mlp, run_all, test_accuracy, training_tensors, write
from rich.console import Console
from rich.table import Table

from distopt.federated import (
    ClientData,
    ConstantDelays,
    DirichletPartition,
    FederatedAlgorithm,
    LocalTraining,
    Simulation,
)
from distopt.plotting import COLOURS, load_matplotlib

CLIENTS = 25
FASTEST_S = 0.2
SYNCHRONOUS = "FedAvg, synchronous"
SLOWEST = "times the slowest client's"  # in place of a number of seconds
TIMES = "those of the clients"  # in place of their list
RATES = (0.05, 0.1)


def grid(name: str, parameter: str, values: tuple[Any, ...], rates: tuple[float, ...] = RATES, **fixed: Any) -> list:
    """Each rate with each value of a parameter."""
    return [{"lr": lr, "algorithm": {"algorithm": name, parameter: value, **fixed}} for lr in rates for value in values]


INTERVALS = ({SLOWEST: 0.2}, {SLOWEST: 0.5})
GRID: dict[str, list[dict[str, Any]]] = {
    SYNCHRONOUS: [{"lr": lr, "algorithm": {"algorithm": "fedavg"}} for lr in (0.02, 0.05, 0.1, 0.2)],
    "FedFix": grid("fedfix", "interval_s", INTERVALS, times_s=TIMES),
    "FedFix, estimated": grid("fedfix", "interval_s", INTERVALS),
    "FedBuff": grid("fedbuff", "buffer_size", (5, 10)),
    "FedBuff, estimated": grid("fedbuff", "buffer_size", (10, 20), correction="participation"),
    "FedAvg, asynchronous": grid("async-fedavg", "server_lr", (0.1, 0.04), times_s=TIMES),
    "FedAsync": grid("fedasync", "mixing", (0.6, 0.2), rates=(0.1, 0.2)),
}
HELD_OUT_SEED = 1000
EVALUATIONS = 120  # at most, over the virtual time


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training."""

    method: str
    slowest: float
    seed: int
    seconds: float  # of virtual time
    candidate: int  # of the method's in GRID
    mode: str


def algorithm(description: dict[str, Any], delays: ConstantDelays) -> FederatedAlgorithm:
    """The algorithm, with numbers where the grid has SLOWEST and TIMES."""
    means = delays.begin(CLIENTS).mean_s
    given = dict(description)
    for key, value in description.items():
        if value == TIMES:
            given[key] = means.tolist()
        elif isinstance(value, dict):
            given[key] = value[SLOWEST] * float(means.max())
    return FederatedAlgorithm.from_dict(given)


def train(run: Run) -> dict[str, Any]:
    data, candidate = load(None), GRID[run.method][run.candidate]
    delays = ConstantDelays(mean_s=FASTEST_S, slowest=run.slowest)
    simulation = Simulation(
        model=mlp(data.train_images[0].numel(), 64, data.num_classes, run.seed),
        clients=ClientData.split(
            training_tensors(data), DirichletPartition(alpha=0.1, sizes="equal"), CLIENTS, seed=run.seed
        ),
        algorithm=algorithm(candidate["algorithm"], delays),
        local=LocalTraining(lr=candidate["lr"], batch_size=32, steps=10),
        delays=delays,
        seed=run.seed,
        mode=run.mode,
    )
    evaluate = test_accuracy(data)
    curve = [(0.0, evaluate(simulation.model)["accuracy"])]
    while curve[-1][0] < run.seconds:
        due = curve[-1][0] + run.seconds / EVALUATIONS
        while simulation.time_s < due:
            simulation.run(simulation.round + 1)
        curve.append((simulation.time_s, evaluate(simulation.model)["accuracy"]))
    replies = sum(len(row["participants"]) for row in simulation.history)
    return {
        "curve": curve,
        "mean_accuracy": mean_over_time(curve, 0.0, run.seconds),
        "late_accuracy": mean_over_time(curve, 0.9 * run.seconds, run.seconds),
        "rounds": simulation.round,
        "replies": replies,
        "mode": simulation.mode,
    }


def mean_over_time(curve: list[tuple[float, float]], begin_s: float, end_s: float) -> float:
    """Of the accuracy between two moments; a model is in force until the next one is there."""
    ends = [time_s for time_s, _ in curve[1:]] + [end_s]
    spans = [max(0.0, min(end_s, end) - max(begin_s, start)) for (start, _), end in zip(curve, ends, strict=True)]
    return sum(span * value for span, (_, value) in zip(spans, curve, strict=True)) / (end_s - begin_s)


def say(run: Run, result: dict[str, Any]) -> str:
    chosen = GRID[run.method][run.candidate]
    figures = f"{result['mean_accuracy']:.2%} on average, {result['late_accuracy']:.2%} at the end"
    return f"{run.slowest:g}x, {run.method} {chosen}, seed {run.seed}: {figures}"


def seconds(slowest: float, rounds: int) -> float:
    """The virtual time of so many rounds of synchronous FedAvg."""
    return FASTEST_S * slowest * rounds


def search(options: argparse.Namespace) -> dict[tuple[float, str], list[float]]:
    """The mean accuracy of each candidate with the held-out seed."""
    runs = [
        Run(
            method=name, slowest=slowest, seed=HELD_OUT_SEED, candidate=i, mode=options.mode,
            seconds=seconds(slowest, options.search_rounds),
        )
        for slowest in options.slowest
        for name, candidates in GRID.items()
        for i in range(len(candidates))
    ]  # fmt: skip
    found: dict[tuple[float, str], list[float]] = {}
    for run, result in zip(runs, run_all(train, runs, options.processes, say), strict=True):
        found.setdefault((run.slowest, run.method), []).append(result["mean_accuracy"])
    return found


def compare(options: argparse.Namespace, searched: dict[tuple[float, str], list[float]]) -> list[dict[str, Any]]:
    """A row per slowness, all methods with what was best for them."""
    best = {key: accuracies.index(max(accuracies)) for key, accuracies in searched.items()}
    runs = [
        Run(
            method=name, slowest=slowest, seed=seed, candidate=best[slowest, name], mode=options.mode,
            seconds=seconds(slowest, options.rounds),
        )
        for slowest in options.slowest
        for seed in range(options.seeds)
        for name in GRID
    ]  # fmt: skip
    results = list(zip(runs, run_all(train, runs, options.processes, say), strict=True))
    return [summarise(slowest, best, searched, results) for slowest in options.slowest]


def summarise(
    slowest: float,
    best: dict[tuple[float, str], int],
    searched: dict[tuple[float, str], list[float]],
    results: list[tuple[Run, dict[str, Any]]],
) -> dict[str, Any]:
    methods: dict[str, dict[str, Any]] = {}
    for name, candidates in GRID.items():
        found = [result for run, result in results if (run.slowest, run.method) == (slowest, name)]
        methods[name] = {
            "chosen": candidates[best[slowest, name]],
            "searched": [
                each | {"mean_accuracy": value} for each, value in zip(candidates, searched[slowest, name], strict=True)
            ],
            "late_accuracies": [each["late_accuracy"] for each in found],
            "rounds": [each["rounds"] for each in found],
            "replies": [each["replies"] for each in found],
            "curves": [each["curve"] for each in found],
        }
    target = math.floor(100 * statistics.mean(methods[SYNCHRONOUS]["late_accuracies"])) / 100
    for each in methods.values():
        each["seconds_to_target"] = [
            next((time_s for time_s, value in curve if value >= target), None) for curve in each["curves"]
        ]
    return {"slowest": slowest, "target": target, "mode": found[0]["mode"], "methods": methods}


def chosen(candidate: dict[str, Any]) -> str:
    """A candidate in a few words."""
    words = [f"lr {candidate['lr']:g}"]
    for key, value in candidate["algorithm"].items():
        if isinstance(value, dict):
            words.append(f"{key} {value[SLOWEST]:g} of the slowest")
        elif not isinstance(value, str):
            words.append(f"{key} {value:g}")
    return ", ".join(words)


def show(rows: list[dict[str, Any]], console: Console) -> None:
    for row in rows:
        title = f"the slowest takes {row['slowest']:g}x the fastest's time, target {row['target']:.0%}"
        table = Table(title=title, title_justify="left")
        for heading in ("method", "chosen"):
            table.add_column(heading)
        for heading in ("late accuracy, %", "virtual s to target", "x less than synchronous", "replies"):
            table.add_column(heading, justify="right")
        base = row["methods"][SYNCHRONOUS]["seconds_to_target"]
        for name, each in row["methods"].items():
            took = each["seconds_to_target"]
            ratios = [a / b for a, b in zip(base, took, strict=True) if a is not None and b is not None]
            table.add_row(
                name,
                chosen(each["chosen"]),
                mean_and_spread(each["late_accuracies"]),
                " ".join("-" if number is None else f"{number:.1f}" for number in took),
                f"{statistics.median(ratios):.1f}" if len(ratios) == len(took) else "-",
                f"{statistics.mean(each['replies']):.0f}",
            )
        console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Test accuracy over virtual time, a thin line per seed."""
    figure = load_matplotlib()(figsize=(6 * len(rows), 4.2), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        for (name, each), colour in zip(row["methods"].items(), COLOURS, strict=False):
            for seed, curve in enumerate(each["curves"]):
                times, values = zip(*curve, strict=True)
                label = None if seed else name
                axes.plot(times, [100 * value for value in values], color=colour, label=label, linewidth=0.8)
        axes.axhline(100 * row["target"], color="grey", linewidth=0.8, linestyle="dotted")
        top = 100 * max(max(each["late_accuracies"]) for each in row["methods"].values())
        title = f"Fashion-MNIST, slowest / fastest = {row['slowest']:g}"
        axes.set(title=title, xlabel="virtual seconds", ylim=(top - 30, top + 2))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="lower right", fontsize="small")
    figure.axes[0].set_ylabel("test accuracy, %")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--slowest", nargs="+", type=float, default=[5.0, 50.0], help="times the fastest's time")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=60, help="of synchronous FedAvg; all get the same virtual time")
    parser.add_argument("--search-rounds", type=int, default=20)
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.rounds, options.search_rounds = 1, 2, 1
    rows = compare(options, search(options))
    show(rows, Console(width=150))
    if options.json:
        settings = {"held_out_seed": HELD_OUT_SEED, "grid": GRID, "clients": CLIENTS, "fastest_s": FASTEST_S}
        write(options.json, options, {**settings, "rows": rows})
        plot(rows, options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()

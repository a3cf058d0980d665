"""FedSpeed beside FedAvg, FedProx, SCAFFOLD and FedDyn, where clients' labels differ and their models drift apart.

    python benchmarks/federated_drift.py --json benchmarks/results/federated_drift.json

Fashion-MNIST, 100 clients of 600 samples each whose labels are draws of Dir(0.1) and of Dir(0.6), 10 of them per round,
20 local steps in batches of 32, a net with GroupNorm of 9,274 parameters. As in the paper of FedSpeed the objective has
a weight decay of 1e-3, the rate shrinks by 0.998 per round, and gradients with their corrections are clipped to 10.

Each algorithm's rate and parameters are chosen from six candidates (GRID), for each Dirichlet parameter, by the late
accuracy of fewer rounds with a seed that is not used again. Then each is trained with several seeds, which decide
partition, initial model, cohorts and batches. What is compared, in pairs by seed: the late accuracy, the mean test
accuracy over the evaluations in the last tenth of the rounds; and the first evaluated round (every third one) whose
test accuracy reaches a target, the whole percent below FedAvg's mean late accuracy, so FedAvg gets there too.

FedSpeed is measured with both of its servers: the paper's, which adds the corrections of the clients that are there,
and that of a public simulator, which averages the corrections of all clients, as FedDyn's server does.

Limits: a small net and few rounds, to fit into half an hour on two cores; FedSpeed computes two gradients per step.
"""

import argparse
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federated_jobs import (
    arguments,
    group_norm_cnn,
    late_accuracy,
    load,
    mean_and_spread,
    run_all,
    test_accuracy,
    training_tensors,
    write,
)
from rich.console import Console
from rich.table import Table

from distopt.federated import (
    ClientData,
    DirichletPartition,
    FederatedAlgorithm,
    History,
    LocalTraining,
    Simulation,
    UniformSampling,
)
from distopt.plotting import COLOURS, load_matplotlib

FEDAVG, FEDSPEED = "FedAvg", "FedSpeed"
RATES = (0.05, 0.1, 0.2)


def grid(name: str, parameter: str, values: tuple[float, ...], **fixed: Any) -> list[dict[str, Any]]:
    """Each rate with each value of a parameter."""
    return [{"lr": lr, "algorithm": {"algorithm": name, parameter: value, **fixed}} for lr in RATES for value in values]


GRID: dict[str, list[dict[str, Any]]] = {
    FEDAVG: [{"lr": lr, "algorithm": {"algorithm": "fedavg"}} for lr in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)],
    "FedProx": grid("fedprox", "mu", (0.01, 0.1)),
    "SCAFFOLD": grid("scaffold", "server_lr", (1.0, 0.5)),
    "FedDyn": grid("feddyn", "alpha", (0.01, 0.1)),
    FEDSPEED: grid("fedspeed", "lambda_", (1.0, 10.0), rho=0.1),
    f"{FEDSPEED}, public simulator's server": grid(
        "fedspeed", "rho", (0.02, 0.1), lambda_=10.0, server="public-simulator"
    ),
}
ALPHAS = (0.1, 0.6)
HELD_OUT_SEED = 1000
WEIGHT_DECAY = 1e-3
EVALUATE_EVERY = 3


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training."""

    method: str
    alpha: float
    seed: int
    rounds: int
    candidate: int  # of the method's in GRID
    mode: str


def train(run: Run) -> dict[str, Any]:
    data, candidate = load(None), GRID[run.method][run.candidate]
    simulation = Simulation(
        model=group_norm_cnn(8, data.num_classes, run.seed),
        clients=ClientData.split(
            training_tensors(data), DirichletPartition(alpha=run.alpha, sizes="equal"), 100, seed=run.seed
        ),
        algorithm=FederatedAlgorithm.from_dict(candidate["algorithm"]),
        local=LocalTraining(
            lr=candidate["lr"], lr_decay=0.998, batch_size=32, steps=20, max_norm=10.0, weight_decay=WEIGHT_DECAY
        ),
        participation=UniformSampling(fraction=0.1),
        evaluate=test_accuracy(data),
        evaluate_every=EVALUATE_EVERY,
        seed=run.seed,
        mode=run.mode,
    )
    history = simulation.run(run.rounds)
    return {
        "late_accuracy": late_accuracy(history, run.rounds),
        "curve": [[round, value] for round, value in history.column("accuracy")],
        "mode": simulation.mode,
    }


def say(run: Run, result: dict[str, Any]) -> str:
    chosen = GRID[run.method][run.candidate]
    return f"Dir({run.alpha}), {run.method} {chosen}, seed {run.seed}: {result['late_accuracy']:.2%}"


def search(options: argparse.Namespace) -> dict[tuple[float, str], list[float]]:
    """The late accuracy of each candidate with the held-out seed."""
    runs = [
        Run(method=name, alpha=alpha, seed=HELD_OUT_SEED, rounds=options.search_rounds, candidate=i, mode=options.mode)
        for alpha in options.alphas
        for name, candidates in GRID.items()
        for i in range(len(candidates))
    ]
    found: dict[tuple[float, str], list[float]] = {}
    for run, result in zip(runs, run_all(train, runs, options.processes, say), strict=True):
        found.setdefault((run.alpha, run.method), []).append(result["late_accuracy"])
    return found


def compare(options: argparse.Namespace, searched: dict[tuple[float, str], list[float]]) -> list[dict[str, Any]]:
    """A row per Dirichlet parameter, all methods with what was best for them."""
    best = {key: accuracies.index(max(accuracies)) for key, accuracies in searched.items()}
    runs = [
        Run(method=name, alpha=alpha, seed=seed, rounds=options.rounds, candidate=best[alpha, name], mode=options.mode)
        for alpha in options.alphas
        for seed in range(options.seeds)
        for name in GRID
    ]
    results = list(zip(runs, run_all(train, runs, options.processes, say), strict=True))
    return [summarise(alpha, best, searched, results) for alpha in options.alphas]


def summarise(
    alpha: float,
    best: dict[tuple[float, str], int],
    searched: dict[tuple[float, str], list[float]],
    results: list[tuple[Run, dict[str, Any]]],
) -> dict[str, Any]:
    methods: dict[str, dict[str, Any]] = {}
    for name, candidates in GRID.items():
        found = [result for run, result in results if (run.alpha, run.method) == (alpha, name)]
        methods[name] = {
            "chosen": candidates[best[alpha, name]],
            "searched": [
                each | {"late_accuracy": value} for each, value in zip(candidates, searched[alpha, name], strict=True)
            ],
            "late_accuracies": [each["late_accuracy"] for each in found],
            "curves": [each["curve"] for each in found],
        }
    base = methods[FEDAVG]["late_accuracies"]
    target = math.floor(100 * statistics.mean(base)) / 100
    for each in methods.values():
        each["minus_fedavg_points"] = [100 * (a - b) for a, b in zip(each["late_accuracies"], base, strict=True)]
        each["rounds_to_target"] = [rounds_to(curve, target) for curve in each["curves"]]
    return {"alpha": alpha, "target": target, "mode": found[0]["mode"], "methods": methods}


def rounds_to(curve: list[list[float]], target: float) -> int | None:
    return History({"round": int(round), "accuracy": value} for round, value in curve).rounds_to("accuracy", target)


def show(rows: list[dict[str, Any]], console: Console) -> None:
    for row in rows:
        table = Table(title=f"Dir({row['alpha']}), target {row['target']:.0%}", title_justify="left")
        for heading in (
            "method",
            "chosen",
            "test accuracy, %",
            "minus FedAvg, points",
            "of each seed",
            "rounds to target",
        ):
            table.add_column(heading, justify="left" if heading in ("method", "chosen") else "right")
        for name, each in row["methods"].items():
            parameters = {key: v for key, v in each["chosen"]["algorithm"].items() if not isinstance(v, str)}
            gaps = each["minus_fedavg_points"]
            table.add_row(
                name,
                ", ".join(f"{key} {value:g}" for key, value in ({"lr": each["chosen"]["lr"]} | parameters).items()),
                mean_and_spread(each["late_accuracies"]),
                mean_and_spread(gaps, 1.0),
                " ".join(f"{gap:+.2f}" for gap in gaps),
                " ".join("-" if number is None else str(number) for number in each["rounds_to_target"]),
            )
        console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Test accuracy over rounds, a thin line per seed."""
    figure = load_matplotlib()(figsize=(5.5 * len(rows), 4.2), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        for (name, each), colour in zip(row["methods"].items(), COLOURS, strict=False):
            for seed, curve in enumerate(each["curves"]):
                rounds, values = zip(*curve, strict=True)
                label = None if seed else name
                axes.plot(rounds, [100 * value for value in values], color=colour, label=label, linewidth=0.8)
        axes.axhline(100 * row["target"], color="grey", linewidth=0.8, linestyle="dotted")
        top = 100 * max(max(each["late_accuracies"]) for each in row["methods"].values())
        axes.set(title=f"Fashion-MNIST, Dir({row['alpha']})", xlabel="round", ylim=(top - 25, top + 2))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="lower right")
    figure.axes[0].set_ylabel("test accuracy, %")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--alphas", nargs="+", type=float, default=list(ALPHAS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--search-rounds", type=int, default=12)
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.rounds, options.search_rounds = 1, 6, 3
    rows = compare(options, search(options))
    show(rows, Console(width=150))
    if options.json:
        settings = {"held_out_seed": HELD_OUT_SEED, "grid": GRID, "weight_decay": WEIGHT_DECAY}
        write(options.json, options, {**settings, "rows": rows})
        plot(rows, options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()

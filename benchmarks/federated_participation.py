"""FedAU beside what it competes with, where clients take part at rates that nobody knows and that go with their labels.

    python benchmarks/federated_participation.py --json benchmarks/results/federated_participation.json

Each client's labels are a draw of Dir(0.1), all have equally many samples, and its probability of taking part goes with
its labels (0.1 on average, 0.02 at least): Wang & Ji, ICLR 2024. Two tasks:

- digits: scikit-learn's digits, 100 clients, an MLP 64-32-10, Bernoulli participation, 2,000 rounds;
- fashion: Fashion-MNIST, 250 clients, an MLP 784-32-10, Bernoulli, Markov and cyclic participation, 1,000 rounds, where
  the paper trains a convolutional net for 10,000: a quarter of an hour on two cores.

5 local steps of SGD, lr 0.1, batches of 16, no decay, the same for all methods; average-all has a server learning rate
of 10, which makes up for the one client in ten that is there. A seed decides the partition, the probabilities, the
initial model, who takes part when, and the batches, so the methods are compared in pairs. What is compared is the mean
test accuracy over the evaluations in the last tenth of the rounds.

Acceptance: on digits FedAU beats averaging those who participate on each seed, and its mean is within 0.3 points of
FedVarp's and MIFA's, which remember a vector for each client.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federated_jobs import (
    arguments,
    late_accuracy,
    load,
    mean_and_spread,
    mlp,
    run_all,
    test_accuracy,
    training_tensors,
    write,
)
from rich.console import Console
from rich.table import Table

from distopt.federated import (
    MIFA,
    AverageAll,
    Bernoulli,
    ClientData,
    Cyclic,
    DirichletPartition,
    FedAU,
    FedAvg,
    FederatedAlgorithm,
    FedVarp,
    KnownParticipation,
    LocalTraining,
    Markov,
    Simulation,
    correlated_probabilities,
    label_distributions,
)
from distopt.plotting import COLOURS, load_matplotlib

AVERAGE, FEDAU = "average participating", "FedAU, K=50"
METHODS: dict[str, Callable[[tuple[float, ...]], FederatedAlgorithm]] = {  # of the probabilities, which one knows
    AVERAGE: lambda known: FedAvg(weighting="uniform"),
    "average all, eta_g=10": lambda known: AverageAll(server_lr=10.0),
    FEDAU: lambda known: FedAU(cutoff=50),
    "FedAU, K=inf": lambda known: FedAU(cutoff=math.inf),
    "known 1/p": lambda known: KnownParticipation(probability=known),
    "FedVarp": lambda known: FedVarp(),
    "MIFA": lambda known: MIFA(),
}
REMEMBERING = ("FedVarp", "MIFA")
WITHIN_POINTS = 0.3
MODELS = {"bernoulli": Bernoulli, "markov": Markov, "cyclic": Cyclic}  # of participation
CLIENTS = {"digits": 100, "fashion": 250}
HIDDEN = 32
ROUNDS = {"digits": 2000, "fashion": 1000}
EVALUATE_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training."""

    task: str
    participation: str
    method: str
    seed: int
    rounds: int
    lr: float
    mode: str


def train(run: Run) -> dict[str, Any]:
    data = load("digits" if run.task == "digits" else None)
    clients = ClientData.split(
        training_tensors(data), DirichletPartition(alpha=0.1, sizes="equal"), CLIENTS[run.task], seed=run.seed
    )
    chances = correlated_probabilities(label_distributions(clients.parts, data.train_labels.numpy()), seed=run.seed)
    participation = MODELS[run.participation](probability=tuple(chances))
    process = participation.begin(clients.num_clients, run.seed)
    simulation = Simulation(
        model=mlp(data.train_images[0].numel(), HIDDEN, data.num_classes, run.seed),
        clients=clients,
        algorithm=METHODS[run.method](tuple(process.probabilities)),
        local=LocalTraining(lr=run.lr, batch_size=16, steps=5),
        participation=participation,
        evaluate=test_accuracy(data),
        evaluate_every=EVALUATE_EVERY,
        seed=run.seed,
        mode=run.mode,
    )
    history = simulation.run(run.rounds)
    return {
        "data": data.name,
        "mode": simulation.mode,
        "late_accuracy": late_accuracy(history, run.rounds),
        "curve": [[round, value] for round, value in history.column("accuracy")],
        "clients_per_round": statistics.mean(len(row["participants"]) for row in history),
        "probabilities": {"least": float(chances.min()), "mean": float(chances.mean()), "most": float(chances.max())},
    }


def summarise(runs: list[Run], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each task and participation model."""
    rows = []
    for task, participation in dict.fromkeys((run.task, run.participation) for run in runs):
        methods: dict[str, dict[str, Any]] = {}
        for name in METHODS:
            found = [
                result
                for run, result in zip(runs, results, strict=True)
                if (run.task, run.participation, run.method) == (task, participation, name)
            ]
            methods[name] = {
                "late_accuracies": [each["late_accuracy"] for each in found],
                "mean": statistics.mean(each["late_accuracy"] for each in found),
                "curves": [each["curve"] for each in found],
            }
        own = methods[FEDAU]["late_accuracies"]
        for each in methods.values():
            each["fedau_minus_this_points"] = [100 * (a - b) for a, b in zip(own, each["late_accuracies"], strict=True)]
        rows.append(
            {
                "task": task,
                "data": found[0]["data"],
                "mode": found[0]["mode"],
                "participation": participation,
                "clients": CLIENTS[task],
                "clients_per_round": statistics.mean(each["clients_per_round"] for each in found),
                "probabilities": [each["probabilities"] for each in found],
                "fedau_beats_average_on_each_seed": min(methods[AVERAGE]["fedau_minus_this_points"]) > 0,
                "fedau_within_points_of_those_that_remember": all(
                    statistics.mean(methods[name]["fedau_minus_this_points"]) >= -WITHIN_POINTS for name in REMEMBERING
                ),
                "methods": methods,
            }
        )
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    for row in rows:
        title = f"{row['data']}, {row['clients']} clients, {row['participation']}, "
        table = Table(title=title + f"{row['clients_per_round']:.1f} of them per round", title_justify="left")
        for heading in ("method", "test accuracy, %", "FedAU minus this, points", "of each seed"):
            table.add_column(heading, justify="left" if heading == "method" else "right")
        for name, each in row["methods"].items():
            gaps = each["fedau_minus_this_points"]
            table.add_row(
                name,
                mean_and_spread(each["late_accuracies"]),
                mean_and_spread(gaps, 1.0),
                " ".join(f"{gap:+.2f}" for gap in gaps),
            )
        console.print(table)
        verdicts = (row["fedau_beats_average_on_each_seed"], row["fedau_within_points_of_those_that_remember"])
        console.print(
            f"FedAU beats {AVERAGE} on each seed: {verdicts[0]}; within {WITHIN_POINTS} points of "
            f"{' and '.join(REMEMBERING)}: {verdicts[1]}\n"
        )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Test accuracy over rounds, the mean over the seeds, a panel per task and participation model."""
    figure = load_matplotlib()(figsize=(4 * len(rows), 4.2), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        low, high = [], []
        for (name, each), colour in zip(row["methods"].items(), COLOURS, strict=False):
            rounds = [round for round, _ in each["curves"][0]]
            means = [100 * statistics.mean(column) for column in zip(*values_of(each["curves"]), strict=True)]
            axes.plot(rounds, means, color=colour, label=name, linewidth=1)
            low.append(statistics.quantiles(means, n=10)[0] if len(means) > 1 else means[0])
            high.append(max(means))
        axes.set(title=f"{row['data']}, {row['participation']}", xlabel="round", ylim=(min(low), max(high) + 0.5))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("test accuracy, %, mean of the seeds")
    figure.axes[-1].legend(frameon=False, fontsize="small", loc="lower right")
    figure.savefig(path, dpi=130)


def values_of(curves: list[list[list[float]]]) -> list[list[float]]:
    return [[value for _, value in curve] for curve in curves]


def plan(options: argparse.Namespace) -> list[Run]:
    settings = [("digits", "bernoulli", options.seeds), *(("fashion", each, options.fashion_seeds) for each in MODELS)]
    return [
        Run(
            task=task,
            participation=model,
            method=method,
            seed=seed,
            rounds=options.rounds or ROUNDS[task],
            lr=0.1,
            mode=options.mode,
        )
        for task, model, seeds in settings
        if task in options.tasks
        for seed in range(seeds)
        for method in METHODS
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=sorted(CLIENTS), default=list(CLIENTS))
    parser.add_argument("--seeds", type=int, default=5, help="of digits")
    parser.add_argument("--fashion-seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, help=f"default: {ROUNDS}")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.fashion_seeds, options.rounds = 1, 1, 40
    runs = plan(options)
    results = run_all(
        train, runs, options.processes,
        lambda run, result: f"{run.task}, {run.participation}, seed {run.seed}, {run.method}: "
        f"{result['late_accuracy']:.2%}",
    )  # fmt: skip
    rows = summarise(runs, results)
    show(rows, Console(width=130))
    if options.json:
        write(options.json, options, {"within_points": WITHIN_POINTS, "rows": rows})
        plot(rows, options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()

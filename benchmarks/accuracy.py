"""Does DGC reach the accuracy of dense training? Fashion-MNIST, a convolutional net and an MLP, several seeds.

    python benchmarks/accuracy.py --seeds 3 --results benchmarks/results

Trains every model with every seed three times under torchrun, by dense DDP, by top-k with error feedback and by DGC,
with the same hyperparameters, weights and batches. Prints and writes (JSON, PNG) the mean accuracies and the paired
difference DGC - dense with its standard deviation and 95% interval over the seeds; where that interval reaches below
the target, more seeds follow. May be stopped and started again: finished trainings are read from --out, not repeated.

Limits: one machine; the ranks share its cores, so times say nothing of a real network.
"""

import argparse
import dataclasses
import json
import math
import shlex
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure
from scipy.stats import t

from distopt.cli import datasets
from distopt.cli.compare import DENSE, DGC, TOPK, Settings, run
from distopt.cli.job import Job
from distopt.cli.machine import machine, versions
from distopt.plotting import COLOURS

EPOCHS = {"cnn": 12, "mlp": 20}  # near each model's plateau
LEARNING_RATES = {"cnn": 0.05, "mlp": 0.03}  # at the start; falls to 0 along a cosine
METHODS = (DENSE, TOPK, DGC)
TARGET_POINTS = 0.3  # DGC may lose this much against dense


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(EPOCHS), default=sorted(EPOCHS))
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... of each model")
    parser.add_argument("--most-seeds", type=int, default=5, help="... of a model whose interval is still too wide")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32, help="images per rank and step")
    parser.add_argument("--epochs", type=int, help=f"default: {EPOCHS}")
    parser.add_argument("--lr", type=float, help=f"at the start, falls to 0 along a cosine; default: {LEARNING_RATES}")
    parser.add_argument(
        "--warmup", type=float, default=0.02, help="part of all steps that each of 4 warm-up stages takes"
    )
    parser.add_argument("--data", help="folder of IDX files; default: the data set that is installed")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"), help="folder of the single trainings")
    parser.add_argument("--results", type=Path, help="folder for accuracy.json and accuracy.png; default: --out")
    return parser.parse_args()


def train(settings: Settings, data: datasets.Dataset, folder: Path) -> list[dict]:
    """The figures of the three methods, from `folder` if they are there already."""
    jobs = settings.jobs(data)
    done = folder / "results.json"
    if done.exists():
        content = json.loads(done.read_text())
        if {label: Job(**fields) for label, fields in content["jobs"].items()} == jobs:
            return content["results"]
    name = f"{settings.model}, seed {settings.seed}"

    def show(event: dict) -> None:
        if event["event"] == "finished":
            print(f"{name}: {event['label']} {event['result']['accuracy']:.2%}", flush=True)

    results = run(jobs, folder, deadline_s=6 * 3600, show=show)
    plain_jobs = {label: dataclasses.asdict(job) for label, job in jobs.items()}
    done.write_text(json.dumps({"jobs": plain_jobs, "results": results}, indent=2) + "\n")
    return results


def difference(results: list[list[dict]], method: str) -> dict:
    """Accuracy of `method` minus dense, paired by seed, in percentage points."""
    points = [100 * (by_label(one)[method]["accuracy"] - by_label(one)[DENSE]["accuracy"]) for one in results]
    if len(points) < 2:
        return {"points": points, "mean": points[0], "std": None, "interval_95": None}
    mean, std = statistics.mean(points), statistics.stdev(points)
    half = float(t.ppf(0.975, len(points) - 1)) * std / math.sqrt(len(points))
    return {"points": points, "mean": mean, "std": std, "interval_95": [mean - half, mean + half]}


def too_wide(results: list[list[dict]]) -> bool:
    """Whether the interval of DGC - dense reaches below the target: more seeds may decide it."""
    interval = difference(results, DGC)["interval_95"]
    return interval is None or interval[0] < -TARGET_POINTS


def by_label(results: list[dict]) -> dict[str, dict]:
    return {result["method"]: result for result in results}


def evaluate(results: list[list[dict]]) -> dict:
    """What is said of one model: each method's accuracies and its difference from dense."""
    summary = {}
    for method in METHODS:
        ones = [by_label(one)[method] for one in results]
        accuracies = [100 * one["accuracy"] for one in ones]
        summary[method] = {
            "accuracies": accuracies,
            "mean": statistics.mean(accuracies),
            "ratio": statistics.mean(one["ratio"] for one in ones),
            "ratio_last_step": ones[0]["ratio_last_step"],
            "ms_per_step": 1e3 * statistics.mean(one["seconds_per_step"] for one in ones),
            "ranks_identical": all(one["ranks_identical"] for one in ones),
            "minus_dense": difference(results, method),
        }
    return summary


def describe(model: str, summary: dict) -> str:
    lines = [f"{model}:"]
    for method, of_method in summary.items():
        line = f"  {method:24} {of_method['mean']:.2f}%  ratio {of_method['ratio']:.0f}x"
        line += f" ({of_method['ratio_last_step']:.0f}x after warm-up)"
        gap = of_method["minus_dense"]
        if method != DENSE:
            line += f"  minus dense {gap['mean']:+.2f} points"
            if gap["interval_95"]:
                low, high = gap["interval_95"]
                line += f", standard deviation {gap['std']:.2f}, 95% interval [{low:+.2f}, {high:+.2f}]"
        lines.append(line)
    gap = summary[DGC]["minus_dense"]
    verdict = "within" if gap["mean"] >= -TARGET_POINTS else "NOT within"
    lines.append(f"  DGC is {verdict} {TARGET_POINTS} points of dense (mean)")
    if gap["interval_95"] and gap["interval_95"][0] < -TARGET_POINTS:
        lines.append(f"  the interval reaches below -{TARGET_POINTS}: run more seeds (--most-seeds)")
    return "\n".join(lines)


def plot(trained: dict[str, list[list[dict]]], path: Path, title: str) -> None:
    """Test accuracy over steps, a line per seed and the methods in colours, one panel per model."""
    figure = Figure(figsize=(5.5 * len(trained), 4.2), layout="constrained")
    panels = figure.subplots(1, len(trained), squeeze=False)[0]
    for axes, (model, results) in zip(panels, trained.items(), strict=True):
        for method, colour in zip(METHODS, COLOURS, strict=True):
            for seed, one in enumerate(results):
                curve = by_label(one)[method]["curve"]
                label = method if seed == 0 else None
                steps = [point["step"] for point in curve]
                axes.plot(steps, [100 * point["accuracy"] for point in curve], color=colour, alpha=0.7, label=label)
        top = max(100 * point["accuracy"] for one in results for result in one for point in result["curve"])
        axes.set(title=model, xlabel="step", ylabel="test accuracy, %", ylim=(top - 10, top + 0.5))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right")
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def main() -> None:
    options = arguments()
    data = datasets.load(options.data)
    trained: dict[str, list[list[dict]]] = {model: [] for model in options.models}
    for model, results in trained.items():
        while len(results) < options.seeds or (len(results) < options.most_seeds and too_wide(results)):
            seed = len(results)
            settings = Settings(
                model=model, data=options.data, ranks=options.ranks, batch=options.batch, seed=seed,
                lr=options.lr or LEARNING_RATES[model], epochs=options.epochs or EPOCHS[model],
            )  # fmt: skip
            stage = round(options.warmup * settings.steps_for(data))
            settings = dataclasses.replace(settings, warmup_stage=stage)
            results.append(train(settings, data, options.out / f"{model}-seed{seed}"))
    summaries = {model: evaluate(results) for model, results in trained.items()}
    content = {
        "command": shlex.join(["python", *sys.argv]),
        "data": data.name,
        "options": {name: value for name, value in vars(options).items() if name not in ("out", "results", "data")},
        "epochs": {model: options.epochs or EPOCHS[model] for model in options.models},
        "learning_rates": {model: options.lr or LEARNING_RATES[model] for model in options.models},
        "parameters": {model: results[0][0]["parameters"] for model, results in trained.items()},
        "machine": machine(),
        "versions": versions(),
        "models": summaries,
    }
    folder = options.results or options.out
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "accuracy.json").write_text(json.dumps(content, indent=2) + "\n")
    seeds = ", ".join(f"{model}: {len(results)}" for model, results in trained.items())
    title = f"{data.name}, {options.ranks} ranks of {options.batch} images, density 0.001 (seeds: {seeds})"
    plot(trained, folder / "accuracy.png", title)
    for model, summary in summaries.items():
        print(describe(model, summary))


if __name__ == "__main__":
    main()

"""Does DGC reach the perplexity of dense training? The language model of examples/lm_dgc.py, several seeds.

    python benchmarks/language_model.py --results benchmarks/results

Trains under torchrun with every seed by dense DDP and by DGC, with the same hyperparameters, weights and batches, and
compares the perplexities on held-out text: the mean over the seeds and the paired difference from dense in percent.
Prints a table and writes JSON and a plot. May be stopped and started again: finished trainings are read from --out.

Limits: one machine; the text is the one that is installed (see the example) or --text.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from matplotlib.figure import Figure

from distopt.cli.machine import machine, versions
from distopt.plotting import COLOURS

EXAMPLE = Path(__file__).parents[1] / "examples" / "lm_dgc.py"
TARGET_PERCENT = 1.0  # DGC's perplexity may be this much higher than dense
LABELS = {"dense": "dense DDP", "topk": "top-k + error feedback", "dgc": "DGC"}
DEADLINE_S = 1800


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", choices=list(LABELS), default=["dense", "dgc"])
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ...")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time; the result does not depend on it")
    parser.add_argument("--text", type=Path, help="as the example takes it")
    parser.add_argument("--out", type=Path, default=Path("runs/language_model"), help="folder of the single trainings")
    parser.add_argument("--results", type=Path, help="folder for language_model.json and .png; default: --out")
    parser.add_argument(
        "example", nargs="*", metavar="-- OPTION", help="options of the example, such as -- --steps 500"
    )
    return parser.parse_args()


def train(algorithm: str, seed: int, options: argparse.Namespace) -> dict:
    """The example's figures, from an earlier run if it was started with the same command."""
    report = options.out / f"{algorithm}-seed{seed}.json"
    command = [str(EXAMPLE.relative_to(EXAMPLE.parents[1])), "--algorithm", algorithm, "--seed", str(seed)]
    command += ["--text", str(options.text)] if options.text else []
    command += options.example
    if report.exists() and (done := json.loads(report.read_text()))["command"] == command:
        return done
    fresh = report.with_suffix(".new")
    began = time.perf_counter()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
    subprocess.run(
        [*launcher, *command, "--json", str(fresh.resolve())],
        cwd=EXAMPLE.parents[1], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=DEADLINE_S, check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    figures = json.loads(fresh.read_text()) | {"command": command, "seconds": time.perf_counter() - began}
    report.write_text(json.dumps(figures) + "\n")
    fresh.unlink()
    print(f"{LABELS[algorithm]}, seed {seed}: {figures['perplexity']:.4f} in {figures['seconds']:.0f} s", flush=True)
    return figures


def summarise(trained: dict[str, list[dict]]) -> dict:
    """Mean perplexity of each algorithm, and how many percent it is above dense, paired by seed."""
    summary = {}
    for algorithm, runs in trained.items():
        percent = [
            100 * (run["perplexity"] / dense["perplexity"] - 1)
            for run, dense in zip(runs, trained["dense"], strict=True)
        ]
        summary[algorithm] = {
            "perplexities": [run["perplexity"] for run in runs],
            "mean": statistics.mean(run["perplexity"] for run in runs),
            "percent_above_dense": percent,
            "mean_percent_above_dense": statistics.mean(percent),
            "saving": statistics.mean(run["saving"] for run in runs),
            "saving_after_warmup": runs[0]["saving_after_warmup"],
            "curves": [run["curve"] for run in runs],
        }
    return summary


def plot(summary: dict, path: Path, title: str) -> None:
    """Held-out perplexity over steps, a line per seed."""
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for (algorithm, of_algorithm), colour in zip(summary.items(), COLOURS, strict=False):
        for seed, curve in enumerate(of_algorithm["curves"]):
            label = LABELS[algorithm] if seed == 0 else None
            steps, values = [point["step"] for point in curve], [point["perplexity"] for point in curve]
            axes.plot(steps, values, color=colour, alpha=0.7, label=label)
    axes.set(title=title, xlabel="step", ylabel="perplexity on held-out text")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    algorithms = ["dense", *(name for name in options.algorithms if name != "dense")]
    with ThreadPoolExecutor(options.jobs) as pool:
        pairs = [(algorithm, seed) for seed in range(options.seeds) for algorithm in algorithms]
        figures = dict(zip(pairs, pool.map(lambda pair: train(*pair, options), pairs), strict=True))
    trained = {algorithm: [figures[algorithm, seed] for seed in range(options.seeds)] for algorithm in algorithms}
    summary = summarise(trained)
    first = trained["dense"][0]
    folder = options.results or options.out
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "command": shlex.join(["python", *sys.argv]),
        "ranks": options.ranks,
        "parameters": first["parameters"],
        "options": {name: value for name, value in first["options"].items() if name not in ("algorithm", "seed")},
        "machine": machine(),
        "versions": versions(),
        "algorithms": summary,
    }
    (folder / "language_model.json").write_text(json.dumps(content, indent=1) + "\n")
    title = f"LSTM of {first['parameters']:,} parameters, {options.ranks} ranks, density {first['options']['density']}"
    plot(summary, folder / "language_model.png", title)
    print(f"| {'':24} | perplexity | above dense, each seed | bytes | after warm-up |")
    for algorithm, figures in summary.items():
        each = ", ".join(f"{percent:+.2f}" for percent in figures["percent_above_dense"])
        mean = figures["mean_percent_above_dense"]
        print(
            f"| {LABELS[algorithm]:24} | {figures['mean']:.3f} | {mean:+.2f}% ({each}) | {figures['saving']:.0f}x less "
            f"| {figures['saving_after_warmup']:.0f}x |"
        )
    if "dgc" in summary:
        verdict = "within" if summary["dgc"]["mean_percent_above_dense"] <= TARGET_PERCENT else "NOT within"
        print(f"DGC is {verdict} {TARGET_PERCENT:g}% of dense (mean)")


if __name__ == "__main__":
    main()

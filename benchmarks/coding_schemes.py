"""Which coding scheme is fastest, and where it turns round: over the seconds per unit of load, and over the stop rules.

    python benchmarks/coding_schemes.py --json benchmarks/results/coding_schemes.json

The best scheme of each family is chosen by the planner on one synthetic trace and simulated on another one of the same
cluster, so nothing is judged on what it was chosen by. Seconds of all jobs, and the parameters; with --json also a plot
beside it. Then how long the simulation itself takes.
"""

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from distopt.cli.machine import machine, versions
from distopt.coding import FAMILIES, MSGC, SRSGC, STOP_RULES, Cluster, fractional, plan, simulate
from distopt.plotting import COLOURS, load_matplotlib

SLOPES = (1.0, 10.0, 30.0, 100.0, 250.0, 1000.0)
PROBE_SEED, JUDGE_SEED = 1, 2


def compare(cluster: Cluster, probe_rounds: int, jobs: int, stop: str) -> dict[str, Any]:
    """The best of each family by the planner, judged on a trace that it has not seen."""
    probe, judge = cluster.trace(probe_rounds, PROBE_SEED), cluster.trace(jobs, JUDGE_SEED)
    found: dict[str, Any] = {}
    for family in FAMILIES:
        best = next(each for each in plan(probe, stop=stop, families=(family,)) if each.family == family)
        simulated = simulate(best.scheme, judge, jobs=jobs, stop=stop)
        found[family] = {
            "seconds": simulated.seconds,
            "parameters": best.parameters,
            "load": best.scheme.load,
            "stragglers_per_round": float(simulated.stragglers.mean()),
        }
    return found


def speed(workers: int, jobs: int) -> dict[str, float]:
    """Seconds that the simulation itself takes."""
    trace = Cluster(workers=workers).trace(jobs, PROBE_SEED)
    tenth = workers // 10
    schemes = {
        "gradient-coding s=15": fractional(workers, 15),
        f"sr-sgc (2, 3, {tenth})": SRSGC(n=workers, burst=2, window=3, stragglers=tenth),
        f"m-sgc (1, 2, {tenth})": MSGC(n=workers, burst=1, window=2, stragglers=tenth),
        f"m-sgc (3, 6, {tenth})": MSGC(n=workers, burst=3, window=6, stragglers=tenth),
    }
    took: dict[str, float] = {}
    for name, scheme in schemes.items():
        began = time.perf_counter()
        simulate(scheme, trace, jobs=jobs)
        took[name] = time.perf_counter() - began
    return took


def show(stop: str, rows: dict[str, dict[str, Any]]) -> None:
    print(f"\nstop rule {stop}: seconds of all jobs\n{'s per load':>10}" + "".join(f"{f:>30}" for f in FAMILIES))
    for slope, found in rows.items():
        cells = [
            f"{found[f]['seconds']:.0f} ({', '.join(map(str, found[f]['parameters'].values())) or '-'})"
            for f in FAMILIES
        ]
        print(f"{slope:>10}" + "".join(f"{cell:>30}" for cell in cells), flush=True)


def plot(results: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    figure = load_matplotlib()(figsize=(12, 4), layout="constrained")
    for axes, (stop, rows) in zip(figure.subplots(1, len(results), sharey=True), results.items(), strict=True):
        for family, colour in zip(FAMILIES, COLOURS, strict=False):
            ratios = [found[family]["seconds"] / found["uncoded"]["seconds"] for found in rows.values()]
            axes.plot([float(slope) for slope in rows], ratios, "o-", color=colour, label=family, markersize=4)
        axes.set(xscale="log", xlabel="seconds per unit of load", title=f"stop rule {stop}")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("seconds against uncoded")
    figure.axes[0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=256)
    parser.add_argument("--jobs", type=int, default=480)
    parser.add_argument("--burst-rounds", type=float, default=1.0, help="mean length of a burst of slowness")
    parser.add_argument("--probe-rounds", type=int, default=120)
    parser.add_argument("--only-speed", action="store_true", help="only time the simulation, and renew that in --json")
    parser.add_argument("--json", type=Path, help="also write the result here, and a plot beside it")
    options = parser.parse_args()
    cluster = Cluster(workers=options.workers, burst_rounds=options.burst_rounds)
    print(f"{options.workers} workers, {options.jobs} jobs, chosen on {options.probe_rounds} rounds")
    results: dict[str, dict[str, Any]] = {}
    for stop in () if options.only_speed else STOP_RULES:
        results[stop] = {
            f"{slope:g}": compare(replace(cluster, seconds_per_load=slope), options.probe_rounds, options.jobs, stop)
            for slope in SLOPES
        }
        show(stop, results[stop])
    took = {str(workers): speed(workers, options.jobs) for workers in (256, 1024)}
    for workers, seconds in took.items():
        listed = ", ".join(f"{name} {each:.2f} s" for name, each in seconds.items())
        print(f"simulating {options.jobs} jobs of {workers} workers takes: {listed}")
    if options.json:
        content = {
            "command": shlex.join(["python", *sys.argv]),
            "machine": machine(),
            "versions": versions(),
            "cluster": asdict(cluster),
            "jobs": options.jobs,
            "probe_rounds": options.probe_rounds,
            "seconds": results,
            "simulation_s": took,
        }
        if options.only_speed:  # the rest stays as it was
            kept = json.loads(options.json.read_text())
            options.json.write_text(json.dumps(kept | {"simulation_s": took}, indent=1) + "\n")
            return
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n")
        title = f"{options.workers} workers, {options.jobs} jobs, best of each family chosen on another trace"
        plot(results, title, options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()

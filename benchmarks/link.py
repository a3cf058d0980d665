"""What a slow link costs: hosts with a link rate of their own on one machine, and every way to communicate in turn.

    sudo python benchmarks/link.py --json benchmarks/results/link.json
    sudo python benchmarks/link.py --hosts 2 --rates 1gbit --models mlp --profile runs/link    # one cell, with a trace

For each number of hosts and link rate launch/netns_cluster.sh makes the hosts (network namespaces), starts a torchrun
job across them (benchmarks/link_worker.py) and removes them again, also after a failure. Prints a table per cell, the
medians of milliseconds per step with their quartiles, the bytes that host 1 sent per step, and the time to the target
accuracy or perplexity; writes all of it as JSON, into the cells of an earlier run where the file exists.

Training to the target is done once for each model and number of hosts, at the first rate: the rate does not change what
is computed, so elsewhere the time is steps x median step, marked with ~.

Limits: the hosts share the machine's cores and memory bus; with more hosts than cores the times say little. Needs root.
"""

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
from datetime import UTC, datetime
from pathlib import Path

from link_tasks import MODES, TASKS

from distopt.cli.machine import machine, versions

REPOSITORY = Path(__file__).parents[1]
CLUSTER = REPOSITORY / "launch" / "netns_cluster.sh"
# Where each step frees and allocates many MB, glibc by default gives the memory back to the kernel each time.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "500000000", "MALLOC_TRIM_THRESHOLD_": "1000000000"}
UNTRAINED = ("compute", "waiting")  # they exchange no gradient
ALONE_DEADLINE_S = 40  # of a mode that may hang


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rates", nargs="+", default=["1gbit", "100mbit"], help="as `tc` takes them")
    parser.add_argument("--models", nargs="+", choices=sorted(TASKS), default=list(TASKS))
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--rounds", type=int, default=8, help="turns of each mode")
    parser.add_argument(
        "--training", choices=("with", "without", "only"), default="with",
        help="to the target: with the steps, without it, or only it, added to the steps that --json has already",
    )  # fmt: skip
    parser.add_argument(
        "--unpinned", dest="pinned", action="store_false",
        help="let the scheduler place all threads; otherwise each host has a core of its own, if there are enough",
    )  # fmt: skip
    parser.add_argument("--profile", type=Path, metavar="DIR", help="also write a trace of DGC, and how much overlaps")
    parser.add_argument("--deadline", type=int, default=900, help="seconds for one cell")
    parser.add_argument("--json", type=Path, help="write the results here, keeping the cells of other runs")
    options = parser.parse_args()
    if options.training == "only" and not (options.json and options.json.exists()):
        parser.error("--training only adds to the steps in --json FILE; measure those first (--training without)")
    if os.geteuid() != 0:
        parser.error("network namespaces need root; use sudo, or benchmarks/step.py for loopback")
    return options


def job(hosts: int, rate: str, spec: dict, deadline_s: int, *, pinned: bool, worker: str = "link_worker.py") -> dict:
    """Runs the worker on a cluster of its own. Returns its result, or {"failed": the end of the log}."""
    with tempfile.TemporaryDirectory() as folder:
        task, result, logs = Path(folder, "task.json"), Path(folder, "result.json"), Path(folder, "logs")
        task.write_text(json.dumps({**spec, "result": str(result)}))
        command = ["bash", CLUSTER, "--name", "bench", "--deadline", deadline_s, "--grace", 5, "--logs", logs]
        command += [] if pinned else ["--unpinned"]
        command += ["once", hosts, rate, "--", REPOSITORY / "benchmarks" / worker, task]
        environment = {
            **os.environ,
            **ALLOCATOR,
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        }
        returncode, said = _run([str(part) for part in command], environment)
        if returncode == 0:
            return json.loads(result.read_text())
        log = logs / "host1.log"
        lines = (log.read_text(errors="replace") if log.exists() else said).splitlines()
        reason = f"did not end within {deadline_s} s" if returncode == 124 else _error_in(lines)
        if returncode != 124 and not log.exists():
            raise SystemExit(said)
        return {"failed": reason, "log": lines[-40:]}


def _run(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Exit status and standard error. However this ends, the cluster script is asked to stop and removes the hosts."""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            _, said = process.communicate()
        finally:
            process.terminate()  # not kill: it has namespaces to remove
    return process.returncode, said


def _error_in(lines: list[str]) -> str:
    """The line of a log that says what went wrong."""
    said = [line.strip() for line in lines if "Error" in line or "doesn't match" in line or "terminate" in line]
    return said[0] if said else "ended without a word"


def measure(hosts: int, rate: str, model: str, options: argparse.Namespace) -> dict:
    """One cell of the table."""
    shared = [name for name in options.modes if not MODES[name].alone]
    trains = options.training == "with" and rate == options.rates[0]
    trace = options.profile / f"trace-{model}-{hosts}-{rate}.json" if options.profile else None
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
    spec = {
        "task": model,
        "modes": shared,
        "rounds": options.rounds,
        "train": [name for name in shared if trains and name not in UNTRAINED],
        "trace": str(trace.resolve()) if trace else None,
    }
    cell = job(hosts, rate, spec, options.deadline, pinned=options.pinned)
    if "failed" in cell:
        raise SystemExit(f"{hosts} hosts at {rate}, {model}: {cell['failed']}\n" + "\n".join(cell["log"]))
    for name in options.modes:
        if MODES[name].alone and rate == options.rates[0]:
            spec = {"task": model, "modes": [name], "rounds": 2, "train": [], "trace": None}
            alone = job(hosts, rate, spec, ALONE_DEADLINE_S, pinned=options.pinned)
            cell["modes"][name] = {"failed": alone["failed"]} if "failed" in alone else alone["modes"][name]
    for figures in cell["modes"].values():
        if "step_ms" in figures:
            low, middle, high = statistics.quantiles(figures["step_ms"], n=4)
            figures["step_ms_quartiles"] = [round(each, 2) for each in (low, middle, high)]
    cell["hosts"], cell["rate"], cell["model"] = hosts, rate, model
    cell["command"] = shlex.join(["python", *sys.argv])
    cell["measured_at"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    cell["machine"], cell["versions"] = machine(), versions()
    return cell


def add_training(cell: dict, options: argparse.Namespace) -> None:
    """Trains to the target in the cell's modes."""
    names = [name for name in options.modes if "step_ms" in cell["modes"].get(name, {}) and name not in UNTRAINED]
    spec = {"task": cell["model"], "modes": [], "rounds": 0, "train": names, "trace": None}
    result = job(cell["hosts"], cell["rate"], spec, options.deadline, pinned=options.pinned)
    if "failed" in result:
        raise SystemExit(f"training of {cell['model']}: {result['failed']}\n" + "\n".join(result["log"]))
    for name in names:
        cell["modes"][name]["training"] = result["modes"][name]["training"]


def time_to_target(cell: dict, name: str, cells: dict) -> str:
    """Seconds of training until the target, measured here, or ~ from the steps that another rate needed."""
    figures = cell["modes"][name]
    for other in [cell, *cells.values()]:
        if (other["hosts"], other["model"]) == (cell["hosts"], cell["model"]):
            training = other["modes"].get(name, {}).get("training")
            if training is None:
                continue
            if not training["reached"]:
                return f"not in {training['seconds']:.0f} s"
            if other is cell:
                return f"{training['seconds']:.0f} s ({training['steps']} steps)"
            return f"~{training['steps'] * figures['step_ms_quartiles'][1] / 1e3:.0f} s"
    return ""


def table(cell: dict, cells: dict) -> str:
    """The cell as lines of a Markdown table."""
    lines = [
        f"{cell['hosts']} hosts, {cell['rate']}, {cell['model']} ({cell['parameters']:,} parameters); target: "
        f"{cell['judged_by']} {cell['target']}",
        "",
        "| | ms per step | x compute | kB per step | to the target |",
        "|---|---|---|---|---|",
    ]
    compute = cell["modes"].get("compute", {}).get("step_ms_quartiles")
    for name, figures in cell["modes"].items():
        if "failed" in figures:
            reason = textwrap.shorten(figures["failed"], 70, placeholder=" ...")
            lines.append(f"| {MODES[name].label} | fails: {reason} | | | |")
            continue
        low, middle, high = figures["step_ms_quartiles"]
        ratio = f"{middle / compute[1]:.2f}" if compute else ""
        lines.append(
            f"| {MODES[name].label} | {middle:.1f} [{low:.1f}, {high:.1f}] | {ratio} "
            f"| {figures['link_bytes_per_step'] / 1e3:,.0f} | {time_to_target(cell, name, cells)} |"
        )
    if "profile" in cell:
        found = cell["profile"]
        of_all = f"{found['hidden_ms']:.0f} of {found['exchange_ms']:.0f} ms"
        lines += ["", f"{found['overlapped_fraction']:.0%} of the exchange ({of_all}) overlaps with backward"]
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the hosts are removed
    stored = json.loads(options.json.read_text())["cells"] if options.json and options.json.exists() else []
    cells = {(cell["hosts"], cell["rate"], cell["model"]): cell for cell in stored}
    for hosts in options.hosts:
        for rate in options.rates:
            for model in options.models:
                if options.training == "only":
                    cell = cells[hosts, rate, model]
                    add_training(cell, options)
                else:
                    cell = cells[hosts, rate, model] = measure(hosts, rate, model, options)
                print(table(cell, cells), end="\n\n", flush=True)
                if options.json:
                    options.json.parent.mkdir(parents=True, exist_ok=True)
                    options.json.write_text(json.dumps({"cells": list(cells.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()

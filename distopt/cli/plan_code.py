"""`distopt plan-code`: the coding schemes simulated on the user's own trace, fastest first, and what to configure."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from distopt.coding import FAMILIES, Candidate, Trace, plan, simulate
from distopt.plotting import COLOURS, load_matplotlib

NAMES = {"uncoded": "uncoded", "gradient-coding": "gradient code", "sr-sgc": "SR-SGC", "m-sgc": "M-SGC"}
_COLOURS = dict(zip(FAMILIES, COLOURS, strict=False))
_WITHOUT_DELAY = ("uncoded", "gradient-coding")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What was asked.

    Attributes:
        trace: The file.
        load: In place of what the file says, or None.
        seconds_per_load: In place of what the file says, or None.
        jobs: Gradients; None for as many as the trace has rounds.
        stop: The stop rule.
        only_live: Whether to leave out schemes with a delay.
    """

    trace: Path
    load: float | None
    seconds_per_load: float | None
    jobs: int | None
    stop: str
    only_live: bool


def answer(question: Question) -> dict[str, Any]:
    """Simulates all schemes.

    Raises:
        ConfigError: The trace cannot be read, or a value breaks its rule.
    """
    trace = Trace.read(question.trace, load=question.load, seconds_per_load=question.seconds_per_load)
    jobs = question.jobs or trace.num_rounds
    families = _WITHOUT_DELAY if question.only_live else FAMILIES
    found = plan(trace, jobs=jobs, stop=question.stop, families=families)
    return {
        "trace": {
            "file": question.trace.name,
            "workers": trace.num_workers,
            "rounds": trace.num_rounds,
            "load": trace.load,
            "seconds_per_load": trace.slope,
        },
        "jobs": jobs,
        "stop": question.stop,
        "candidates": [_plain(each, trace, jobs, question.stop) for each in found],
    }


def _plain(candidate: Candidate, trace: Trace, jobs: int, stop: str) -> dict[str, Any]:
    simulated = simulate(candidate.scheme, trace, jobs=jobs, stop=stop)
    seconds, ratio = candidate.seconds, candidate.ratio
    return {
        "family": candidate.family,
        "name": candidate.scheme.name,
        "parameters": candidate.parameters,
        "load": candidate.scheme.load,
        "delay": candidate.scheme.delay,
        "seconds": seconds if math.isfinite(seconds) else None,  # JSON has no infinity
        "ratio": ratio if math.isfinite(ratio) else None,
        "not_waited_for": float(simulated.stragglers.mean()),
        "config": candidate.config,
    }


def table(found: dict[str, Any], top: int) -> Table:
    """The schemes, fastest first; uncoded is always shown."""
    trace = found["trace"]
    made = Table(
        title=f"{trace['file']}: {trace['workers']} workers, {trace['rounds']} rounds; {found['jobs']} gradients, "
        f"stop rule {found['stop']}",
        title_justify="left",
    )
    made.add_column("scheme")
    made.add_column("parameters")
    for heading in ("load", "delay", "not waited for", "time", "against uncoded"):
        made.add_column(heading, justify="right")
    for each in _shown(found, top):
        made.add_row(
            NAMES[each["family"]],
            _said(each),
            f"{each['load']:.4g}",
            f"{each['delay']} rounds" if each["delay"] else "-",
            f"{each['not_waited_for']:.1f}",
            "never ends" if each["seconds"] is None else f"{each['seconds']:,.1f} s",
            "-" if each["ratio"] is None else f"{each['ratio']:.3f}x",
        )
    return made


def advice(found: dict[str, Any]) -> str:
    """The configuration of the fastest, and of the fastest without delay where that is another one."""
    candidates = found["candidates"]
    best, direct = candidates[0], next(each for each in candidates if each["delay"] == 0)
    if best["seconds"] is None:
        return "No scheme ends on this trace: a worker never answers, and none can do without it."
    lines = [f"Fastest ({_label(best)}): {json.dumps(best['config'])}"]
    if best["delay"]:
        lines.append(
            f"It needs {best['delay'] + 1} models that train at once, or a gradient that is {best['delay']} steps old."
        )
        lines.append(f"Fastest for one model without delay ({_label(direct)}): {json.dumps(direct['config'])}")
    if best["family"] == "uncoded":
        lines.append("Coding does not pay on this trace: the redundant work costs more than the slow workers do.")
    return "\n".join(lines)


def plot(found: dict[str, Any], top: int, path: Path) -> None:
    """The time of each scheme as a bar, as a PNG."""
    shown = [each for each in _shown(found, top) if each["seconds"] is not None]
    figure = load_matplotlib()(figsize=(9, 1.2 + 0.35 * len(shown)), layout="constrained")
    axes = figure.subplots()
    places = range(len(shown))
    axes.barh(places, [each["seconds"] for each in shown], color=[_COLOURS[each["family"]] for each in shown])
    axes.set_yticks(places, [_label(each) for each in shown])
    axes.invert_yaxis()
    axes.set(xlabel=f"seconds for {found['jobs']} gradients", title=found["trace"]["file"])
    axes.grid(alpha=0.3, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _shown(found: dict[str, Any], top: int) -> list[dict[str, Any]]:
    return [each for place, each in enumerate(found["candidates"]) if place < top or each["family"] == "uncoded"]


def _said(each: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in each["parameters"].items())


def _label(each: dict[str, Any]) -> str:
    return " ".join([NAMES[each["family"]], *([_said(each)] if each["parameters"] else [])])

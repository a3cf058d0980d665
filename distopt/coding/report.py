"""What a coded training has to tell at its end: a report for people, a trace for the planner, a plot of arrivals."""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distopt.coding.one_round import OneRound
from distopt.coding.scheme import Scheme
from distopt.coding.statistics import Arrivals
from distopt.coding.trace import Trace
from distopt.plotting import COLOURS, load_matplotlib

__all__ = ["Arrivals", "as_text", "as_trace", "name_of", "plot_arrivals"]


def as_text(stats: Mapping[str, Any], name: str) -> str:
    """The report: who was slow, how often and how much, what was waited for, what coding saved.

    Args:
        stats: Of the master.
        name: Of the scheme at work.
    """
    rounds = max(1, stats["rounds"])
    lines = [
        f"{name}: {stats['steps']} gradients in {stats['rounds']} rounds, {stats['waited_s']:.2f} s "
        f"({1e3 * stats['waited_s'] / rounds:.1f} ms per round)",
        f"{'worker':>6} {'in time':>8} {'late':>6} {'late by':>9} {'skipped':>8} {'median':>9}",
    ]
    for number, worker in enumerate(stats["workers"]):
        median = "" if worker["median_s"] is None else f"{1e3 * worker['median_s']:.1f} ms"
        late_by = f"{1e3 * worker['late_mean_s']:.0f} ms" if worker["late_mean_s"] else ""
        lines.append(
            f"{number:>6} {worker['in_time']:>8} {worker['late']:>6} {late_by:>9} {worker['unanswered']:>8} {median:>9}"
            + (f"  gone: {stats['gone'][number]}" if number in stats["gone"] else "")
        )
    slow = [w for w in range(len(stats["workers"])) if stats["workers"][w]["late"] + stats["workers"][w]["unanswered"]]
    if slow:
        slowest = max(slow, key=lambda w: stats["workers"][w]["late"] + stats["workers"][w]["unanswered"])
        lines.append(
            f"Most often slow: worker {slowest}. Waiting for everybody would have taken at least "
            f"{stats['saved_s']:.2f} s more, {1 + stats['saved_s'] / max(stats['waited_s'], 1e-9):.1f}x of what the "
            "rounds took."
        )
    else:
        lines.append("Nobody was ever slow: without coding each worker would have had less to compute.")
    lines.append(
        f"Decode amplification: {stats['amplification_mean']:.2f} on average, {stats['amplification_max']:.2f} at "
        f"most; received {stats['bytes_received'] / 1e6:,.1f} MB, sent {stats['bytes_sent'] / 1e6:,.1f} MB"
    )
    if stats["decode_error_max"]:
        lines.append(
            f"The code is approximate: mean squared error of the parts' weights {stats['decode_error_mean']:.2g} on "
            f"average, {stats['decode_error_max']:.2g} at most"
        )
    if stats["refused_messages"]:
        lines.append(f"Refused {stats['refused_messages']} messages: {'; '.join(stats['refused'])}")
    if stats["disagreements"]:
        lines.append(
            f"Replicas differed {stats['disagreements']} times: the parameters are not those of the full batch"
        )
    return "\n".join(lines)


def name_of(scheme: Scheme) -> str:
    """What people call it."""
    return repr(scheme.code) if isinstance(scheme, OneRound) else repr(scheme)


def as_trace(history: Sequence[Arrivals], scheme: Scheme, *, gone: Collection[int], now_s: float) -> Trace:
    """The rounds as a trace, at the scheme's load.

    Where a worker has not been heard of since a round, its time is what has passed until now, and NaN if it is gone.

    Args:
        history: The rounds.
        scheme: At work.
        gone: Workers that do not come back.
        now_s: By the clock of `Arrivals.began_s`.
    """
    seconds = np.stack([arrivals.seconds for arrivals in history])
    passed = now_s - np.array([arrivals.began_s for arrivals in history])
    for worker in set(range(seconds.shape[1])) - set(gone):
        seconds[:, worker] = np.where(np.isnan(seconds[:, worker]), passed, seconds[:, worker])
    return Trace(seconds=seconds, load=scheme.load, compute=np.stack([arrivals.compute_s for arrivals in history]))


def plot_arrivals(history: Sequence[Arrivals], path: Path) -> None:
    """A dot for each answer, over the rounds, by seconds since the round's start; a line where each round ended.

    Raises:
        CompatibilityError: matplotlib is not installed.
    """
    figure = load_matplotlib()(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots()
    rounds = np.array([arrivals.round for arrivals in history])
    ended = np.array([arrivals.ended_s for arrivals in history])
    seconds = np.stack([arrivals.seconds for arrivals in history])
    for worker in range(seconds.shape[1]):
        colour = COLOURS[1 + worker % (len(COLOURS) - 1)]
        axes.plot(rounds, seconds[:, worker], "o", markersize=3, color=colour, label=f"worker {worker}")
    axes.step(rounds, ended, where="mid", color=COLOURS[0], linewidth=1, label="round ends")
    axes.set(xlabel="round", ylabel="seconds after the round's start", yscale="log")
    axes.grid(alpha=0.3)
    if seconds.shape[1] <= 16:
        axes.legend(ncols=4, fontsize="small")
    missing = int(np.isnan(seconds).sum())
    finite = seconds[~np.isnan(seconds)]
    median = float(np.median(finite)) if finite.size else math.nan
    axes.set_title(
        f"{finite.size} answers or signs of life, median {1e3 * median:.1f} ms; {missing} never came", fontsize="medium"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)

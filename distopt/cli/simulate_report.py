"""What a simulation leaves: a table and a few lines for people, and files for everything else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from distopt.cli.machine import machine, versions
from distopt.cli.report import write_json
from distopt.cli.simulate import Job
from distopt.federated import History

ACCURACY, LOSS = "accuracy", "loss"
_ROWS = 10


def summary(history: History, refused: Mapping[str, int], target: float | None) -> dict[str, Any]:
    """The run in plain values: how it ended, what it cost, and when it reached the target, None if it never did."""
    timed = history.has_time
    found: dict[str, Any] = {
        "rounds": len(history),
        ACCURACY: history.last(ACCURACY),
        LOSS: history.last(LOSS),
        "bytes": history.total_bytes(),
        "virtual_s": history.last("time_s") if timed else None,
        "epsilon": history.last("epsilon") if history.has_epsilon else None,
        "clients_that_took_part": len(history.participation()),
        "replies_refused": dict(refused),
    }
    if target is not None:
        found["target"] = {
            ACCURACY: target,
            "round": history.rounds_to(ACCURACY, target),
            "bytes": history.bytes_to(ACCURACY, target),
            "virtual_s": history.time_to(ACCURACY, target) if timed else None,
        }
    return found


def table(history: History) -> Table:
    """Some rounds that were evaluated, evenly spread, the last among them."""
    made = Table()
    timed, private = history.has_time, history.has_epsilon
    for heading in (
        "round", ACCURACY, LOSS, "MB sent", *(["virtual s"] if timed else []), *(["epsilon"] if private else [])
    ):  # fmt: skip
        made.add_column(heading, justify="right")
    sent, rows = 0, []
    for row in history:
        sent += row["bytes_down"] + row["bytes_up"]
        if ACCURACY in row:
            rows.append((row, sent))
    first = (len(rows) - 1) % -(-len(rows) // _ROWS)
    for row, sent in rows[first :: -(-len(rows) // _ROWS)]:
        cells = [str(row["round"]), f"{row[ACCURACY]:.2%}", f"{row[LOSS]:.4f}", f"{sent / 1e6:,.2f}"]
        cells += [f"{row['time_s']:,.1f}"] if timed else []
        made.add_row(*cells, *([f"{row['epsilon']:.3f}"] if private else []))
    return made


def lines(found: dict[str, Any], num_clients: int) -> str:
    """The summary in words."""
    said = [
        f"Final accuracy {found[ACCURACY]:.2%} after {found['rounds']} rounds and {found['bytes'] / 1e6:,.2f} MB sent, "
        f"down and up{_virtual(found)}; {found['clients_that_took_part']} of {num_clients} clients took part."
    ]
    if found["epsilon"] is not None:
        said.append(f"Epsilon {found['epsilon']:.4g} has been spent, at the delta of [algorithm].")
    if refused := found["replies_refused"]:
        said.append(f"Replies refused: {', '.join(f'{count} {reason}' for reason, count in sorted(refused.items()))}.")
    if target := found.get("target"):
        if target["round"] is None:
            said.append(f"Accuracy {target[ACCURACY]:.2%} was not reached.")
        else:
            said.append(
                f"Accuracy {target[ACCURACY]:.2%} after {target['round']} rounds, {target['bytes'] / 1e6:,.2f} MB"
                f"{_virtual(target)}."
            )
    return "\n".join(said)


def write(job: Job, history: History, found: dict[str, Any]) -> list[Path]:
    """Writes history.csv, history.json, summary.json and plot.png; their paths.

    Raises:
        CompatibilityError: matplotlib is not installed.
    """
    paths = [job.folder / name for name in ("history.csv", "history.json", "summary.json", "plot.png")]
    history.save(paths[0])
    history.save(paths[1])
    content = {
        "command": "distopt simulate",
        "machine": machine(),
        "versions": versions(),
        "config": job.settings.tables,
        "summary": found,
    }
    write_json(content, paths[2])
    history.plot(paths[3], ACCURACY, title=job.title)
    return paths


def _virtual(found: dict[str, Any]) -> str:
    return "" if found["virtual_s"] is None else f", {found['virtual_s']:,.1f} virtual seconds"

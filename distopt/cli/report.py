"""What a comparison leaves: a table, a plot (PNG) and a JSON file with everything needed to judge the figures."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from distopt.plotting import COLOURS, load_matplotlib


def table(results: list[dict[str, Any]], title: str) -> Table:
    """One row per method; times are milliseconds per step, bytes those that one rank encodes per step."""
    made = Table(title=title, title_justify="left")
    made.add_column("method")
    headings = ("accuracy", "bytes/step", "ratio", "after warm-up", "ms/step", "selecting", "communicating")
    for heading in headings:
        made.add_column(heading, justify="right")
    for result in results:
        made.add_row(
            result["method"],
            f"{result['accuracy']:.2%}",
            f"{result['bytes_sent_per_step']:,.0f}",
            f"{result['ratio']:.1f}x",
            f"{result['ratio_last_step']:.0f}x",
            f"{1e3 * result['seconds_per_step']:.2f}",
            f"{1e3 * result['seconds_selecting_per_step']:.2f}",
            f"{1e3 * result['seconds_communicating_per_step']:.2f}",
        )
    return made


def notes(results: list[dict[str, Any]]) -> str:
    """What the table's figures mean, and from which link speed on the compression pays on this machine."""
    lines = [
        "Bytes are those that one rank encodes, headers and uncompressed tensors included, mean over the run with its",
        "warm-up; the ratio is against the same gradient in fp32. Times are ms per step. The ranks share this machine",
        "and its memory is the link, so they show what selecting costs, not what a slow link would cost the dense run.",
    ]
    dense, *compressed = results
    lines += [
        f"{result['method']}: saves time on links slower than about {rate / 1e6:,.0f} Mbit/s."
        for result in compressed
        if (rate := break_even_bits_per_s(dense, result))
    ]
    if not all(result["ranks_identical"] for result in results):
        lines.append("WARNING: the ranks of a run did not end with the same weights; please report this.")
    return "\n".join(lines)


def break_even_bits_per_s(dense: dict[str, Any], compressed: dict[str, Any]) -> float | None:
    """The link rate below which compressing saves time: bits kept off the link per second that compressing takes.

    Compressing is selecting and decoding; the bytes are those after warm-up. None where it costs nothing or keeps
    nothing off the link.
    """
    saved_bytes: float = dense["stats"]["last"]["link_bytes_sent"] - compressed["stats"]["last"]["link_bytes_sent"]
    cost_s = _compressing_s(compressed) - _compressing_s(dense)
    return 8.0 * saved_bytes / cost_s if saved_bytes > 0 and cost_s > 0 else None


def _compressing_s(result: dict[str, Any]) -> float:
    stats = result["stats"]
    seconds: float = stats["seconds_selecting"] + stats["seconds_decoding"]
    return seconds / int(stats["steps"])


def plot(results: list[dict[str, Any]], path: Path, title: str) -> None:
    """Test accuracy over steps and over the bytes that one rank has sent, side by side.

    Raises:
        CompatibilityError: matplotlib is not installed.
    """
    figure = load_matplotlib()(figsize=(10, 4.2), layout="constrained")
    over_steps, over_bytes = figure.subplots(1, 2, sharey=True)
    for result, colour in zip(results, COLOURS, strict=False):
        accuracy = [100 * point["accuracy"] for point in result["curve"]]
        style = {"color": colour, "label": result["method"], "marker": "o", "markersize": 3}
        over_steps.plot([point["step"] for point in result["curve"]], accuracy, **style)
        over_bytes.plot([point["bytes_sent"] for point in result["curve"]], accuracy, **style)
    over_steps.set(xlabel="step", ylabel="test accuracy, %")
    over_bytes.set(xlabel="bytes sent by one rank so far", xscale="log")
    for axes in (over_steps, over_bytes):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    over_steps.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def write_json(content: dict[str, Any], path: Path) -> None:
    """Writes the figures with what they depend on."""
    path.write_text(json.dumps(content, indent=2) + "\n")

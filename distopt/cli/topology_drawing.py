"""Pictures of graphs: dots of braille in a terminal, and files by matplotlib.

Ranks lie on a circle, 0 at the top and the others clockwise; one that is joined to everybody lies in its middle. A
torus is a grid, whose edges around the back are stubs that leave the picture.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.columns import Columns
from rich.console import Group
from rich.text import Text

from distopt.cli.topology import Answer
from distopt.errors import ConfigError
from distopt.gossip import Graph, Torus
from distopt.plotting import COLOURS, load_matplotlib

MOST_ON_A_CIRCLE = 24  # ranks that a terminal has room for; more are a matrix
MOST_IN_A_MATRIX = 64
_MOST_ROUNDS = 6  # pictures beside each other

Segment = tuple[tuple[float, float], tuple[float, float]]


def positions(each: Answer) -> np.ndarray:
    """(n, 2) float64 between -1 and 1, of the ranks; y grows upwards."""
    n, graph = each.description.num_ranks, each.graphs[0]
    if isinstance(each.topology, Torus) and _is_grid(each):
        rows, columns = each.topology.shape(n)
        step = 2 / (max(rows, columns) - 1)
        return np.array([[(i % columns - (columns - 1) / 2) * step, ((rows - 1) / 2 - i // columns) * step]
                         for i in range(n)])  # fmt: skip
    degrees = [len(graph.receivers(rank)) for rank in range(n)]
    hubs = [rank for rank in range(n) if degrees[rank] == n - 1]
    centre = hubs if len(hubs) == 1 and n > 3 else []
    around = [rank for rank in range(n) if rank not in centre]
    found = np.zeros((n, 2))
    for place, rank in enumerate(around):
        angle = 2 * math.pi * place / len(around)
        found[rank] = math.sin(angle), math.cos(angle)
    return found


def segments(each: Answer, graph: Graph, at: np.ndarray) -> list[Segment]:
    """A line for each edge, from its sender to its receiver; two stubs for one around the back of a grid."""
    lines: list[Segment] = []
    reach = 1.5 * float(np.abs(at[1] - at[0]).max()) if _is_grid(each) else math.inf
    for i, j in graph.edges:
        apart = at[j] - at[i]
        if np.abs(apart).max() > reach:
            out = 0.3 * np.sign(apart) * reach
            lines += [(_pair(at[i]), _pair(at[i] - out)), (_pair(at[j]), _pair(at[j] + out))]
        else:
            lines.append((_pair(at[i]), _pair(at[j])))
    return lines


def text(each: Answer, *, braille: bool = True) -> Group | Text:
    """For a terminal: a picture of each round, or of the first few.

    Args:
        each: The topology.
        braille: Whether the terminal can show it; otherwise all are matrices of letters.
    """
    n = each.description.num_ranks
    if n > MOST_IN_A_MATRIX:
        return Text(f"{n} ranks are too many for a picture here; --draw graph.svg makes one.")
    shown = each.graphs[:_MOST_ROUNDS]
    if braille and n <= MOST_ON_A_CIRCLE:
        wide = 26 if n <= 8 or len(shown) > 1 else 44
        made = [canvas(each, graph, wide) for graph in shown]
        caption = "a line is both ways" if not each.description.directed else "a line is one way"
    else:
        made = [matrix(graph) for graph in shown]
        caption = "row i, column j: what i takes of j"
    if len(shown) > 1:
        made = [Text(f"round {number}\n") + one for number, one in enumerate(made)]
    left = "" if len(shown) == len(each.graphs) and each.description.period is not None else ", and so on"
    return Group(Columns(made, padding=(1, 3)), Text(f"({caption}{left})"))


def matrix(graph: Graph) -> Text:
    """A # for each weight that is not zero."""
    return Text("\n".join("".join("#" if weight > 0 else "." for weight in row) for row in graph.weights))


def canvas(each: Answer, graph: Graph, width: int) -> Text:
    """A picture of so many letters' width; each letter is 2 by 4 dots."""
    at = positions(each)
    height = max(3, round((width - 4) / 2 * float(np.abs(at[:, 1]).max())) + 2)
    dots = np.zeros((4 * height, 2 * width), dtype=bool)
    room = float(width - 6 if _is_grid(each) else width - 4)  # dots from the middle to the farthest rank
    middle = np.array([width * 1.0, height * 2.0])
    places = middle + at * [room, -room]
    for start, end in segments(each, graph, at):
        _line(dots, middle + np.array(start) * [room, -room], middle + np.array(end) * [room, -room])
    lines = [[_letter(dots[4 * y : 4 * y + 4, 2 * x : 2 * x + 2]) for x in range(width)] for y in range(height)]
    for rank, (x, y) in enumerate(places):
        label = str(rank)
        first = min(max(int(x / 2) - len(label) // 2, 0), width - len(label))
        lines[min(int(y / 4), height - 1)][first : first + len(label)] = label
    rows = ["".join(line).rstrip("\u2800 ") for line in lines]
    return Text("\n".join(row for row in rows if row))


def plot(answers: Sequence[Answer], path: Path) -> None:
    """Draws all into a file, a row for each topology and a column for each of its rounds.

    Raises:
        ConfigError: matplotlib cannot write such a file.
        CompatibilityError: matplotlib is not installed.
    """
    columns = max(min(len(each.graphs), _MOST_ROUNDS) for each in answers)
    figure = load_matplotlib()(figsize=(4 * columns, 4.3 * len(answers)), layout="constrained")
    if path.suffix.lower().lstrip(".") not in (known := figure.canvas.get_supported_filetypes()):
        raise ConfigError(f"--draw must end in one of {', '.join(sorted(known))}, got {path.name!r}; use graph.svg")
    grid = figure.subplots(len(answers), columns, squeeze=False)
    for row, each in zip(grid, answers, strict=True):
        for number, axes in enumerate(row):
            axes.set_axis_off()
            if number < len(each.graphs):
                _panel(axes, each, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _panel(axes: Any, each: Answer, number: int) -> None:
    at, graph = positions(each), each.graphs[number]
    size = max(3.0, 16.0 - 0.15 * len(at))
    style = "-|>" if graph.directed else "-"
    for start, end in segments(each, graph, at):
        axes.annotate(
            "", end, start,
            arrowprops={
                "arrowstyle": style, "color": COLOURS[2], "alpha": 0.7, "shrinkA": size / 2, "shrinkB": size / 2,
                "linewidth": 0.8,
            },
        )  # fmt: skip
    axes.plot(at[:, 0], at[:, 1], "o", color=COLOURS[1], markersize=size)
    if len(at) <= MOST_IN_A_MATRIX:
        for rank, (x, y) in enumerate(at):
            axes.text(x, y, str(rank), ha="center", va="center", fontsize=0.6 * size)
    several = f", round {number}" if len(each.graphs) > 1 else ""
    axes.set(title=f"{each.topology.name}, {len(at)} ranks{several}", xlim=(-1.4, 1.4), ylim=(-1.4, 1.4))
    axes.set_aspect("equal")


def _is_grid(each: Answer) -> bool:
    return isinstance(each.topology, Torus) and min(each.topology.shape(each.description.num_ranks)) > 1


def _pair(point: np.ndarray) -> tuple[float, float]:
    return float(point[0]), float(point[1])


def _line(dots: np.ndarray, start: np.ndarray, end: np.ndarray) -> None:
    count = int(np.abs(end - start).max()) + 1
    points = np.linspace(start, end, count).round().astype(int)
    inside = ((points >= 0) & (points < dots.shape[::-1])).all(1)
    dots[points[inside, 1], points[inside, 0]] = True


def _letter(dots: np.ndarray) -> str:
    """The braille letter of 4 by 2 dots."""
    bits = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
    return chr(0x2800 + int((dots * np.array(bits)).sum()))

"""Plots of histories: a value over rounds, bytes, virtual time and epsilon, and how often each client took part."""

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from distopt.errors import ConfigError
from distopt.federated.curves import AXES, Row, axis, curve, participation
from distopt.plotting import COLOURS, load_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT = 4.2, 3.5
_LABELS = {
    "round": ("round", 1),
    "bytes": ("MB sent, down and up", 1e6),
    "time_s": ("virtual seconds", 1),
    "epsilon": ("epsilon", 1),
}
_STYLES = ("-", "--", ":")  # with each colour in turn


def plot_histories(
    histories: Mapping[str, Iterable[Row]], path: str | os.PathLike[str], *, name: str = "accuracy", title: str = ""
) -> None:
    """Draws one value of several runs into the same axes: over rounds, bytes, and time and epsilon if all have them.

    Args:
        histories: By label, at most 24; a run stands in the legend in this order.
        path: Of the picture; its suffix says the format, as matplotlib knows them.
        name: Of the value.
        title: Above the picture.

    Raises:
        ConfigError: There is no history, there are too many to tell apart, or one has no such value.
        CompatibilityError: matplotlib is not installed.
    """
    _draw({label: list(rows) for label, rows in histories.items()}, path, name, title, per_client=False)


def plot_history(rows: Iterable[Row], path: str | os.PathLike[str], *, name: str = "accuracy", title: str = "") -> None:
    """Draws one run as `plot_histories` does, and beside it its epsilon and how often each client took part."""
    _draw({"": list(rows)}, path, name, title, per_client=True)


def _draw(runs: dict[str, list[Row]], path: str | os.PathLike[str], name: str, title: str, *, per_client: bool) -> None:
    most = len(COLOURS) * len(_STYLES)
    if not 1 <= len(runs) <= most:
        raise ConfigError(f"there must be 1 to {most} histories in one plot, got {len(runs)}; make several plots")
    over = [each for each in AXES if each != name and all(axis(rows, each) is not None for rows in runs.values())]
    curves = {label: {each: curve(rows, name, each) for each in over} for label, rows in runs.items()}
    spends = per_client and "epsilon" in over
    panels = len(over) + spends + per_client
    figure = load_matplotlib()(figsize=(_WIDTH * panels, _HEIGHT), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for at, each in zip(axes, over, strict=False):
        label_of_axis, unit = _LABELS[each]
        for number, (label, along) in enumerate(curves.items()):
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": _STYLES[number // len(COLOURS)]}
            places, values = zip(*along[each], strict=True)
            at.plot([place / unit for place in places], values, label=label, **style)
        _finish(at, label_of_axis, name)
    if spends:
        axes[-2].plot(*zip(*curve(runs[""], "epsilon"), strict=True), color=COLOURS[0])
        _finish(axes[-2], "round", "epsilon")
    if per_client:
        counts = sorted(participation(runs[""]).values(), reverse=True)
        axes[-1].fill_between(range(len(counts)), counts, step="mid", color=COLOURS[5])
        _finish(axes[-1], "clients that took part, most frequent first", "rounds")
        axes[-1].set_ylim(bottom=0)
    else:
        axes[0].legend(frameon=False)
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=130)


def _finish(axes: "Axes", xlabel: str, ylabel: str) -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)

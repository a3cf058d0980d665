"""`distopt link`: the link between the ranks of a job, measured as the job would use it, and what to do about it."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table

from distopt.cli.ranks import started
from distopt.comm import Link, gather_json, least_seconds, measure_link
from distopt.config import check_density
from distopt.ddp.forecast import Forecaster
from distopt.ddp.prediction import Predictor, measure_speed
from distopt.errors import ConfigError
from distopt.local import DiLoCo, Fragment, LocalSteps, Plan, SparseLoCo, choose, every_step, plan
from distopt.local.advice import check_goal
from distopt.plotting import COLOURS, load_matplotlib

RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
LOCAL_STEPS = (DiLoCo(), SparseLoCo())
_PROBE_NUMEL = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Question:
    """What was asked.

    Attributes:
        parameters: Of the model.
        density: Of the selection.
        ranks: Ranks to advise for; None for those that measure.
        link: Given instead of measured.
        values: On the wire.
        indices: On the wire.
        step_seconds: Of a step without any exchange; None not to advise on local steps.
        share: Of the time, that ranks shall compute.

    Raises:
        ConfigError: A value breaks its rule.
    """

    parameters: int
    density: float
    ranks: int | None
    link: Link | None
    values: str
    indices: str
    step_seconds: float | None = None
    share: float = 0.95

    def __post_init__(self) -> None:
        check_density("density", self.density)
        if self.step_seconds is not None:
            check_goal(self.step_seconds, self.share)


def answer(question: Question) -> dict[str, Any] | None:
    """Measures, on all ranks, and forecasts; None on every rank but the first.

    Raises:
        ConfigError: There is nothing to measure, or a value breaks its rule.
    """
    several = started()
    if not several and question.link is None:
        raise ConfigError(
            "distopt link measures between the ranks of a job, got one process; start it as the job is started "
            "(torchrun ... -m distopt.cli link), or give --latency and --bandwidth"
        )
    with _group(several) as size:
        device = torch.device("cpu")
        assert dist.group.WORLD is not None
        speed = measure_speed(dist.group.WORLD, device)
        link = question.link or measure_link(dist.group.WORLD, device)
        ranks = question.ranks or max(size, 2)
        work = _measure_work(ranks) if question.step_seconds is not None else []
        rank = dist.get_rank()
    forecaster = Forecaster(
        numel=question.parameters,
        predictor=Predictor(link=link, speed=speed),
        values=question.values,
        indices=question.indices,
    )
    fastest = forecaster.fastest(ranks, question.density)
    dense = forecaster.forecast("whole", ranks, question.density)
    plans = _plans(question, ranks, forecaster, work)
    if rank != 0:
        return None
    return {
        "question": asdict(question),
        "link": asdict(link) | {"measured_between": size if question.link is None else None},
        "ranks": ranks,
        "speed": asdict(speed),
        "break_even_density": {
            route: forecaster.break_even_density(ranks, route) for route in ("allgather", "balanced")
        },
        "fastest": asdict(fastest),
        "dense": asdict(dense),
        "curves": {
            route: [asdict(each) for each in found]
            for route, found in forecaster.curves(sorted({*RANKS, ranks}), question.density).items()
        },
        "local": [_as_plain(each) for each in plans],
        "take": _as_plain(choose(plans)) if plans else None,
    }


def _measure_work(ranks: int) -> list[float]:
    """Seconds per parameter of an exchange's work, for each of `LOCAL_STEPS`, on the slowest rank."""

    def of(algorithm: LocalSteps) -> float:
        fragment = Fragment(algorithm, [_PROBE_NUMEL], torch.randn(_PROBE_NUMEL))
        local = torch.randn(_PROBE_NUMEL)
        gathered = fragment.contribute_(local)
        gathered = gathered if fragment.reduces else gathered.expand(ranks, -1)

        def exchange() -> None:
            fragment.contribute_(local)
            fragment.take_(gathered, ranks)

        return least_seconds(exchange, torch.device("cpu")) / _PROBE_NUMEL

    assert dist.group.WORLD is not None
    told = gather_json([of(algorithm) for algorithm in LOCAL_STEPS], dist.group.WORLD, torch.device("cpu"))
    return [max(column) for column in zip(*told, strict=True)]


def _plans(question: Question, ranks: int, forecaster: Forecaster, work: list[float]) -> list[Plan]:
    """What each way to train costs; those that exchange in every step come first."""
    if question.step_seconds is None:
        return []
    step_seconds, share = question.step_seconds, question.share
    sparse = min(
        (forecaster.forecast(route, ranks, question.density) for route in ("allgather", "balanced")),
        key=lambda found: found.seconds,
    )
    plans = [
        every_step(
            name,
            exchange_s=found.seconds,
            link_bytes=found.link_bytes,
            step_seconds=step_seconds,
            share=share,
        )
        for name, found in (("dense", forecaster.forecast("whole", ranks, 1.0)), ("dgc", sparse))
    ]
    return plans + [
        plan(
            algorithm,
            forecaster.predictor.link,
            num_ranks=ranks,
            parameters=question.parameters,
            step_seconds=step_seconds,
            share=share,
            work_seconds=seconds * question.parameters,
        )
        for algorithm, seconds in zip(LOCAL_STEPS, work, strict=True)
    ]


def _as_plain(found: Plan) -> dict[str, Any]:
    plain = {field.name: getattr(found, field.name) for field in fields(found)}
    return plain | {"algorithm": None if found.algorithm is None else found.algorithm.to_dict()}


def table(found: dict[str, Any]) -> Table:
    """Seconds and bytes per step by route and number of ranks."""
    question = found["question"]
    made = Table(
        title=f"{question['parameters']:,} parameters at density {question['density']:g}, per rank and step",
        title_justify="left",
    )
    made.add_column("ranks", justify="right")
    for route in found["curves"]:
        made.add_column("dense" if route == "whole" else route, justify="right")
    for row in zip(*found["curves"].values(), strict=True):
        made.add_row(
            str(row[0]["num_ranks"]),
            *(f"{1e3 * each['seconds']:,.1f} ms, {each['link_bytes'] / 1e6:,.2f} MB" for each in row),
        )
    return made


def advice(found: dict[str, Any]) -> str:
    """The measured link and what to set, in a few lines."""
    link, fastest, dense, ranks = found["link"], found["fastest"], found["dense"], found["ranks"]
    between = link["measured_between"]
    lines = [
        f"Link ({'given' if between is None else f'measured between {between} ranks'}): latency "
        f"{1e6 * link['latency_s']:,.0f} us, {8 * link['bandwidth'] / 1e6:,.0f} Mbit/s"
        + (f", adding up {link['reduction'] / 1e9:,.1f} GB/s" if link["reduction"] else "")
    ]
    for route, density in found["break_even_density"].items():
        said = "never faster than dense" if density is None else f"faster than dense below density {density:.2g}"
        lines.append(f"{route}, {ranks} ranks: {said}")
    if fastest["route"] == "whole":
        lines.append(
            f"Advice for {ranks} ranks: leave compression off. Dense takes {1e3 * dense['seconds']:,.1f} ms per step "
            'on this link, and nothing is faster; exchange="auto" sends whole gradients here.'
        )
    else:
        lines.append(
            f'Advice for {ranks} ranks: exchange="{fastest["route"]}", {1e3 * fastest["seconds"]:,.1f} ms per step '
            f"against {1e3 * dense['seconds']:,.1f} ms dense ({dense['seconds'] / fastest['seconds']:,.1f}x); "
            'exchange="auto" finds it by itself.'
        )
    return "\n".join(lines)


_NAMES = {"dense": "dense DDP", "dgc": "DGC", "diloco": "DiLoCo", "sparseloco": "SparseLoCo"}


def local_table(found: dict[str, Any]) -> Table:
    """What each way to train costs, for steps of the length that was given."""
    question = found["question"]
    made = Table(
        title=f"{found['ranks']} ranks, {question['step_seconds']:g} s per step, to compute for "
        f"{question['share']:.0%} of the time",
        title_justify="left",
    )
    for name in ("inner_steps", "overlap", "MB per exchange", "s per exchange", "computing", "s per step"):
        if not made.columns:
            made.add_column("")
        made.add_column(name, justify="right")
    for each in found["local"]:
        made.add_row(
            _NAMES[each["name"]],
            str(each["inner_steps"]),
            str(each["overlap"]),
            f"{each['link_bytes'] / 1e6:,.3f}",
            f"{each['exchange_s']:,.3f}",
            f"{each['compute_share']:.1%}",
            f"{each['step_s']:,.3f}",
        )
    return made


def local_advice(found: dict[str, Any]) -> str:
    """Which of the ways to take, in a line or two."""
    take, share = found["take"], found["question"]["share"]
    way = _NAMES[take["name"]]
    if take["algorithm"] is not None:
        way = f"distopt.{way}(inner_steps={take['inner_steps']}"
        way += f", overlap={take['overlap']})" if take["overlap"] else ")"
    said = f"To train over this link: {way}, which computes for {take['compute_share']:.1%} of the time"
    if not take["reaches"]:
        return f"{said}. Nothing reaches {share:.0%} on this link; train a smaller model, or on a faster link."
    dense = found["local"][0]
    return f"{said}; dense DDP for {dense['compute_share']:.1%}. More local steps than these send less (docs/local.md)."


def plot(found: dict[str, Any], path: Path) -> None:
    """Bytes and seconds over the number of ranks, as a PNG."""
    figure_class = load_matplotlib()
    figure = figure_class(figsize=(10, 4), layout="constrained")
    for axes, key, label in zip(
        figure.subplots(1, 2), ("link_bytes", "seconds"), ("bytes per rank and step", "seconds per step"), strict=True
    ):
        for (route, curve), colour in zip(found["curves"].items(), COLOURS, strict=False):
            name = "dense" if route == "whole" else route
            axes.plot(
                [each["num_ranks"] for each in curve], [each[key] for each in curve], "o-", color=colour, label=name
            )
        axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel=label)
        axes.set_xticks(RANKS, [str(n) for n in RANKS])
        axes.grid(alpha=0.3)
        axes.legend()
    question = found["question"]
    figure.suptitle(f"{question['parameters']:,} parameters, density {question['density']:g}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


@contextlib.contextmanager
def _group(several: bool) -> Iterator[int]:
    """A gloo group of the ranks that were started, or of this process alone."""
    if several:
        dist.init_process_group("gloo")
    else:
        store = torch._C._distributed_c10d.HashStore()  # torch.distributed has it too, but does not export it
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield dist.get_world_size()
    finally:
        dist.destroy_process_group()

"""`distopt topology`: what topologies are worth on so many ranks, side by side, or one of them with its picture."""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from distopt.errors import ConfigError
from distopt.gossip import Description, EdgeList, Graph, Topology, describe

_DEFAULT_RANKS = 8
_WEIGHTS = {
    "symmetric": "rows and columns add up to 1: the plain average keeps the mean",
    "doubly": "not symmetric; rows and columns add up to 1: the plain average keeps the mean",
    "columns": "only columns add up to 1: push-sum keeps the mean, the plain average does not",
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """What was asked.

    Attributes:
        names: Of topologies; all whose settings have defaults if there are none and no edges.
        options: "key=value", settings of the topologies.
        edges: A file with an edge list, or None.
        directed: Whether its pairs are (sender, receiver).
        ranks: n; None for as many as the edge list has, else 8.
        parameters: Of the model.
        bytes_per_parameter: On the wire.
    """

    names: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    edges: Path | None = None
    directed: bool = False
    ranks: int | None = None
    parameters: int = 25_557_032
    bytes_per_parameter: int = 4


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A topology and what is known of it.

    Attributes:
        topology: Which.
        graphs: Of the first rounds: a whole period, or eight of one that never repeats.
        description: See `distopt.gossip.describe`.
    """

    topology: Topology
    graphs: tuple[Graph, ...]
    description: Description

    @property
    def neighbours(self) -> tuple[int, int]:
        """To how many others a rank sends in these rounds together, the fewest and the most."""
        ranks = range(self.description.num_ranks)
        counts = [len({to for graph in self.graphs for to in graph.receivers(rank)}) for rank in ranks]
        return min(counts), max(counts)

    @property
    def config(self) -> dict[str, Any]:
        """What `distopt.from_config` takes."""
        mixing = {} if self.description.keeps_mean else {"mixing": {"mixing": "push-sum"}}
        return {"algorithm": "gossip", "topology": self.topology.to_dict(), **mixing}


def answer(question: Question) -> list[Answer]:
    """Describes them.

    Raises:
        ConfigError: A name, an option or the file is wrong, or there is no such graph of so many ranks.
    """
    topologies = _topologies(question)
    ranks = question.ranks
    if ranks is None:
        ranks = _DEFAULT_RANKS
        for each in topologies:
            if isinstance(each, EdgeList):
                ranks = 1 + max(max(edge) for edge in each.edges)
    model_bytes = question.parameters * question.bytes_per_parameter
    return [_answered(each, ranks, model_bytes) for each in topologies]


def _answered(topology: Topology, ranks: int, model_bytes: int) -> Answer:
    description = describe(topology, ranks, model_bytes=model_bytes)
    graphs = tuple(topology.graph(ranks, number) for number in range(description.period or 8))
    return Answer(topology=topology, graphs=graphs, description=description)


def _topologies(question: Question) -> list[Topology]:
    options = dict(_option(each) for each in question.options)
    names = list(question.names)
    if not names and question.edges is None:
        names = [name for name, made in Topology._known.items() if not _needs(made)]
    settings = _settings(names)
    if unused := sorted(options.keys() - set[str]().union(*settings.values())):
        has = "; ".join(f"{name} has {', '.join(sorted(keys)) or 'none'}" for name, keys in settings.items())
        raise ConfigError(f"--option must name a setting of a topology, got {unused[0]!r}; {has or 'give a name too'}")
    found = []
    for name in names:
        given = {key: value for key, value in options.items() if key in settings.get(name, ())}
        if name in settings and (missing := sorted(_needs(Topology._known[name]) - given.keys())):
            raise ConfigError(
                f"{name!r} must be given its {missing[0]}, got none; give --edges FILE, or --option "
                "weights='[[0.5, 0.5], [0.5, 0.5]]', say"
            )
        found.append(Topology.from_dict({"topology": name, **given}))
    if question.edges is not None:
        found.append(EdgeList(edges=read_edges(question.edges), directed=question.directed))
    elif question.directed:
        raise ConfigError("--directed says how --edges is read, got it without; give a file, or leave it out")
    return found


def _needs(made: type[Topology]) -> set[str]:
    """Its settings without a default."""
    none = dataclasses.MISSING
    fields = dataclasses.fields(made)  # type: ignore[arg-type]  # every subclass is a dataclass
    return {each.name for each in fields if each.default is none and each.default_factory is none}


def _settings(names: Sequence[str]) -> dict[str, set[str]]:
    """Those that each of these topologies knows, unknown names left out."""
    known: dict[str, Any] = Topology._known
    return {name: {each.name for each in dataclasses.fields(known[name])} for name in names if name in known}


def _option(given: str) -> tuple[str, Any]:
    """("rows", 2) of "rows=2"; what is not JSON is text."""
    key, equals, text = given.partition("=")
    if not (key and equals):
        raise ConfigError(f"--option must be key=value, got {given!r}; write --option rows=2, say")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if isinstance(value, list):
        value = tuple(tuple(each) if isinstance(each, list) else each for each in value)
    return key, value


def read_edges(path: Path) -> tuple[tuple[int, int], ...]:
    """The pairs of a file with two ranks in each line, apart by blanks or a comma; behind # is a comment.

    Raises:
        ConfigError: It cannot be read, or a line is something else.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; give a text file with two ranks in each line") from error
    edges = []
    for number, line in enumerate(lines, 1):
        if not (said := line.partition("#")[0].strip()):
            continue
        pair = re.fullmatch(r"(\d+)(?:\s*,\s*|\s+)(\d+)", said)
        if pair is None:
            raise ConfigError(
                f"{path}, line {number}: an edge must be two ranks counted from 0, got {said!r:.80}; write '0 1', say"
            )
        edges.append((int(pair[1]), int(pair[2])))
    if not edges:
        raise ConfigError(f"{path} must hold one edge or more, got none; write a line '0 1', say")
    return tuple(edges)


def plain(each: Answer) -> dict[str, Any]:
    """As JSON can hold it."""
    fewest, most = each.neighbours
    described = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in dataclasses.asdict(each.description).items()
    }
    weights = [[[i, j, float(graph.weights[i, j])] for i, j in np.argwhere(graph.weights).tolist()]
               for graph in each.graphs]  # fmt: skip
    return {
        "topology": each.topology.to_dict(),
        **described,
        "fewest_neighbours": fewest,
        "most_neighbours": most,
        "config": each.config,
        "weights": weights,
    }


def comparison(answers: list[Answer], question: Question) -> Table:
    """A row each."""
    ranks = answers[0].description.num_ranks
    made = Table(title=f"{ranks} ranks, {_model(question)}", title_justify="left")
    made.add_column("topology", no_wrap=True)
    for heading in ("sends to", "bytes per round", "gap", "chi1", "chi2", "rounds", "bytes to agree", "exact after"):
        made.add_column(heading, justify="right")
    made.add_column("weights", no_wrap=True)
    for each in answers:
        d = each.description
        made.add_row(
            each.topology.name, _neighbours(each), _bytes(d.bytes_per_round), f"{d.spectral_gap:.4g}",
            _number(d.chi1), _number(d.chi2), _count(d.rounds_to_consensus), _bytes(_to_agree(d)),
            _count(d.exact_after), _weights(d),
        )  # fmt: skip
    return made


def single(each: Answer, question: Question) -> Table:
    """One topology's numbers, with what they mean."""
    d = each.description
    title = f"{each.topology.name}, {d.num_ranks} ranks, {_model(question)}"
    made = Table(title=title, title_justify="left", show_header=False)
    made.add_column(no_wrap=True)
    made.add_column(justify="right", no_wrap=True)
    made.add_column()
    for row in (
        ("sends to", _neighbours(each), "others"),
        ("messages", f"{d.messages:.4g}", "of the busiest rank in a round, on average"),
        ("bytes per round", _bytes(d.bytes_per_round), "that the busiest rank sends"),
        ("graphs", _period(d), "rounds until they begin again"),
        ("weights", _weights(d), _WEIGHTS[_weights(d)]),
        ("spectral gap", f"{d.spectral_gap:.6g}", "part of the disagreement that a round takes away in the long run"),
        ("chi1", _number(d.chi1), "of ranks that each meet a neighbour per step: the time that plain gossip needs"),
        ("chi2", _number(d.chi2), f"A2CiD2 needs sqrt(chi1 chi2): {_number(_accelerated(d))}"),
        (
            "rounds to consensus",
            _count(d.rounds_to_consensus),
            "until a thousandth of the disagreement is left; - is beyond 100,000",
        ),
        ("bytes to consensus", _bytes(_to_agree(d)), "that the busiest rank sends until then"),
        ("exact after", _count(d.exact_after), "rounds, whatever the ranks had; - is never"),
    ):
        made.add_row(*row)
    return made


def advice(answers: list[Answer]) -> str:
    """What each is configured by, and what must be known of it."""
    lines = [
        f'{each.topology.name}: the weights do not keep the mean, use mixing="push-sum".'
        for each in answers
        if not each.description.keeps_mean
    ]
    if len(answers) == 1:
        lines.append(f"Configuration: {json.dumps(answers[0].config)}")
    return "\n".join(lines)


def _model(question: Question) -> str:
    return f"{question.parameters:,} parameters of {question.bytes_per_parameter} bytes"


def _neighbours(each: Answer) -> str:
    fewest, most = each.neighbours
    return str(most) if fewest == most else f"{fewest} to {most}"


def _period(described: Description) -> str:
    return "new ones" if described.period is None else "the same" if described.period == 1 else str(described.period)


def _weights(described: Description) -> str:
    if not described.directed:
        return "symmetric"
    return "doubly" if described.keeps_mean else "columns"


def _to_agree(described: Description) -> float | None:
    if described.rounds_to_consensus is None or described.bytes_per_round is None:
        return None
    return described.rounds_to_consensus * described.bytes_per_round


def _accelerated(described: Description) -> float | None:
    if described.chi1 is None or described.chi2 is None:
        return None
    return math.sqrt(described.chi1 * described.chi2)


def _bytes(count: float | None) -> str:
    if count is None:
        return "-"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count:,.0f} B"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"

"""The code in docs/gossip.md and its pages runs as it stands there, and the pages name all that there is."""

import dataclasses
import re
from pathlib import Path

import docs_rank
import pytest
import torch

from distopt.config import Configurable
from distopt.gossip import Codec, Gossip, Mixing, RandomMatchings, Ring, Topology, describe
from distopt.gossip.simulated_mixer import SimulatedExchange

DOCS = Path(__file__).parents[2] / "docs"
ENTRY = DOCS / "gossip.md"
TOPOLOGIES, ALGORITHMS = (DOCS / "gossip" / f"{name}.md" for name in ("topologies", "algorithms"))


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.job
def test_the_code_of_the_entry_page_runs_on_ranks(ranks, tmp_path):
    found = ranks(2)(docs_rank.run_blocks, blocks(ENTRY), tmp_path)
    assert torch.equal(found[0][1], found[1][1])
    said = [output.splitlines() for output, _, _ in found]
    assert float(said[0][0]) == float(said[1][0])
    assert re.fullmatch(r"[\w.]+:\d+", said[0][1])
    for lines in said:
        assert lines[-1].startswith("variance correction needs an algorithm that stays right when averages are")
        assert "'accuracy': " in lines[-2]
    table = {name for cells in rows(ENTRY) if len(cells) == 2 for name in re.findall(r"`(\w+)`", cells[0])}
    assert found[0][2] <= table
    for rank in range(2):
        assert list((tmp_path / "runs" / "gossip" / f"rank-{rank}").iterdir())


@pytest.mark.job
@pytest.mark.parametrize("page", [TOPOLOGIES, ALGORITHMS], ids=lambda page: page.stem)
def test_the_code_of_the_other_pages_runs(monkeypatch, page):
    for kind in (Topology, Mixing):
        monkeypatch.setattr(kind, "_known", dict(kind._known))  # what a page adds is of this test alone
    names = {}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)


def rows(page):
    """The cells of all tables' rows."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_value_of_the_configuration_is_there_with_its_default():
    table = {cells[0]: cells for cells in rows(ENTRY) if re.fullmatch(r"`\w+`", cells[0]) and len(cells) == 4}
    assert set(table) == {f"`{field.name}`" for field in dataclasses.fields(Gossip)}
    for field in dataclasses.fields(Gossip):
        default = field.default.name if isinstance(field.default, Configurable) else field.default
        shown = f'"{default}"' if isinstance(default, str) else repr(default)
        assert table[f"`{field.name}`"][1] == f"`{shown}`"


@pytest.mark.parametrize(("kind", "page"), [(Topology, TOPOLOGIES), (Mixing, ALGORITHMS), (Codec, ALGORITHMS)])
def test_all_that_there_is_has_a_row_and_its_settings_are_named(kind, page):
    text = page.read_text()
    for name, made in kind._known.items():
        (row,) = (cells for cells in rows(page) if cells[0].startswith(f"`{made.__name__}("))
        assert row[1] == f"`{name}`"
        for field in dataclasses.fields(made):
            if field.default is dataclasses.MISSING:
                assert f"{made.__name__}({field.name}=" in text
            elif field.name != "codec":
                shown = f'"{field.default}"' if isinstance(field.default, str) else repr(field.default)
                assert f"`{field.name}={shown}`" in text, (name, field.name)


ON_RANDOM_PAIRS = {"a2cid2"}


@pytest.mark.parametrize("mixing", list(Mixing._known.values()), ids=lambda made: made.name)
def test_what_the_table_of_algorithms_says_is_so(mixing):
    (row,) = (cells for cells in rows(ALGORITHMS) if cells[0].startswith(f"`{mixing.__name__}("))
    _, _, sent, _, corrected, overlaps, kept = row
    assert corrected == ("yes" if mixing.can_correct else "no")
    assert overlaps == ("yes" if mixing.can_overlap else "no")
    topology = RandomMatchings() if mixing.name in ON_RANDOM_PAIRS else Ring()
    gossip = Gossip(topology=topology, mixing=mixing(), correction="off")
    nodes, width = 4, 1000
    vectors = torch.randn(nodes, width, dtype=torch.float64)
    state = gossip.rule.begin(vectors, gossip.surroundings(nodes))
    models = sum(tensor.shape == vectors.shape for tensor in state.values())
    assert kept.startswith(f"{models} model" if models else "nothing")
    exchange = SimulatedExchange(gossip.graphs, nodes, vectors.device)
    exchange.perform(lambda mixer: gossip.rule.exchange_(state, vectors, mixer, 0.1, None))
    messages = sum(len(gossip.graphs.graph(nodes).receivers(rank)) for rank in range(nodes))
    if mixing.name != "choco":
        assert sent.startswith(f"{round(exchange.bytes_sent / messages / (8 * width))} model")


def test_the_numbers_of_topologies_are_those_that_the_command_prints():
    shown = [[cell.strip("`") for cell in cells] for cells in rows(TOPOLOGIES) if len(cells) == 9][1:]
    assert {cells[0] for cells in shown} == set(Topology._known) - {"edges", "weights"}
    for name, _, _, gap, chi1, chi2, left, _, exact in shown:
        found = describe(Topology.from_dict({"topology": name}), 16)
        printed = [f"{found.spectral_gap:.4g}", *(f"{each:.4g}" if each else "" for each in (found.chi1, found.chi2))]
        assert [gap, chi1, chi2, left, exact] == [
            *printed,
            str(found.rounds_to_consensus),
            str(found.exact_after or ""),
        ]

"""`distopt topology`: what a topology is worth, beside others, and its picture."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from distopt.cli.app import app
from distopt.cli.topology import Question, answer, read_edges
from distopt.cli.topology_drawing import canvas, positions, segments, text
from distopt.errors import ConfigError
from distopt.gossip import Gossip, PushSum, Ring, Topology, Torus, describe
from distopt.job import from_config

PLAIN = {"COLUMNS": "160", "TERM": "dumb"}


def said(*arguments):
    ran = CliRunner(env=PLAIN).invoke(app, ["topology", *map(str, arguments)])
    assert ran.exit_code == 0, ran.output
    return ran.output


def told(*arguments):
    return json.loads(said(*arguments, "--json"))


def answered(name, ranks, **options):
    (found,) = answer(
        Question(names=(name,), ranks=ranks, options=tuple(f"{key}={value}" for key, value in options.items()))
    )
    return found


def test_one_topology_with_its_numbers_its_picture_and_its_configuration():
    output = said("ring", "--ranks", 16, "--parameters", 1_000_000)
    described = describe(Ring(), 16)
    for number in (f"{described.spectral_gap:.6g}", f"{described.chi1:.4g}", f"{described.rounds_to_consensus}"):
        assert number in output
    assert "8 MB" in output  # two messages of a million floats
    assert "symmetric" in output
    drawn = output.partition("└")[2]
    for rank in range(16):
        assert str(rank) in drawn
    config = json.loads(output.partition("Configuration: ")[2])
    assert from_config(config) == Gossip(topology=Ring())


def test_several_are_a_row_each_and_without_a_name_all_are():
    lines = [line for line in said("ring", "torus", "--ranks", 9).splitlines() if "symmetric" in line]
    assert [line.split()[1] for line in lines] == ["ring", "torus"]
    everything = {each["topology"]["topology"] for each in told()}
    assert everything == set(Topology._known) - {"edges", "weights"}


def test_json_is_what_describe_says_and_the_weights():
    (found,) = told("one-peer-exponential", "--ranks", 4, "--parameters", 10, "--values", "bf16")
    assert (found["exact_after"], found["period"], found["bytes_per_round"]) == (2, 2, 20)
    assert (found["fewest_neighbours"], found["most_neighbours"]) == (2, 2)
    product = np.eye(4)
    for entries in found["weights"]:
        weights = np.zeros((4, 4))
        for i, j, weight in entries:
            weights[i, j] = weight
        product = weights @ product
    np.testing.assert_allclose(product, 0.25, atol=1e-15)


def test_settings_of_a_topology():
    assert answered("torus", 12, rows=2).topology == Torus(rows=2)
    assert answered("random-matchings", 9, of="ring").topology.of == Ring()
    (found,) = told("weights", "--ranks", 2, "--option", "weights=[[0.75, 0.25], [0.25, 0.75]]")
    assert found["weights"] == [[[0, 0, 0.75], [0, 1, 0.25], [1, 0, 0.25], [1, 1, 0.75]]]


def test_an_edge_list_of_ones_own(tmp_path):
    path = tmp_path / "graph.txt"
    path.write_text("# a triangle and a tail\n0 1\n1, 2\n\n2 0\n3 0  # back\n2 3\n")
    assert read_edges(path) == ((0, 1), (1, 2), (2, 0), (3, 0), (2, 3))
    (found,) = told("--edges", path)
    assert (found["num_ranks"], found["keeps_mean"], found["directed"]) == (4, True, False)
    output = said("--edges", path, "--directed")
    assert 'use mixing="push-sum"' in output
    assert from_config(json.loads(output.partition("Configuration: ")[2])).rule == PushSum()
    assert "ring" in said("ring", "--edges", path)


@pytest.mark.parametrize("name", sorted(set(Topology._known) - {"edges", "weights"}))
@pytest.mark.parametrize("ranks", [1, 2, 9])
def test_every_topology_has_a_picture_of_all_its_edges(name, ranks):
    found = answered(name, ranks)
    at = positions(found)
    assert at.shape == (ranks, 2)
    assert np.abs(at).max() <= 1 + 1e-12
    assert len({tuple(place) for place in at.round(9).tolist()}) == ranks
    for graph in found.graphs:
        drawn = segments(found, graph, at)
        stubs = len(drawn) - len(graph.edges)
        ends = [end for segment in drawn for end in segment]
        assert sum(any(np.allclose(end, place) for place in at) for end in ends) == 2 * len(drawn) - 2 * stubs
        assert stubs == (6 if (name, ranks) == ("torus", 9) else 0)
        picture = str(canvas(found, graph, 40))
        assert all(str(rank) in picture for rank in range(ranks))
        assert any(0x2800 < ord(letter) < 0x2900 for letter in picture) == bool(graph.edges)


def test_a_matrix_where_dots_would_not_do(tmp_path):
    found = answered("ring", 5)
    rows = "##..#\n###..\n.###.\n..###\n#..##"
    from rich.console import Console

    def shown(one, **settings):
        console = Console(width=100, file=(tmp_path / "shown").open("w"))
        console.print(text(one, **settings))
        console.file.close()
        lines = (tmp_path / "shown").read_text().splitlines()
        return "\n".join(line.rstrip() for line in lines)

    assert shown(found, braille=False).startswith(rows)
    assert shown(answered("ring", 30)).count("#") == 90
    assert "round 1" in shown(answered("one-peer-exponential", 8), braille=False)
    assert "too many for a picture" in shown(answered("ring", 100))


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_pictures_in_files(tmp_path, ending):
    path = tmp_path / "new" / f"graph.{ending}"
    assert f"Picture: {path}" in said("torus", "one-peer-exponential", "--ranks", 6, "--draw", path)
    assert path.read_bytes().startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    if ending == "svg":
        assert path.read_text().count("one-peer-exponential, 6 ranks, round") == 3  # as comments of the letters' paths


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rng"], r"'topology' must be one of .*, got 'rng'; perhaps 'ring' is meant"),
        (["ring", "--option", "rows=2"], r"--option must name a setting of a topology, got 'rows'; ring has none"),
        (["torus", "--option", "rows"], r"--option must be key=value, got 'rows'; write --option rows=2"),
        (["torus", "--option", "rows=5"], r"rows must divide the number of ranks, got 5 for 8; leave it out"),
        (["torus", "--option", "rows=two"], r"rows must be an integer of at least 1, got 'two'"),
        (["edges"], r"'edges' must be given its edges, got none; give --edges FILE"),
        (["--directed"], r"--directed says how --edges is read, got it without; give a file"),
        (["--edges", "nowhere.txt"], r"nowhere.txt cannot be read: .*; give a text file with two ranks in each line"),
        (["ring", "--draw", "graph.doc"], r"--draw must end in one of .*svg.*, got 'graph.doc'; use graph.svg"),
    ],
)
def test_what_is_wrong_is_said_with_a_remedy(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        CliRunner(env=PLAIN).invoke(app, ["topology", *arguments], catch_exceptions=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("0 1\n1\n", [], r"line 2: an edge must be two ranks counted from 0, got '1'; write '0 1'"),
        ("0 -1\n", [], r"line 1: an edge must be two ranks counted from 0, got '0 -1'"),
        ("# nothing\n", [], r"must hold one edge or more, got none"),
        ("0 1\n2 3\n", [], r"the graph must be connected.*nothing of rank 0 reaches ranks 2, 3; add edges"),
        ("0 1\n", ["--ranks", "3"], r"equally many ranks, got 2 and 3; start as many"),
    ],
)
def test_files_that_are_no_graph(tmp_path, content, arguments, message):
    path = tmp_path / "graph.txt"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        CliRunner(env=PLAIN).invoke(app, ["topology", "--edges", str(path), *arguments], catch_exceptions=False)

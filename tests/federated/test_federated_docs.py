"""The code in docs/federated.md and its pages runs as it stands there, and the pages name all that there is."""

import re
from pathlib import Path

import pytest

from distopt.config import Algorithm
from distopt.errors import ConfigError
from distopt.federated import Delays, FederatedAlgorithm, Participation, Partition, TracedParticipation
from distopt.federated.server_optimizer import ServerOptimizer

DOCS = Path(__file__).parents[2] / "docs"
ENTRY = DOCS / "federated.md"
PAGES = sorted((DOCS / "federated").glob("*.md"))
RUN_IT = "from distopt.cli import main; main()"


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def saved(block, folder):
    """Writes a block that begins with a file's name to that file, and returns it."""
    path = folder / re.match(r"# (\S+)\n", block)[1]
    path.write_text(block)
    return path


@pytest.mark.job
def test_the_code_runs_and_the_plugin_s_error_is_the_one_shown(tmp_path, monkeypatch, warm_python):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Algorithm, "_known", dict(Algorithm._known))  # the plugin is of this test alone
    names = {}
    for block in blocks(ENTRY, "python"):
        exec(compile(block, str(ENTRY), "exec"), names)
    assert names["history"].rounds_to("accuracy", 0.7) is not None
    assert names["timed"].time_to("accuracy", 0.7) is not None
    made = {path.name for path in tmp_path.iterdir()}
    assert {"history.png", "history.csv", "compared.png", "events", "run.pt"} <= made

    names["simulation"](names["FedPower"]()).run(3)
    with pytest.raises(ConfigError, match=r"unknown key 'powr' for algorithm 'fedpower'; known keys are .*power"):
        FederatedAlgorithm.from_dict({"algorithm": "fedpower", "powr": 1})
    for page in PAGES:
        for block in blocks(page, "python"):
            exec(compile(block, str(page), "exec"), dict(names))

    (plugin,) = (block for block in blocks(ENTRY, "python") if "class FedPower" in block)
    saved(plugin, tmp_path)
    job = saved(*blocks(ENTRY, "toml"), tmp_path)
    wrong = warm_python.run(RUN_IT, "simulate", job.name, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert wrong.stderr == "".join(blocks(ENTRY, "text"))
    assert wrong.returncode == 1
    job.write_text(job.read_text().replace("power = 2", "power = 0.3"))
    right = warm_python.run(RUN_IT, "simulate", job.name, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert "fedpower, 5 rounds" in right.stdout, right.stderr


def test_the_traces_that_are_shown_say_the_same(tmp_path):
    shown = [("csv", block) for block in blocks(ENTRY, "csv")] + [("json", block) for block in blocks(ENTRY, "json")]
    assert len(shown) == 3
    for number, (kind, block) in enumerate(shown):
        path = tmp_path / f"{number}.{kind}"
        path.write_text(block)
        process = TracedParticipation(path=str(path)).begin(3)
        assert [process.next_round().tolist() for _ in range(3)] == [[0], [0, 2], [0]], block


@pytest.mark.parametrize(
    ("kind", "pages"),
    [
        (FederatedAlgorithm, PAGES),
        (ServerOptimizer, PAGES),
        (Partition, [ENTRY]),
        (Participation, [ENTRY]),
        (Delays, [ENTRY]),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_everything_that_there_is_has_a_place_in_the_documents(kind, pages):
    text = "".join(page.read_text() for page in pages)
    for name, made in kind._known.items():
        if issubclass(made, kind) and made.__module__.startswith("distopt.federated.") and name != "plain":
            assert re.search(rf"`{made.__name__}\b", text), made
            assert f"`{name}`" in text, name

"""Histories: time to a target in rounds, bytes and virtual seconds, who took part, plots, TensorBoard, the bar."""

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from distopt.errors import CompatibilityError, ConfigError, StateMismatchError
from distopt.federated import History, ProgressBar, TensorBoard, plot_histories, progress
from tensorboard_events import scalars

PNG = b"\x89PNG"

ANSI = {"TERM": "xterm"}  # whatever terminal the tests themselves run in


def made(accuracies=(0.1, None, 0.5, 0.4, 0.9), *, timed=True):
    """Round r sends 10 r bytes and ends at 1.5 r; client r mod 3 takes part, and client 7 always."""
    rows = []
    for round, accuracy in enumerate(accuracies, start=1):
        row = {"round": round, "participants": [round % 3, 7], "bytes_down": 4 * round, "bytes_up": 6 * round}
        row["refused"] = 0
        if timed:
            row["time_s"] = 1.5 * round
        if accuracy is not None:
            row |= {"accuracy": accuracy, "loss": 1 - accuracy}
        rows.append(row)
    return History(rows)


def test_time_to_a_target_in_rounds_bytes_and_virtual_seconds():
    history = made()
    for target, round in ((0.05, 1), (0.5, 3), (0.6, 5), (0.9, 5)):
        assert history.rounds_to("accuracy", target) == round
        assert history.bytes_to("accuracy", target) == sum(10 * r for r in range(1, round + 1))
        assert history.time_to("accuracy", target) == 1.5 * round
        assert history.rounds_to("loss", 1 - target, falling=True) == round
    assert history.rounds_to("accuracy", 0.91) is history.bytes_to("accuracy", 0.91) is None
    assert history.time_to("accuracy", 0.91) is None
    assert history.bytes_to("accuracy", 0.9) == history.total_bytes()


def test_without_delays_there_is_no_virtual_time():
    history = made(timed=False)
    assert not history.has_time
    assert made().has_time
    assert not History().has_time
    with pytest.raises(ConfigError, match=r"'time_s' to look at 'accuracy' over it.*give the simulation delays"):
        history.time_to("accuracy", 0.5)
    with pytest.raises(ConfigError, match="there must be a round with 'perplexity', got none; rounds have accuracy"):
        history.bytes_to("perplexity", 1.0)


@given(st.lists(st.sets(st.integers(0, 9)), max_size=8))
def test_participation_counts_every_client_of_every_round(rounds):
    found = History([{"round": r, "participants": sorted(ids)} for r, ids in enumerate(rounds, 1)]).participation()
    assert list(found) == sorted(set().union(*rounds))
    assert all(count == sum(client in ids for ids in rounds) for client, count in found.items())


@pytest.mark.parametrize("timed", [False, True])
def test_plots_of_one_run_and_of_several(tmp_path, timed):
    made(timed=timed).plot(tmp_path / "one.png", title="a run")
    made(timed=timed).plot(tmp_path / "loss.svg", "loss")
    assert (tmp_path / "one.png").read_bytes().startswith(PNG)
    assert "<svg" in (tmp_path / "loss.svg").read_text()
    runs = {f"run {number}": made(timed=timed or number > 0) for number in range(9)}
    plot_histories(runs, tmp_path / "several.png", title="all")
    assert (tmp_path / "several.png").read_bytes().startswith(PNG)


def test_a_plot_has_a_panel_for_each_axis_that_all_runs_have(tmp_path, monkeypatch):
    drawn = {}

    def savefig(figure, path, **_):
        drawn[path] = [
            (axes.get_xlabel(), [list(map(float, line.get_xdata())) for line in axes.lines]) for axes in figure.axes
        ]

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    made((0.1, 0.2)).plot("one")
    megabytes = [1e-5, 3e-5]
    assert drawn["one"] == [
        ("round", [[1, 2]]),
        ("MB sent, down and up", [megabytes]),
        ("virtual seconds", [[1.5, 3.0]]),
        ("clients that took part, most frequent first", []),
    ]
    plot_histories({"timed": made((0.1, 0.2)), "not": made((0.1, None), timed=False)}, "two")
    assert drawn["two"] == [("round", [[1, 2], [1]]), ("MB sent, down and up", [megabytes, megabytes[:1]])]


@pytest.mark.parametrize("number", [0, 25])
def test_more_runs_than_can_be_told_apart(tmp_path, number):
    with pytest.raises(ConfigError, match=f"must be 1 to 24 histories in one plot, got {number}"):
        plot_histories({str(run): made() for run in range(number)}, tmp_path / "many.png")


def test_a_file_that_is_no_history(tmp_path):
    (tmp_path / "history.json").write_text("[1,")
    with pytest.raises(StateMismatchError, match="must be a history in JSON"):
        History.read(tmp_path / "history.json")


# -- TensorBoard ---------------------------------------------------------------------------------------------------


def events(folder):
    """Of each name, [(step, value, time)]."""
    return {
        name: [(event.step, round(event.value, 6), event.wall_time) for event in found]
        for name, found in scalars(folder).items()
    }


def test_what_tensorboard_reads_is_the_history(tmp_path):
    made().write_tensorboard(tmp_path)
    found = events(tmp_path)
    assert set(found) == {"accuracy", "loss", "clients", "bytes/down", "bytes/up"}
    assert found["accuracy"] == [(1, 0.1, 1.5), (3, 0.5, 4.5), (4, 0.4, 6.0), (5, 0.9, 7.5)]
    assert found["bytes/up"] == [(round, 6 * round, 1.5 * round) for round in range(1, 6)]


def test_a_resumed_run_hides_what_it_computes_once_more(tmp_path):
    rows = list(made(timed=False))
    with TensorBoard(tmp_path) as board:
        for row in rows[:4]:
            board(row)
    with TensorBoard(tmp_path) as board:
        for row in rows[2:]:
            board(row)
    assert [step for step, _, _ in events(tmp_path)["clients"]] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("module", "make"), [("tensorboard", lambda: TensorBoard("x")), ("rich", lambda: ProgressBar(9))]
)
def test_what_is_not_installed_is_said_when_it_is_asked_for(monkeypatch, module, make):
    for name in list(sys.modules):
        if name.partition(".")[0] == module or name.startswith("torch.utils.tensorboard"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # importing it now raises ModuleNotFoundError
    with pytest.raises(CompatibilityError, match=f'needs {module}, which is not installed.*pip install "torch-distopt'):
        make()


# -- the bar -------------------------------------------------------------------------------------------------------


def shown(rounds, rows, **console):
    file = io.StringIO()
    bar = ProgressBar(rounds, Console(file=file, width=100, **console))
    for row in rows:
        bar(row)
    return file.getvalue()


def test_a_log_gets_some_lines_the_last_round_among_them():
    said = shown(200, made([0.5] * 199 + [0.75])).splitlines()
    assert len(said) == progress._LINES
    assert said[-1] == "round 200/200: accuracy 0.7500, loss 0.2500"
    assert shown(3, made((None, 0.5, None))).splitlines() == ["round 2/3: accuracy 0.5000, loss 0.5000"]


def test_a_terminal_gets_a_bar_that_ends_with_the_last_round():
    said = shown(5, made(), force_terminal=True, color_system=None, _environ=ANSI)
    assert "5/5" in said
    assert "accuracy 0.9000, loss 0.1000" in said
    assert said.endswith("\x1b[?25h")  # the cursor is back


def test_a_run_that_raises_leaves_the_terminal_as_it_was():
    file = io.StringIO()
    bar = ProgressBar(5, Console(file=file, force_terminal=True, color_system=None, _environ=ANSI))
    bar(made().rows[0])
    del bar
    assert file.getvalue().endswith("\x1b[?25h")

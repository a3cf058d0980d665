"""`distopt simulate`: a file in, a history out; what is wrong in the file is said with its table, value and rule."""

import csv
import json
import os
import signal

import pytest
import torch
from typer.testing import CliRunner

from distopt.cli import datasets, simulate_config
from distopt.cli.app import app
from distopt.cli.models import CNN, MLP, Softmax
from distopt.cli.simulate import Job
from distopt.config import Algorithm
from distopt.errors import ConfigError, StateMismatchError
from distopt.federated import History, IIDPartition
from example_ranks import run_ranks

PLAIN = {"COLUMNS": "200", "TERM": "dumb"}
SMALL = """
[data]
clients = 10
[model]
model = "softmax"
[algorithm]
algorithm = "fedavg"
[local]
steps = 2
lr = 0.05
[participation]
participation = "uniform"
count = 3
[run]
rounds = 6
evaluate_every = 2
checkpoint_every = 2
"""


def invoke(*arguments):
    return CliRunner(env=PLAIN).invoke(app, ["simulate", *map(str, arguments)])


def simulated(*arguments):
    ran = invoke(*arguments)
    assert ran.exit_code == 0, ran.output + repr(ran.exception)
    return ran.output


def refused(*arguments):
    """The error's message; the command line prints it after the program's name (test_app.py)."""
    ran = invoke(*arguments)
    assert isinstance(ran.exception, ConfigError | StateMismatchError), ran.output + repr(ran.exception)
    return str(ran.exception)


@pytest.fixture
def small(tmp_path):
    """`small(old, new)` writes a small job with some text replaced; its path."""

    def write(old="", new="", also=""):
        assert old in SMALL
        path = tmp_path / "job.toml"
        path.write_text(also + SMALL.replace(old, new, 1))
        return path

    return write


@pytest.mark.job
def test_the_default_learns_and_leaves_a_table_a_history_a_plot_and_a_summary(tmp_path):
    assert "run it with" in simulated(tmp_path / "job.toml", "--init")
    said = simulated(tmp_path / "job.toml", "--out", tmp_path / "out")
    assert "digits, 50 clients (dirichlet, bernoulli), mlp, fedau, 200 rounds" in said
    assert "\x1b" not in said
    history = History.read(tmp_path / "out" / "history.json")
    assert len(history) == 200
    assert f"Final accuracy {history.last('accuracy'):.2%} after 200 rounds" in said
    assert history.last("accuracy") > 0.9
    with (tmp_path / "out" / "history.csv").open() as file:
        assert [int(row["round"]) for row in csv.DictReader(file)] == list(range(1, 201))
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / "out" / "summary.json").read_text())
    target = content["summary"]["target"]
    assert target["round"] == history.rounds_to("accuracy", 0.9)
    assert target["bytes"] == history.bytes_to("accuracy", 0.9)
    assert target["virtual_s"] is None
    assert f"Accuracy 90.00% after {target['round']} rounds" in said
    assert content["config"]["participation"]["probability"] == "correlated"
    assert {"machine", "versions"} <= set(content)


def test_the_default_file_is_written_or_printed_and_is_a_job(tmp_path):
    simulated(tmp_path / "job.toml", "--init")
    assert simulated("--init") == (tmp_path / "job.toml").read_text() == simulate_config.default_text()
    job = Job(simulate_config.read(tmp_path / "job.toml"), tmp_path, print)
    assert job.title == "digits, 50 clients (dirichlet, bernoulli), mlp, fedau, 200 rounds"
    assert len(job.simulation.run(2)) == 2


def test_a_file_that_exists_is_not_replaced(small):
    assert "must not exist yet" in refused(small(), "--init")
    assert small().read_text() == SMALL


def test_the_default_file_shows_every_key_of_its_own_tables():
    text = simulate_config.default_text()
    for kind in (simulate_config.Data, simulate_config.Run, simulate_config.Output):
        for key in kind.__dataclass_fields__:
            assert f"\n{key} = " in text or f"\n# {key} = " in text, key


def test_it_goes_on_where_it_was_and_says_so(small, tmp_path):
    path = small()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    simulated(path, "--out", whole)
    simulated(small("rounds = 6", "rounds = 4"), "--out", parts)
    said = simulated(small(), "--out", parts)
    assert "goes on after round 4 of 6" in said
    assert (parts / "history.json").read_text() == (whole / "history.json").read_text()
    assert "goes on after round 6 of 6" in simulated(path, "--out", parts)  # finished: says it all once more
    assert "goes on" not in simulated(path, "--out", parts, "--restart")
    assert (parts / "history.json").read_text() == (whole / "history.json").read_text()


KILLED = """
import os, signal, sys
from distopt import federated
from distopt.cli import main, simulate

class Dying(federated.ProgressBar):
    def __call__(self, row):
        if row["round"] == 5:
            os.kill(os.getpid(), signal.SIGKILL)

simulate.ProgressBar = Dying
main()
"""


@pytest.mark.job
def test_killed_and_started_again_it_ends_with_the_same_history(warm_python, small, tmp_path):
    path = small()
    ran = warm_python.run(KILLED, "simulate", path, "--out", tmp_path / "killed", OMP_NUM_THREADS="1")
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    assert not os.path.exists(tmp_path / "killed" / "history.json")
    simulated(path, "--out", tmp_path / "whole")
    assert "goes on after round 4 of 6" in simulated(path, "--out", tmp_path / "killed")
    whole, killed = (tmp_path / name / "history.json" for name in ("whole", "killed"))
    assert killed.read_text() == whole.read_text()


def test_another_job_does_not_go_on_from_a_checkpoint(small, tmp_path):
    simulated(small("rounds = 6", "rounds = 2"), "--out", tmp_path)
    for old, new, said in (
        ('"fedavg"', '"fedprox"', "[algorithm]: algorithm must be 'fedavg'"),
        ("clients = 10", "clients = 11", "[data]: clients must be 10"),
        ("count = 3", "count = 4", "[participation]: count must be 3"),
        ("rounds = 6", "rounds = 6\nseed = 1", "[run]: seed must be 0"),
        ("steps = 2", "epochs = 1", "[local]: epochs must be None"),
    ):
        message = refused(small(old, new), "--out", tmp_path)
        assert f"job.toml, {said}" in message
        assert "start it anew with --restart, or give another folder with --out" in message
    simulated(small(old, new), "--out", tmp_path, "--restart")


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("[run]", "[runs]", ["unknown table 'runs'", "known ones are data, partition"]),
        ("rounds = 6", "round = 6", ["[run]", "unknown key 'round' for run", "rounds, seed"]),
        ("rounds = 6", "rounds = 0", ["[run]", "rounds must be an integer of at least 1, got 0", "in all"]),
        ("[model]", '[partition]\npartition = "natural"\n[model]', ["[partition]", "got 'natural'", "ClientData"]),
        ("rounds = 6", "rounds 6", ["must be TOML", "line"]),
        ('"fedavg"', '"fedaverage"', ["[algorithm]", "must be one of async-fedavg, average-all", "got 'fedaverage'"]),
        ('"fedavg"', '"fedagv"', ["[algorithm]", "got 'fedagv'; perhaps 'fedavg' is meant"]),
        ('"fedavg"', '"topk"', ["[algorithm]", "got 'topk'"]),  # known, but not federated
        ('[algorithm]\nalgorithm = "fedavg"', "", ["algorithm must be a table, got None", "write [algorithm]"]),
        ('"fedavg"', '"fedavg"\nweigting = 1', ["[algorithm]", "key 'weigting'", "perhaps 'weighting' is meant"]),
        ("lr = 0.05", "lr = -1", ["[local]", "lr must be a number above 0, got -1", "use 0.1"]),
        ("lr = 0.05", "options = { momentun = 1 }", ["[local]", "arguments of SGD", "momentun"]),
        ("count = 3", "count = 30", ["[participation]", "at most the number of clients, 10, got 30"]),
        ("count = 3", "mean = 0.1", ["[participation]", "probability must be 'correlated' beside mean, got None"]),
        ("[run]", '[delays]\ndelays = "constant"\nmean = 1\n[run]', ["[delays]", "unknown key 'mean'", "mean_s"]),
        ("[run]", "[delays]\nslowest = 2\n[run]", ["[delays]", "'delays' must be one of constant", "got None"]),
        ("rounds = 6", 'rounds = 6\nmode = "fast"', ["[run]", "mode must be one of 'auto', 'loop'"]),
        ("clients = 10", 'dataset = "nowhere"', ["[data]", "must be a folder with", "'nowhere'", "'fashion-mnist'"]),
        ("clients = 10", "clients = 2000", ["[partition]", "at most the number of samples, 1437, got 2000"]),
        ('"softmax"', '"resnet"', ["[model]", "must be one of cnn, mlp, softmax", "'resnet'"]),
        ("rounds = 6", 'rounds = 6\nexclude = ["batch-norm"]', ["[run]", "exclude must name what the model has"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_runs(small, tmp_path, old, new, parts):
    message = refused(small(old, new), "--out", tmp_path / "out")
    for part in [str(tmp_path / "job.toml"), *parts]:
        assert part in message
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_there_and_none_at_all(tmp_path):
    assert f"distopt simulate --init {tmp_path / 'none.toml'}" in refused(tmp_path / "none.toml")
    assert "CONFIG must be a TOML file, got none" in refused()


PLUGIN = """
from dataclasses import dataclass
from distopt.federated import SummedDeltas

@dataclass(frozen=True, kw_only=True)
class First(SummedDeltas, name="first-for-a-test"):
    def weights(self, memory, replies):
        return [float(reply is replies[0]) for reply in replies]
"""


def test_an_algorithm_of_a_file_beside_the_configuration(small, tmp_path, monkeypatch):
    monkeypatch.setattr(Algorithm, "_known", dict(Algorithm._known))  # it is of this test alone
    (tmp_path / "first.py").write_text(PLUGIN)
    plugins = 'plugins = ["first.py"]\n'
    said = simulated(small('"fedavg"', '"first-for-a-test"', plugins), "--out", tmp_path)
    assert "first-for-a-test" in said
    assert "got 'none.py'" in refused(small(also='plugins = ["none.py"]\n'))
    assert "must be a list of Python files" in refused(small(also='plugins = "first.py"\n'))
    for code, said in (
        ("import nowhere", "got ModuleNotFoundError from {} (line 1)"),
        ("a = 1\nb = a.c", "got AttributeError from {} (line 2)"),
        ("a = = 1", "got SyntaxError from {}: invalid syntax (first.py, line 1)"),
        ("import json\n\njson.loads('{{')", "got JSONDecodeError from {} (line 3)"),  # of this file, not of json's
        (
            PLUGIN.replace("first-for-a-test", "fedavg"),
            "got 'fedavg' for First, which is distopt.federated.fedavg.FedAvg's",
        ),
    ):
        (tmp_path / "first.py").write_text(code)
        assert said.format(tmp_path / "first.py") in refused(small(also=plugins))


def test_known_participation_knows_that_of_the_model_of_participation(small, tmp_path):
    bernoulli = 'participation = "bernoulli"\nprobability = "correlated"'
    text = small('"fedavg"', '"known-participation"').read_text()
    path = tmp_path / "job.toml"
    path.write_text(text.replace('participation = "uniform"\ncount = 3', bernoulli))
    settings = simulate_config.read(path)
    clients = simulate_config.ClientData.split(
        (torch.zeros(100, 1), torch.arange(100) % 10), IIDPartition(), settings.data.clients
    )
    participation = settings.participation(clients)
    assert len(set(participation.probability)) > 1
    assert settings.algorithm(clients, participation.begin(10), None).probability == participation.probability


DELAYS = '[delays]\ndelays = "constant"\nslowest = 5.0\n[run]'


def test_an_algorithm_that_does_not_wait_in_virtual_time(small, tmp_path):
    """FedFix with an interval of the slowest client's 5 s is told the clients' times, and so waits for everybody."""
    fedfix = '"fedfix"\ninterval_s = 5.0\ntimes_s = "delays"'
    path = small("[run]", DELAYS + "\nspill = true")
    path.write_text(path.read_text().replace('"fedavg"', fedfix).replace("rounds = 6", "rounds = 4"))
    said = simulated(path, "--out", tmp_path / "out")
    assert "10 clients (iid, uniform, constant), softmax, fedfix, 4 rounds" in said
    assert "virtual s" in said
    assert "20.0 virtual seconds" in said
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["summary"]["virtual_s"] == 20.0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["algorithm"]["times_s"][0] == 1.0
    assert config["algorithm"]["times_s"][-1] == 5.0
    path.write_text(path.read_text().replace("slowest = 5.0", "slowest = 4.0"))
    assert "[algorithm]: times_s must be [1.0" in refused(path, "--out", tmp_path / "out")
    for lines, message in (
        ('"fedbuff"', "[delays]: there must be delays for an algorithm that does not wait, got none for 'fedbuff'"),
        (fedfix, "[algorithm]: times_s must be given where [delays] does not say it"),
    ):
        assert message in refused(small('"fedavg"', lines))


def test_a_folder_that_cannot_go_on(small, tmp_path):
    out = tmp_path / "out"
    simulated(small(), "--out", out)
    assert f"rounds must be at least the 6 that are done ({out / 'checkpoint.pt'}), got 3" in refused(
        small("rounds = 6", "rounds = 3"), "--out", out
    )
    (out / "config.json").write_text("{")
    assert "config.json must be as the run wrote it, got JSONDecodeError" in refused(small(), "--out", out)
    (out / "config.json").unlink()
    (out / "checkpoint.pt").write_bytes((out / "checkpoint.pt").read_bytes()[:100])
    assert "must agree" not in refused(small(), "--out", out)
    (tmp_path / "file").touch()
    assert "folder must be one that can be written" in refused(small(), "--out", tmp_path / "file")


def test_compressed_replies(small, tmp_path):
    simulated(small(), "--out", tmp_path / "whole")
    said = simulated(small("[run]", "[uplink]\ndensity = 0.1\n[run]"), "--out", tmp_path / "part")
    assert "10 clients (iid, uniform, top-k), softmax" in said
    whole, part = (History.read(tmp_path / name / "history.json") for name in ("whole", "part"))
    assert all(row["bytes_up"] < other["bytes_up"] / 4 for row, other in zip(part, whole, strict=True))
    assert [row["bytes_down"] for row in part] == [row["bytes_down"] for row in whole]
    assert "[uplink]: density must be a number in (0, 1], got 2" in refused(
        small("[run]", "[uplink]\ndensity = 2\n[run]")
    )


COMMAND = "from distopt.cli import main; main()"


@pytest.mark.job
def test_ranks_share_the_clients_and_the_first_one_says_and_writes_it(warm_python, small, tmp_path):
    path, out = small("rounds = 6", "rounds = 4"), tmp_path / "out"
    said = run_ranks(warm_python, "simulate", path, "--out", out, code=COMMAND)
    assert said.count("Final accuracy") == 1
    said = run_ranks(warm_python, "simulate", small(), "--out", out, code=COMMAND)
    assert "goes on after round 4 of 6" in said
    parts = History.read(out / "history.json")
    said = run_ranks(warm_python, "simulate", small(), "--out", out, "--restart", code=COMMAND)
    assert "goes on" not in said
    whole = History.read(out / "history.json")
    assert whole == parts
    simulated(small(), "--out", tmp_path / "alone")
    alone = History.read(tmp_path / "alone" / "history.json")
    assert [row["participants"] for row in alone] == [row["participants"] for row in whole]
    assert alone.last("loss") == pytest.approx(whole.last("loss"), rel=1e-4)
    message = refused(small(), "--out", out)
    assert "must agree in mode, got 'sharded' then and 'vmapped' now" in message
    assert "start as many processes as then" in message


def test_events_for_tensorboard(small, tmp_path):
    out = tmp_path / "out"
    simulated(small("[run]", "[output]\ntensorboard = true\n[run]"), "--out", out)
    assert list(out.glob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    ("model", "shape", "parameters"),
    [
        (CNN(), (1, 28, 28), 206_922),
        (CNN(norm="group"), (1, 28, 28), 206_922 + 2 * (16 + 32)),
        (CNN(norm="group"), (3, 8, 8), 3 * 16 * 9 + 16 + 32 + 16 * 32 * 9 + 32 + 64 + 128 * 129 + 1290),
        (MLP(), (1, 28, 28), 235_146),
        (MLP(hidden=(32,)), (1, 8, 8), 65 * 32 + 330),
        (MLP(hidden=()), (1, 8, 8), 650),
        (Softmax(), (1, 28, 28), 7850),
        (Softmax(norm="batch"), (1, 28, 28), 7870),
    ],
)
def test_models_have_the_size_that_they_say(model, shape, parameters):
    built = model.build(shape, 10)
    assert sum(p.numel() for p in built.parameters()) == parameters
    assert built(torch.zeros(2, *shape)).shape == (2, 10)


def test_a_sample_s_logits_do_not_depend_on_the_others_with_group_norm():
    images = torch.rand(4, 1, 8, 8)
    built = CNN(norm="group").build((1, 8, 8), 10)
    assert torch.allclose(built(images)[:1], built(images[:1]), atol=1e-6)


def test_fashion_mnist_by_name_where_it_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"'fashion-mnist' must be installed.*apt-get install dataset-fashion-mnist"):
        datasets.load("fashion-mnist")


def test_refused_replies_are_told_by_their_reason(small, tmp_path):
    said = simulated(small("lr = 0.05", "lr = 1e38"), "--out", tmp_path / "out")
    assert "Replies refused: 18 not finite." in said
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["summary"]
    assert found["replies_refused"] == {"not finite": 18}


PRIVATE = """
[data]
clients = 10
[model]
model = "softmax"
[algorithm]
algorithm = "{name}"
{keys}
[run]
rounds = 6
evaluate_every = 2
checkpoint_every = 1
{run}
"""


def private(tmp_path, name, keys="", run="", also=""):
    path = tmp_path / "private.toml"
    path.write_text(PRIVATE.format(name=name, keys=keys, run=run) + also)
    return path


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("diff2", "epsilon = 5.0\ninterval = 3\nclip_difference = 2.0\nlr = 0.3"),
        ("dp-gd", 'epsilon = 5.0\nnoise = "distributed"\nlr = 0.3'),
        ("dp-fedavg", 'epsilon = 50.0\nquantile = 0.5\naccountant = "rdp"'),
    ],
)
def test_private_algorithms_know_the_job_and_say_what_they_spend(tmp_path, name, keys):
    out = tmp_path / "out"
    said = simulated(private(tmp_path, name, keys), "--out", out)
    summary = json.loads((out / "summary.json").read_text())["summary"]
    history = History.read(out / "history.json")
    assert history.last("epsilon") == summary["epsilon"] <= float(keys.split()[2])
    assert f"Epsilon {summary['epsilon']:.4g} has been spent" in said
    assert f"{summary['epsilon']:.3f}" in said
    with (out / "history.csv").open() as file:
        assert [float(row["epsilon"]) for row in csv.DictReader(file)] == [e for _, e in history.column("epsilon")]
    described = json.loads((out / "config.json").read_text())["algorithm"]
    assert described["rounds"] == 6
    if name != "dp-fedavg":
        assert described["num_clients"] == 10
        assert described["fewest_samples"] == min(len(part) for part in datasets_split())


def datasets_split():
    data = datasets.load("digits")
    return IIDPartition().split(data.train_labels.numpy(), 10, 0)


def test_a_private_run_stops_at_its_epsilon_and_may_go_on_to_another(tmp_path):
    out = tmp_path / "out"
    keys = "epsilon = 5.0\ninterval = 3"
    simulated(private(tmp_path, "diff2", keys, "stop_at_epsilon = 4.6"), "--out", out)
    rows = len(History.read(out / "history.json"))
    assert 0 < rows < 6
    assert f"goes on after round {rows} of 6" in simulated(private(tmp_path, "diff2", keys), "--out", out)
    assert len(History.read(out / "history.json")) == 6


@pytest.mark.parametrize(
    ("keys", "run", "also", "said"),
    [
        ("sigma = 1.0", "", "", r"\[algorithm\]: unknown key 'sigma' for algorithm 'diff2'; known keys are .*interval"),
        ("", "stop_at_epsilon = 0.0", "", r"\[run\]: stop_at_epsilon must be a number above 0, got 0\.0"),
        ("", "", "[local]\nsteps = 3\n", r"\[algorithm\]: local must be left out for 'diff2'"),
        (
            "",
            "",
            '[participation]\nparticipation = "uniform"\ncount = 3\n',
            "participation must be everybody for 'diff2'",
        ),
        ("num_clients = 9", "", "", "num_clients must be that of the job, 10, got 9"),
    ],
)
def test_private_jobs_that_will_not_do_are_one_line(tmp_path, keys, run, also, said):
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(refused(private(tmp_path, "diff2", keys, run, also), "--out", tmp_path / "out"))


def test_a_private_run_that_saves_now_and_then_is_refused(tmp_path):
    path = private(tmp_path, "dp-fedavg", "noise_multiplier = 1.0")
    path.write_text(path.read_text().replace("checkpoint_every = 1", "checkpoint_every = 2"))
    assert "checkpoint_every must be 1 or 0 for 'dp-fedavg', got 2" in refused(path, "--out", tmp_path / "out")

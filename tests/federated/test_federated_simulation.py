"""A whole job in one process: it learns, it repeats to the bit, and it goes on after a kill as if nothing had been."""

import os
import signal
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

from distopt.errors import ConfigError, StateMismatchError
from distopt.federated import (
    Bernoulli,
    ClientData,
    DirichletPartition,
    FedAvg,
    History,
    LocalTraining,
    Scaffold,
    Simulation,
    UniformSampling,
)

CLIENTS = 20
_rng = np.random.default_rng(0)
INPUTS = torch.from_numpy(_rng.standard_normal((600, 8)))
LABELS = (INPUTS[:, 0] > 0).long() + (INPUTS[:, 1] > 0).long()


def build(norm=False):
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(16) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(8, 16), middle, nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3)).double()


def data():
    return ClientData.split((INPUTS, LABELS), DirichletPartition(alpha=0.5), CLIENTS, seed=1)


def accuracy(model):
    return {"accuracy": (model(INPUTS).argmax(1) == LABELS).double().mean()}


def simulation(**changed):
    settings = {
        "model": build(),
        "clients": data(),
        "algorithm": FedAvg(),
        "local": LocalTraining(steps=5, batch_size=10, lr=0.5),
        "participation": UniformSampling(count=5),
        "evaluate": accuracy,
        "seed": 3,
    }
    return Simulation(**{**settings, **changed})


def vector(model):
    return torch.cat([t.detach().reshape(-1).double() for t in model.state_dict().values()])


def test_it_learns_and_the_history_says_so():
    job = simulation()
    history = job.run(60)
    assert [row["round"] for row in history] == list(range(1, 61))
    assert history.last("accuracy") > 0.8 > history.column("accuracy")[0][1]
    assert all(len(row["participants"]) == 5 for row in history)
    numel = sum(p.numel() for p in job.model.parameters())
    assert history.total_bytes() == 60 * 5 * 2 * 8 * numel
    assert history.rounds_to("accuracy", 0.75) < 60
    assert history.rounds_to("accuracy", 1.1) is None


def test_the_same_seed_is_the_same_history_and_model_to_the_bit():
    first, second, third = simulation(), simulation(), simulation(seed=4)
    torch.manual_seed(5)
    first.run(8)
    torch.manual_seed(6)  # whatever the script has drawn before
    assert second.run(8) == first.history
    assert torch.equal(vector(first.model), vector(second.model))
    third.run(8)
    assert not torch.equal(vector(first.model), vector(third.model))


def test_the_script_s_random_numbers_are_left_alone():
    job = simulation()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    job.run(2)
    assert torch.equal(torch.rand(3), expected)


def test_run_goes_on_where_it_stopped():
    whole, parts = simulation(), simulation()
    whole.run(9)
    parts.run(4)
    assert parts.run(9) == whole.history
    assert torch.equal(vector(parts.model), vector(whole.model))


def test_batch_norm_and_its_counter():
    job = simulation(model=build(norm=True), exclude=())
    job.run(3)
    norm = job.model[1]
    assert norm.num_batches_tracked == 3 * 5 * 5  # one model object: not averaged, it has seen every step
    assert norm.running_var.min() > 0


@pytest.mark.parametrize("steps", [{"steps": 7}, {"epochs": 2}])
def test_every_step_has_its_batch(steps):
    local = LocalTraining(batch_size=10, **steps)
    part = np.arange(100, 125)
    batches = list(local.batches(part, [1, 2], 3, 4))
    assert len(batches) == local.num_steps(25) == (7 if "steps" in steps else 6)
    assert [len(batch) for batch in batches[:3]] == [10, 10, 5]
    assert sorted(np.concatenate(batches[:3])) == list(part)
    again = list(local.batches(part, [1, 2], 3, 4))
    assert all(map(np.array_equal, batches, again))
    other = list(local.batches(part, [1, 2], 3, 5))
    assert not np.array_equal(batches[0], other[0])
    assert list(local.batches(part[:0], [1, 2], 3, 4)) == []


KEEPING = {"algorithm": Scaffold(), "participation": Bernoulli(probability=0.3)}  # what there is to lose
KILLED = """
    import os, signal, sys
    sys.path.insert(0, sys.argv[1])
    import torch
    torch.set_num_threads(1)
    from test_federated_simulation import KEEPING, simulation

    def progress(row):
        if row["round"] == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

    job = simulation(checkpoint=sys.argv[2], checkpoint_every=2, progress=progress, **KEEPING)
    job.resume()
    job.run(11)
"""


@pytest.mark.parametrize("round", [1, 5, 8])
def test_killed_and_resumed_it_is_bit_for_bit_the_run_that_was_not(warm_python, tmp_path, round):
    path = tmp_path / "run.pt"
    ran = warm_python.run(textwrap.dedent(KILLED), os.path.dirname(__file__), path, round)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    resumed = simulation(checkpoint=path, checkpoint_every=2, **KEEPING)
    assert resumed.resume() == (round > 1)
    assert resumed.round == round // 2 * 2
    whole = simulation(**KEEPING)
    assert resumed.run(11) == whole.run(11)
    assert torch.equal(vector(resumed.model), vector(whole.model))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 4}, "seed of the checkpoint must be 4, got 3"),
        ({"algorithm": FedAvg(server_lr=2.0)}, "algorithm of the checkpoint"),
        ({"local": LocalTraining(steps=6)}, "local of the checkpoint"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, changed, said):
    job = simulation(checkpoint=tmp_path / "run.pt")
    job.save()
    with pytest.raises(StateMismatchError, match=said):
        simulation(checkpoint=tmp_path / "run.pt", **changed).resume()


def test_a_history_is_saved_and_read(tmp_path):
    history = simulation(evaluate_every=2).run(5)
    assert [round for round, _ in history.column("accuracy")] == [2, 4, 5]
    history.save(tmp_path / "history.json")
    assert History.read(tmp_path / "history.json") == history
    history.save(tmp_path / "history.csv")
    lines = (tmp_path / "history.csv").read_text().splitlines()
    assert lines[0].startswith("round,participants,bytes_down,bytes_up,refused")
    assert len(lines) == 6
    history.plot(tmp_path / "history.png")
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="got none; rounds have"):
        history.column("loss")
    with pytest.raises(ConfigError, match=r"saved as \.csv or \.json"):
        history.save(tmp_path / "history.xml")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"checkpoint_every": 2}, "needs a file"),
        ({"evaluate_every": 0}, "evaluate_every must be"),
        ({"exclude": ("head.*",)}, "exclude must name what the model has, got 'head"),
    ],
)
def test_bad_settings_are_refused(changed, said):
    with pytest.raises(ConfigError, match=said):
        simulation(**changed)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "one of epochs and steps must be given"),
        ({"steps": 1, "epochs": 1}, "epochs must be None beside steps=1, got 1"),
        ({"steps": 0}, "steps must be an integer of at least 1"),
        ({"steps": 1, "lr": 0.0}, "lr must be a number above 0"),
        ({"steps": 1, "optimizer": "SDG"}, "optimizer must be the name of a class"),
    ],
)
def test_bad_local_training_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        LocalTraining(**settings)

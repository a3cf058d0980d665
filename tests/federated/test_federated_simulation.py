"""A whole job in one process: it learns, it repeats to the bit, and it goes on after a kill as if nothing had been."""

import os
import re
import signal
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from distopt.errors import ConfigError, StateMismatchError
from distopt.federated import (
    AfterArrivals,
    AsyncFedAvg,
    Bernoulli,
    Broadcast,
    ClientData,
    ConstantDelays,
    DirichletPartition,
    ExponentialDelays,
    FedAsync,
    FedAvg,
    FedBuff,
    FedFix,
    FedNova,
    FedVarp,
    History,
    Krum,
    LocalTraining,
    Scaffold,
    Simulation,
    UniformSampling,
    UplinkCompression,
)

CLIENTS = 20
_rng = np.random.default_rng(0)
INPUTS = torch.from_numpy(_rng.standard_normal((600, 8)))
LABELS = (INPUTS[:, 0] > 0).long() + (INPUTS[:, 1] > 0).long()


def build(norm=False):
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(16) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(8, 16), middle, nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3)).double()


def data(seed=1):
    return ClientData.split((INPUTS, LABELS), DirichletPartition(alpha=0.5), CLIENTS, seed=seed)


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


@pytest.mark.parametrize("algorithm", [Scaffold(), FedVarp()])
def test_vectors_in_files_change_no_bit(tmp_path, algorithm):
    inside, outside = simulation(algorithm=algorithm), simulation(algorithm=algorithm, folder=tmp_path)
    assert outside.run(4) == inside.run(4)
    assert torch.equal(vector(outside.model), vector(inside.model))
    assert str(tmp_path) in Path("/proc/self/maps").read_text()


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


def test_batches_of_one_that_the_model_cannot_take_are_refused_before_anything_runs():
    parts = [np.arange(0, 21), np.arange(21, 41), np.arange(41, 72)]  # of 10: the first and the last leave one
    settings = {"clients": ClientData((INPUTS, LABELS), parts), "participation": None}
    with pytest.raises(ConfigError, match=r"got a batch of one of 2 clients, 0 first; use drop_last=True"):
        simulation(model=build(norm=True), **settings)
    simulation(**settings).run(1)  # without BatchNorm
    model = build(norm=True)
    before = vector(model)
    dropping = LocalTraining(epochs=1, batch_size=10, drop_last=True)
    job = simulation(model=model, local=dropping, **settings)
    assert torch.equal(vector(model), before)
    job.run(1)
    assert [dropping.batch_sizes(n) for n in (0, 1, 9, 10, 21)] == [[], [1], [9], [10], [10, 10]]
    assert [len(batch) for batch in dropping.batches(parts[2], [1, 2], 0, 0)] == [10, 10, 10]
    two = ClientData((INPUTS, LABELS), [parts[0], parts[1][:1]])
    with pytest.raises(ConfigError, match="got a batch of one of 1 clients, 1 first"):
        simulation(model=build(norm=True), local=dropping, clients=two)
    few = LocalTraining(steps=2, batch_size=10)  # the first two batches are whole
    simulation(model=build(norm=True), local=few, **settings).run(1)


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


# -- time --------------------------------------------------------------------------------------------------------------

SLOW = ConstantDelays(mean_s=0.2, slowest=5.0)


def timed(algorithm, delays=SLOW, **changed):
    return simulation(algorithm=algorithm, delays=delays, participation=None, **changed)


def test_fedfix_that_waits_for_the_slowest_is_fedavg_to_the_bit():
    patient, synchronous = timed(FedFix(interval_s=1.5)), timed(FedAvg(weighting="uniform"))
    fixed, averaged = patient.run(4), synchronous.run(4)
    assert torch.equal(vector(patient.model), vector(synchronous.model))
    assert [row["time_s"] for row in fixed] == [1.5, 3.0, 4.5, 6.0]
    assert [row["time_s"] for row in averaged] == [1.0, 2.0, 3.0, 4.0]
    without_time = [{key: value for key, value in row.items() if key != "time_s"} for row in fixed]
    assert without_time == [{key: value for key, value in row.items() if key != "time_s"} for row in averaged]


@pytest.mark.parametrize(
    "algorithm", [FedFix(interval_s=0.3), FedBuff(buffer_size=3, concurrency=8), AsyncFedAvg(server_lr=0.3), FedAsync()]
)
def test_algorithms_that_do_not_wait_learn(algorithm):
    local = LocalTraining(steps=3, batch_size=10, lr=0.5)
    job = timed(algorithm, delays=ExponentialDelays(mean_s=0.5, slowest=3.0), evaluate_every=50, local=local)
    history = job.run(60 if algorithm.pacing != AfterArrivals(count=1) else 200)
    assert history.last("accuracy") > 0.7
    numel = sum(p.numel() for p in job.model.parameters())
    answered = sum(len(row["participants"]) for row in history)
    assert sum(row["bytes_up"] for row in history) == answered * 8 * numel
    at_work = sum(row["bytes_down"] for row in history) // (8 * numel) - answered
    assert 0 < at_work <= CLIENTS  # sent and not answered yet
    assert {v for v, _ in job.state_dict()["at_work"].items()} <= set(range(200))


def test_a_late_answer_is_against_the_version_that_the_client_was_sent():
    """Two clients, the second three times as slow: what it adds is the step from the first model."""
    settings = {
        "clients": ClientData((INPUTS, LABELS), [np.arange(0, 50), np.arange(50, 100)]),
        "algorithm": FedFix(interval_s=1.0, times_s=(1.0, 3.0)),
        "delays": ConstantDelays(mean_s=(1.0, 3.0)),
        "participation": None,
        "mode": "loop",
    }
    job, oracle = simulation(**settings), simulation(**settings)

    def delta(version, model, client):
        return oracle._trainer.train(Broadcast(version=version, model=model), [client])[0].delta

    first = oracle.layout.read(oracle.model)
    second = first + 0.5 * delta(0, first, 0)
    third = second + 0.5 * delta(1, second, 0)
    expected = third + 0.5 * delta(2, third, 0) + 3 * 0.5 * delta(0, first, 1)
    history = job.run(3)
    assert [row["participants"] for row in history] == [[0], [0], [0, 1]]
    torch.testing.assert_close(job.layout.read(job.model), expected, rtol=1e-13, atol=1e-13)


# What there is to lose: what clients keep; and who is at work on which old model.
LOSABLE = {
    "keeping": {"algorithm": Scaffold(), "participation": Bernoulli(probability=0.3)},
    "asynchronous": {"algorithm": FedAsync(), "delays": ExponentialDelays(), "uplink": UplinkCompression(density=0.1)},
}
KILLED = """
    import os, signal, sys
    sys.path.insert(0, sys.argv[1])
    import torch
    torch.set_num_threads(1)
    from test_federated_simulation import LOSABLE, simulation

    def progress(row):
        if row["round"] == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

    job = simulation(checkpoint=sys.argv[2], checkpoint_every=2, progress=progress, **LOSABLE[sys.argv[4]])
    job.resume()
    job.run(11)
"""


@pytest.mark.parametrize(("losable", "round"), [("keeping", 1), ("keeping", 8), ("asynchronous", 5)])
@pytest.mark.job
def test_killed_and_resumed_it_is_bit_for_bit_the_run_that_was_not(warm_python, tmp_path, losable, round):
    path = tmp_path / "run.pt"
    ran = warm_python.run(textwrap.dedent(KILLED), os.path.dirname(__file__), path, round, losable)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    resumed = simulation(checkpoint=path, checkpoint_every=2, **LOSABLE[losable])
    assert resumed.resume() == (round > 1)
    assert resumed.round == round // 2 * 2
    whole = simulation(**LOSABLE[losable])
    assert resumed.run(11) == whole.run(11)
    assert torch.equal(vector(resumed.model), vector(whole.model))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 4}, "agree in seed, got 3 then and 4 now; resume with the configuration"),
        ({"algorithm": FedAvg(server_lr=2.0)}, "agree in algorithm"),
        ({"local": LocalTraining(steps=6)}, "agree in local"),
        ({"delays": ConstantDelays()}, "agree in delays, got None then and .*constant.* now"),
        (
            {"clients": ClientData.split((INPUTS, LABELS), DirichletPartition(alpha=0.5), CLIENTS, seed=2)},
            "agree in data",
        ),
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


def test_clients_may_use_an_optimizer_of_pytorch_optimizer():
    pytest.importorskip("pytorch_optimizer")
    local = LocalTraining(steps=5, batch_size=10, lr=0.01, optimizer="Lion", options={"betas": (0.5, 0.9)})
    history = simulation(local=local, evaluate_every=40).run(40)
    assert history.last("accuracy") > 0.75


# -- what would fail in the first round, before it ---------------------------------------------------------------------


def masked():
    model = build()
    model.register_buffer("mask", torch.full((3, 3), -torch.inf, dtype=torch.float64))
    return model


def fails(model, batch):
    raise KeyError("nothing here")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": masked()}, r"must be finite, got 'mask' that is not; .*exclude=\('mask',\)"),
        ({"local": LocalTraining(steps=1, options={"momentun": 0.9})}, "got TypeError: .*'momentun'.* from 'SGD'"),
        ({"local": LocalTraining(steps=1, optimizer="LBFGS")}, "got TypeError: .* from 'LBFGS'"),
        ({"loss": fails}, "must be computable, got KeyError"),
        ({"loss": lambda model, batch: torch.zeros(())}, "must depend on the trained parameters"),
        ({"loss": lambda model, batch: 1.0}, "a tensor of one number, got 1.0"),
        ({"algorithm": FedAvg}, "algorithm must be of FederatedAlgorithm, got <class"),
        ({"participation": "everybody"}, "participation must be of Participation or None, got 'everybody'"),
        ({"delays": 1.0}, "delays must be of Delays or None, got 1.0"),
        ({"clients": (INPUTS, LABELS)}, "clients must be of ClientData, got"),
        ({"algorithm": Krum(num_byzantine=9)}, "at least the 21 clients whose replies 'krum' needs, got 20"),
    ],
)
def test_what_cannot_run_is_refused_before_it_does(changed, said):
    with pytest.raises(ConfigError, match=said):
        simulation(**changed)


def test_what_evaluate_gives_is_found_out_before_the_first_round():
    for given in ({"accuracy": "good"}, 0.9, {"accuracy": None}):
        job = simulation(evaluate=lambda model, given=given: given, evaluate_every=5)
        with pytest.raises(ConfigError, match="evaluate must return numbers by name"):
            job.run(10)
        assert job.round == 0


def test_fewer_rounds_than_are_done_are_refused():
    job = simulation()
    job.run(3)
    with pytest.raises(ConfigError, match="rounds must be an integer of at least 3, got 2"):
        job.run(2)
    assert len(job.run(3)) == 3


def test_processes_of_a_launcher_do_not_run_the_whole_job_each_unless_told_to(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"mode 'auto' needs a process group in each of the 2 processes"):
        simulation(mode="auto")
    assert simulation(mode="loop").mode == "loop"


@pytest.mark.parametrize(
    ("algorithm", "options", "warns"),
    [
        (Scaffold(), {"momentum": 0.9}, True),
        (Scaffold(), {}, False),
        (FedNova(), {"weight_decay": 0.1}, True),
        (FedAvg(), {"momentum": 0.9}, False),
    ],
)
def test_an_optimizer_that_the_equations_do_not_mean_is_a_warning(caplog, algorithm, options, warns):
    simulation(algorithm=algorithm, local=LocalTraining(steps=2, options=options))
    assert ("assumes that clients take steps of plain SGD" in caplog.text) == warns


def test_a_round_in_which_no_reply_counts_is_a_warning_once(caplog):
    job = simulation(loss=lambda model, batch: model(batch[0]).sum() * float("nan"))
    assert all(row["refused"] == len(row["participants"]) for row in job.run(3))
    (said,) = [record.getMessage() for record in caplog.records]
    assert "no reply of round 1 counts" in said
    assert "not finite" in said


@pytest.mark.parametrize(
    ("tensors", "got"),
    [
        ((INPUTS.numpy(), LABELS.numpy()), "['ndarray', 'ndarray']"),
        (torch.utils.data.TensorDataset(INPUTS, LABELS), "TensorDataset"),
        ((), "[]"),
    ],
)
def test_data_that_are_no_tensors_are_refused_with_how_to_make_them(tensors, got):
    for make in (
        lambda: ClientData(tensors, [np.arange(3)]),
        lambda: ClientData.split(tensors, DirichletPartition(), 2),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"must be a tuple of torch tensors, got {got}; use torch.fr")):
            make()


def test_names_of_the_history_are_its_own():
    with pytest.raises(ConfigError, match="other names than the history's own, got 'round'"):
        simulation(evaluate=lambda model: {"round": 1.0}).run(1)


@pytest.mark.parametrize("parts", [[], [[0, 1]], [np.array([0.5])], [np.array([[0]])]])
def test_parts_that_are_no_indices_are_refused(parts):
    with pytest.raises(ConfigError, match="parts must"):
        ClientData((INPUTS, LABELS), parts)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"exclude": ("0.*",)}, "agree in model"),
        ({"model": build().float()}, "agree in model, got .* and '0.weight.*float32.* now"),
        ({"model": build()[:1]}, "agree in model"),
        ({"participation": UniformSampling(count=6)}, "agree in participation"),
    ],
)
def test_a_checkpoint_of_another_model_or_other_clients_is_refused(tmp_path, changed, said):
    simulation(checkpoint=tmp_path / "run.pt").save()
    torch.manual_seed(0)
    inputs = INPUTS.float() if "float" in said else INPUTS
    settings = {"clients": ClientData((inputs, LABELS), data().parts), **changed}
    with pytest.raises(StateMismatchError, match=said):
        simulation(checkpoint=tmp_path / "run.pt", **settings).resume()


@pytest.mark.parametrize("content", [b"nothing of the kind", b""])
def test_a_damaged_checkpoint_is_said_to_be_one(tmp_path, content):
    (tmp_path / "run.pt").write_bytes(content)
    with pytest.raises(StateMismatchError, match=r"must be a checkpoint, got .*; it is damaged"):
        simulation(checkpoint=tmp_path / "run.pt").resume()

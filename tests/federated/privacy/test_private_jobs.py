"""Private jobs as a whole: what they spend, when they end, what a resumed one releases, and what is refused."""

import itertools
import logging
import os
import signal
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

from distopt.errors import CompatibilityError, ConfigError
from distopt.federated import (
    DIFF2,
    DPGD,
    Bernoulli,
    ClientData,
    DPFedAvg,
    Everybody,
    FedAvg,
    Layout,
    LocalTraining,
    Simulation,
    UniformSampling,
    UplinkCompression,
)
from distopt.federated.history import History
from distopt.federated.privacy.job import JobFacts, check_job
from distopt.federated.privacy.noise import NoiseSource

CLIENTS, SAMPLES, ROUNDS = 4, 20, 8
_random = torch.Generator().manual_seed(0)
INPUTS = torch.randn(CLIENTS * SAMPLES, 3, generator=_random, dtype=torch.float64)
TARGETS = (INPUTS[:, :1] - 0.5 * INPUTS[:, 1:2]).sin()
PARTS = [np.arange(i * SAMPLES, (i + 1) * SAMPLES) for i in range(CLIENTS)]
OF_JOB = {"num_clients": CLIENTS, "fewest_samples": SAMPLES, "rounds": ROUNDS}
ALGORITHMS = {
    "diff2": lambda **changed: DIFF2(interval=3, **{**OF_JOB, **changed}),
    "distributed": lambda **changed: DIFF2(interval=3, noise="distributed", **{**OF_JOB, **changed}),
    "dp-gd": lambda **changed: DPGD(**{**OF_JOB, **changed}),
    "dp-fedavg": lambda **changed: DPFedAvg(**{"epsilon": 3.0, "rounds": ROUNDS, "quantile": 0.5, **changed}),
}
every_algorithm = pytest.mark.parametrize("make", ALGORITHMS.values(), ids=ALGORITHMS)


def square(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 1)).double()


def loss_of_all(model):
    return {"loss": square(model, (INPUTS, TARGETS))}


def simulation(algorithm, inputs=INPUTS, **changed):
    settings = {
        "model": build(),
        "clients": ClientData((inputs, TARGETS), PARTS),
        "algorithm": algorithm,
        "loss": square,
        "evaluate": loss_of_all,
    }
    return Simulation(**{**settings, **changed})


def vector(job):
    return torch.cat([p.detach().reshape(-1) for p in job.model.parameters()])


# -- what is spent -----------------------------------------------------------------------------------------------------


@every_algorithm
def test_epsilon_grows_in_every_round_and_ends_at_what_was_promised(make):
    history = simulation(make(accountant="rdp")).run(ROUNDS)
    spent = [epsilon for _, epsilon in history.column("epsilon")]
    assert len(spent) == ROUNDS
    assert all(before < after for before, after in itertools.pairwise(spent))
    assert 3.0 * (1 - 1e-6) < spent[-1] <= 3.0


@every_algorithm
@pytest.mark.parametrize("accountant", ["closed-form", "rdp"])
def test_a_run_ends_before_it_would_pass_its_epsilon(make, accountant, caplog):
    job = simulation(make(accountant=accountant), evaluate_every=100)
    with caplog.at_level(logging.WARNING, "distopt"):
        history = job.run(100)
    assert ROUNDS <= len(history) < 100
    assert history.last("epsilon") <= 3.0
    spent, after = history.last("epsilon"), job.algorithm.spent_after_another(job._rounds.state.memory)
    said = f"ends before round {len(history) + 1}: epsilon is {spent:.4g}, would be {after:.4g}, and may be 3"
    assert [record.getMessage() for record in caplog.records] == [f"{job.algorithm.name} {said}"]
    assert [round for round, _ in history.column("loss")] == [len(history)]  # the last round is evaluated
    assert job.run(100) == history
    assert len(history) == job.round


@every_algorithm
def test_stop_at_epsilon_ends_it_earlier(make, caplog):
    whole = simulation(make(noise_seed=0)).run(ROUNDS)
    limit = whole.column("epsilon")[2][1]
    with caplog.at_level(logging.WARNING, "distopt"):
        stopped = simulation(make(noise_seed=0), stop_at_epsilon=limit).run(ROUNDS)
    assert stopped.rows == whole.rows[:3]
    assert len(caplog.records) == 1
    assert len(simulation(make(noise_seed=0), stop_at_epsilon=100.0).run(ROUNDS)) == ROUNDS


def test_without_an_epsilon_of_its_own_it_goes_on(caplog):
    assert len(simulation(DPFedAvg(noise_multiplier=0.5)).run(30)) == 30
    assert not caplog.records
    assert len(simulation(DPFedAvg(noise_multiplier=0.5), stop_at_epsilon=20.0).run(30)) < 30


def test_epsilon_is_in_the_files_and_the_plots(tmp_path, monkeypatch):
    history = simulation(ALGORITHMS["diff2"]()).run(4)
    history.save(tmp_path / "history.json")
    assert History.read(tmp_path / "history.json").last("epsilon") == history.last("epsilon")
    history.save(tmp_path / "history.csv")
    assert "epsilon" in (tmp_path / "history.csv").read_text().splitlines()[0].split(",")
    from distopt.federated import plots

    labels, finish = [], plots._finish
    monkeypatch.setattr(plots, "_finish", lambda axes, x, y: labels.append((x, y)) or finish(axes, x, y))
    history.plot(tmp_path / "loss.png", "loss")
    assert {("round", "loss"), ("epsilon", "loss"), ("round", "epsilon")} <= set(labels)
    labels.clear()
    history.plot(tmp_path / "epsilon.png", "epsilon")
    assert labels.count(("round", "epsilon")) == 1
    assert ("epsilon", "epsilon") not in labels
    labels.clear()
    simulation(FedAvg()).run(2).plot(tmp_path / "fedavg.png", "loss")
    assert not [label for label in labels if "epsilon" in label]


# -- resumed -----------------------------------------------------------------------------------------------------------

KILLED = """
    import os, signal, sys
    sys.path.insert(0, sys.argv[1])
    import torch
    torch.set_num_threads(1)
    from test_private_jobs import ALGORITHMS, simulation

    def progress(row):
        if row["round"] == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    algorithm = ALGORITHMS[sys.argv[3]](noise_seed=0)
    simulation(algorithm, checkpoint=sys.argv[2], checkpoint_every=3, progress=progress).run(7)
"""


@pytest.mark.parametrize("name", ["diff2", "dp-fedavg"])
def test_a_seeded_run_that_was_killed_goes_on_to_the_bit(warm_python, tmp_path, name):
    path = tmp_path / "run.pt"
    ran = warm_python.run(textwrap.dedent(KILLED), os.path.dirname(__file__), path, name)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    resumed, whole = (
        simulation(ALGORITHMS[name](noise_seed=0), checkpoint=path),
        simulation(ALGORITHMS[name](noise_seed=0)),
    )
    assert resumed.resume()
    assert resumed.round == 3
    assert resumed.run(7) == whole.run(7)
    assert torch.equal(vector(resumed), vector(whole))


@every_algorithm
def test_a_resumed_run_knows_what_was_spent_and_repeats_no_noise(make, tmp_path):
    path = tmp_path / "run.pt"
    job = simulation(make(), checkpoint=path, checkpoint_every=1)
    job.run(4)
    first, second = (simulation(make(), checkpoint=path) for _ in range(2))
    assert first.resume()
    assert second.resume()
    assert first.history == job.history
    models = []
    for each in (job, first, second):
        each.run(5)
        models.append(vector(each))
        assert each.history.last("epsilon") == job.history.last("epsilon")
    assert not torch.equal(models[0], models[1])
    assert not torch.equal(models[1], models[2])


@every_algorithm
@pytest.mark.parametrize("noise_seed", [None, 0])
def test_noise_is_never_used_on_other_values_after_a_resume(make, noise_seed, tmp_path, monkeypatch):
    """The rounds after a checkpoint are done again, with another sample: the noise must tell nothing of it.

    Whoever has both releases and repeated noise would subtract them. Every noise that is drawn is noted.
    """
    drawn, add = [], NoiseSource.add

    def noting(self, values, std, *purpose):
        found = add(self, values, std, *purpose)
        if values.numel() > 1:  # the share of adaptive clipping may be the same number twice
            drawn.append((values.clone(), (found - values) / std))
        return found

    path = tmp_path / "run.pt"
    job = simulation(make(noise_seed=noise_seed), checkpoint=path, checkpoint_every=1)
    job.run(4)
    monkeypatch.setattr(NoiseSource, "add", noting)
    other = INPUTS.clone()
    other[7] = -other[7]
    for inputs in (INPUTS, other, INPUTS):
        resumed = simulation(make(noise_seed=noise_seed), inputs=inputs, checkpoint=path)
        assert resumed.resume()
        resumed.run(7)
    repeated = 0
    for i, (values, noise) in enumerate(drawn):
        for before, used in drawn[:i]:
            same = torch.allclose(noise, used, rtol=1e-6, atol=1e-9)
            assert not same or torch.equal(values, before)
            repeated += same
    assert len(drawn) >= 9
    assert bool(repeated) == (noise_seed is not None)


@every_algorithm
def test_a_run_with_noise_of_its_own_saves_after_every_round_or_never(make, tmp_path):
    """A round that is done again after a resume is a release more: at most the one that nobody has seen."""
    with pytest.raises(ConfigError, match=r"checkpoint_every must be 1 or 0 for '.*', got 2: a resumed run would"):
        simulation(make(), checkpoint=tmp_path / "run.pt", checkpoint_every=2)
    simulation(make(noise_seed=0), checkpoint=tmp_path / "run.pt", checkpoint_every=2)
    saved = []
    job = simulation(
        make(),
        checkpoint=tmp_path / "run.pt",
        checkpoint_every=1,
        progress=lambda row: saved.append(torch.load(tmp_path / "run.pt", weights_only=True)["server"]["version"]),
    )
    job.run(3)
    assert saved == [1, 2, 3]  # before anybody hears of a round it is on the disk


# -- jobs that will not do ---------------------------------------------------------------------------------------------

REFUSED = [
    ("diff2", {"local": LocalTraining(steps=3)}, "local must be left out for 'diff2', whose clients take no local"),
    ("dp-gd", {"uplink": UplinkCompression()}, "uplink must be left out for 'dp-gd'"),
    ("diff2", {"participation": UniformSampling(count=2)}, "participation must be everybody for 'diff2'"),
    ("dp-gd", {"clients": ClientData((INPUTS, TARGETS), [*PARTS[:3], PARTS[3][:7]])}, "each client has, 7 of client 3"),
    ("dp-gd", {"clients": ClientData((INPUTS, TARGETS), [*PARTS[:3], PARTS[3][:0]])}, "each client has, 0 of client 3"),
    ("dp-gd", {"clients": ClientData((INPUTS, TARGETS), PARTS[:3])}, "num_clients must be that of the job, 3, got 4"),
    ("diff2", {"mode": "vmapped"}, "mode must be one that this job allows, got 'vmapped': the clients of 'diff2' look"),
    ("diff2", {"stop_at_epsilon": 0.0}, "stop_at_epsilon must be a number above 0"),
    ("diff2", {"evaluate": lambda model: {"epsilon": 0.0}}, "evaluate must use other names .* got 'epsilon'"),
]


@pytest.mark.parametrize(("name", "changed", "said"), REFUSED)
def test_jobs_that_break_a_guarantee_are_refused(name, changed, said):
    with pytest.raises(ConfigError, match=said):
        simulation(ALGORITHMS[name](), **changed).run(1)


def test_only_private_algorithms_have_an_epsilon_to_stop_at():
    with pytest.raises(ConfigError, match="stop_at_epsilon must be left out for 'fedavg', which is not private"):
        simulation(FedAvg(), stop_at_epsilon=1.0)
    assert "epsilon" not in simulation(FedAvg()).run(1).rows[0]


def test_buffers_that_would_travel_are_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    with pytest.raises(CompatibilityError, match=r"must be trained for 'dp-fedavg', got the buffer '1\.running_mean'"):
        simulation(ALGORITHMS["dp-fedavg"](), model=model)
    simulation(ALGORITHMS["dp-fedavg"](), model=model, exclude=("batch-norm",)).run(1)


def test_sampling_that_is_counted_must_be_the_sampling_that_is_done():
    algorithm = DPFedAvg(noise_multiplier=1.0, sampling_probability=0.5, accountant="rdp")
    for participation in (None, Everybody(), Bernoulli(probability=0.4), Bernoulli(probability=(0.5,) * CLIENTS)):
        with pytest.raises(ConfigError, match=r"participation must be Bernoulli\(probability=0\.5\) where sampling is"):
            simulation(algorithm, participation=participation)
    history = simulation(algorithm, participation=Bernoulli(probability=0.5)).run(4)
    assert history.last("epsilon") < simulation(DPFedAvg(noise_multiplier=1.0, accountant="rdp")).run(4).last("epsilon")


def test_an_engine_of_real_clients_takes_no_seed_for_its_noise():
    model = build()
    facts = {"model": model, "layout": Layout(model), "num_clients": CLIENTS}
    check_job(DPGD(**OF_JOB), JobFacts(**facts))
    check_job(DPGD(noise_seed=0, **OF_JOB), JobFacts(simulated=True, **facts))
    with pytest.raises(ConfigError, match="noise_seed must be left out where clients are real, got 0"):
        check_job(DPGD(noise_seed=0, **OF_JOB), JobFacts(**facts))


# -- ways of computing -------------------------------------------------------------------------------------------------


def test_dp_fedavg_of_all_clients_at_once_is_that_of_one_after_the_other(monkeypatch):
    """But for the noise, which depends on the last bits: here it is its standard deviation."""
    monkeypatch.setattr(NoiseSource, "add", lambda self, values, std, *purpose: values + std)
    jobs = [simulation(ALGORITHMS["dp-fedavg"](noise_seed=0), mode=mode) for mode in ("loop", "vmapped")]
    for job in jobs:
        job.run(5)
    torch.testing.assert_close(vector(jobs[0]), vector(jobs[1]), rtol=1e-10, atol=1e-10)
    assert [row["participants"] for row in jobs[0].history] == [row["participants"] for row in jobs[1].history]


def test_diff2_finds_what_gradient_descent_finds_where_epsilon_is_large():
    settings = {"epsilon": 1e13, "clip": 1e3, "clip_difference": 1e3, "lr": 0.5, "rounds": 40, "noise_seed": 0}
    job = simulation(ALGORITHMS["diff2"](**settings), evaluate_every=40)
    job.run(40)
    model = build()
    for _ in range(40):
        gradients = torch.autograd.grad(square(model, (INPUTS, TARGETS)), list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p -= 0.5 * g
    expected = float(square(model, (INPUTS, TARGETS)).detach())
    assert job.history.last("loss") == pytest.approx(expected, rel=0.05)
    assert expected < 0.2

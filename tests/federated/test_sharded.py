"""Clients spread over real ranks: the same models and histories as in one process, for every algorithm."""

import pytest
import sharded_job
import torch
from test_algorithm_laws import NOISELESS
from torch import nn

from distopt.errors import CompatibilityError, ConfigError
from distopt.federated import FedAvg, UplinkCompression

FEW = ["fedavg", "scaffold", "fedvarp", "krum", "fedfix", "fisher"]  # each way of adding up
ROUNDS = 4
DESCRIBED = {name: algorithm.to_dict() for name, algorithm in NOISELESS.items()}


def same(found, expected):
    (models, rows), (expected_models, expected_rows) = found, expected
    torch.testing.assert_close(models, expected_models, rtol=1e-9, atol=1e-9)
    assert models[0].dtype == torch.float64
    assert rows == expected_rows


def test_two_ranks_make_what_one_process_makes(ranks):
    listed = list(DESCRIBED.values())
    by_rank = ranks(2)(sharded_job.all_trained, listed, "sharded", ROUNDS)
    alone = sharded_job.all_trained(listed, "loop", ROUNDS)
    for name, first, second, expected in zip(DESCRIBED, *by_rank, alone, strict=True):
        assert torch.equal(first[0], second[0]), name  # the ranks agree to the bit
        assert first[1] == second[1], name
        same(first, expected)
        assert (expected[0][-1] != expected[0][0]).any(), name


@pytest.mark.parametrize("noise_seed", [None, 0])
@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": "diff2", "num_clients": 4, "fewest_samples": 50, "rounds": 40, "interval": 3},
        {"algorithm": "diff2", "num_clients": 4, "fewest_samples": 50, "rounds": 40, "noise": "distributed"},
        {"algorithm": "dp-fedavg", "noise_multiplier": 3.0, "quantile": 0.5},
    ],
    ids=lambda settings: " ".join(str(settings[key]) for key in ("algorithm", "noise") if key in settings),
)
def test_ranks_of_a_private_job_draw_the_same_noise(ranks, settings, noise_seed):
    described = settings if noise_seed is None else {**settings, "noise_seed": noise_seed}
    (models, rows), (other_models, other_rows) = ranks(2)(sharded_job.private, described, ROUNDS)
    assert torch.equal(models, other_models)
    assert rows == other_rows
    _, rows_alone = sharded_job.private(described, ROUNDS)
    assert [row["epsilon"] for row in rows] == [row["epsilon"] for row in rows_alone]
    again = ranks(2)(sharded_job.private, described, ROUNDS)[0]
    assert torch.equal(again[0], models) == (noise_seed is not None)


def test_three_ranks_with_compressed_replies(ranks):
    listed = [DESCRIBED[name] for name in FEW]
    uplink = UplinkCompression(density=0.3)
    by_rank = ranks(3)(sharded_job.all_trained, listed, "auto", ROUNDS, uplink=uplink)
    alone = sharded_job.all_trained(listed, "loop", ROUNDS, uplink=uplink)
    for first, expected in zip(by_rank[0], alone, strict=True):
        same(first, expected)


@pytest.mark.parametrize("name", ["scaffold", "fedvarp", "fedbuff"])
def test_resumed_ranks_go_on_to_the_bit(ranks, tmp_path, name):
    whole = ranks(2)(sharded_job.trained, DESCRIBED[name], "sharded", 6)
    found = ranks(2)(sharded_job.resumed, DESCRIBED[name], tmp_path / "run.pt", 6)
    for (model, rows), (models, expected) in zip(found, whole, strict=True):
        assert torch.equal(model, models[-1])
        assert rows == expected


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_rank_that_fails_is_named_by_all(ranks, when):
    first, second = ranks(2)(sharded_job.failing, when)
    assert first.startswith("rank 1 could not train its clients: ")
    assert "ZeroDivisionError" in first
    assert "of rank 1" in second


def test_an_evaluation_that_fails_on_the_first_rank_keeps_no_other_waiting(ranks):
    (calls, first), (none, second) = ranks(2)(sharded_job.failing_to_evaluate)
    assert (calls, none) == ([0], [])
    assert first == "ZeroDivisionError: while evaluating"
    assert second == "rank 0 failed: ZeroDivisionError: while evaluating"


def test_without_ranks_it_is_refused():
    with pytest.raises(ConfigError, match="needs a process group, got none; start with torchrun"):
        sharded_job.job(FedAvg(), "sharded")
    with pytest.raises(ConfigError, match="mode must be one of 'auto', 'loop'"):
        sharded_job.job(FedAvg(), "fast")
    assert sharded_job.job(FedAvg(), "auto").mode != "sharded"


def excluded():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    try:
        sharded_job.job(FedAvg(), "sharded", model=model, exclude=("batch-norm",))
    except CompatibilityError as error:
        return str(error)
    return None


def test_tensors_that_would_differ_between_ranks_are_refused(ranks):
    assert all("got '1.weight' that is not" in said for said in ranks(2)(excluded))


@pytest.mark.parametrize(
    ("what", "said"),
    [("seed", "seed must be"), ("model", "the model must be"), ("checkpoint", "whether there is a checkpoint must be")],
)
def test_ranks_that_differ_say_so_instead_of_training(ranks, tmp_path, what, said):
    for told in ranks(2)(sharded_job.different, what, tmp_path):
        assert told.startswith(f"{said} the same on all ranks, got"), told

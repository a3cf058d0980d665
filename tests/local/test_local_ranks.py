"""Local steps between real ranks: the laws, and the simulation's results to the bit."""

import re

import local_rank
import numpy as np
import pytest
import torch

from distopt.errors import NonFiniteGradientError
from distopt.local import DiLoCo, SparseLoCo, simulate

STEPS = 14
SIZE = 3
SMALL = {"chunk": 16, "k": 4}
SETTINGS = {
    "sparse": SparseLoCo(inner_steps=4, **SMALL),
    "bins, senders, warm-up": SparseLoCo(
        inner_steps=4, values="2bit-bins", average="senders", warmup_rounds=2, decay=1.0, **SMALL
    ),
    "fragments": SparseLoCo(inner_steps=5, fragments=2, values="int8", outer_momentum=0.5, **SMALL),
    "overlap": SparseLoCo(inner_steps=5, overlap=2, outer_lr=0.7, buffers="keep", **SMALL),
    "fragments and overlap": SparseLoCo(inner_steps=5, fragments=3, overlap=4, buffers="keep", **SMALL),
    "dense": DiLoCo(inner_steps=4, buffers="keep"),
    "dense fragments and overlap": DiLoCo(inner_steps=4, fragments=2, overlap=2, buffers="keep"),
}


def simulated(algorithm, size, make=local_rank.make_model, steps=STEPS, momentum=0.9):
    return simulate(
        algorithm,
        make_model=make,
        batches=local_rank.batches(size),
        steps=steps,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=momentum),
        at_once=False,
    )


LONGER = ("fragments", "overlap", "dense")  # others of the settings have what they have


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONGER else ()) for name in SETTINGS]
)
def test_real_ranks_do_what_the_simulation_does(ranks, name):
    algorithm = SETTINGS[name]
    found = ranks(SIZE)(local_rank.trained, algorithm.to_dict(), STEPS)
    expected = simulated(algorithm, SIZE)
    for rank, each in enumerate(found):
        if isinstance(algorithm, SparseLoCo):
            assert torch.equal(each["theta"], expected.theta)
            assert torch.equal(each["model"], expected.models[rank])
            assert torch.equal(each["residual"], expected.residuals[rank])
        else:  # gloo adds up in another order
            assert torch.equal(each["theta"], found[0]["theta"])
            torch.testing.assert_close(each["theta"], expected.theta, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(each["model"], expected.models[rank], rtol=1e-5, atol=1e-6)
    if algorithm.buffers == "average":
        last = [each["buffers"][0] for each in found]
        assert torch.equal(last[0], last[1]) == (STEPS % algorithm.inner_steps == 0 and not algorithm.overlap)


def test_one_inner_step_of_sgd_with_all_sent_is_data_parallel_sgd(ranks):
    algorithm = SparseLoCo(inner_steps=1, chunk=16, k=16, decay=1.0, values="fp32", outer_lr=1.0)
    found = ranks(SIZE)(local_rank.trained, algorithm.to_dict(), 6, make=local_rank.make_plain, momentum=0.0)
    torch.manual_seed(0)
    model = local_rank.make_plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    given = local_rank.batches(SIZE)
    for number in range(6):
        inputs, labels = (torch.cat(each) for each in zip(*(given.of(r, number) for r in range(SIZE)), strict=True))
        local_rank.step(model, optimizer, (inputs, labels))
    for each in found:
        torch.testing.assert_close(each["model"], local_rank.flat(model.parameters()), rtol=1e-5, atol=1e-6)
        assert torch.equal(each["model"], found[0]["model"])


@pytest.mark.parametrize("size", [1, 2])
def test_any_number_of_ranks(ranks, size):
    for each in ranks(size)(local_rank.trained, SETTINGS["overlap"].to_dict(), 7):
        assert each["model"].isfinite().all()
        assert each["stats"]["members"] == list(range(size))


@pytest.mark.parametrize("name", ["sparse", "fragments and overlap", "dense"])
def test_counted_bytes_are_those_that_are_sent(ranks, name):
    algorithm, model = SETTINGS[name], local_rank.make_model()
    width = sum(p.numel() for p in model.parameters())
    # At attach the first rank gives the others theta, the outer momentum and learning rate, and what is beside theta.
    given = (SIZE - 1) * ((8 if algorithm.outer_momentum else 4) * width + sum(b.nbytes for b in model.buffers()) + 8)
    for rank, (stats, passed) in enumerate(ranks(SIZE)(local_rank.counted, algorithm.to_dict(), 8)):
        contributed = passed - (given if rank == 0 else 0)
        if name == "dense":
            letters = 2 * 8  # the outer learning rate goes to each of the others, the rest through an all-reduce
            assert stats["bytes_sent"] - letters == stats["bytes_dense"] == 2 * 4 * width
            assert contributed == letters * (SIZE - 1)
            assert stats["link_bytes_sent"] - passed == 2 * 2 * (SIZE - 1) * 4 * width // SIZE  # of a ring
        else:
            assert stats["link_bytes_sent"] == passed
            assert 0 < stats["bytes_sent"] * (SIZE - 1) == contributed


@pytest.mark.parametrize("name", ["dense", "dense fragments and overlap", "fragments and overlap"])
def test_observers_hear_each_round_s_pseudo_gradients_and_their_mean_where_there_is_one(ranks, name):
    algorithm = SETTINGS[name]
    found = ranks(2)(local_rank.deltas, algorithm.to_dict(), 3 * algorithm.inner_steps)
    for each in found:
        assert each["heard"]["begun"] == each["heard"]["ended"] == (2 if algorithm.overlap > 2 else 3)
    if name == "fragments and overlap":
        assert found[0]["heard"]["mean"] == 0.0
    else:
        mean = (found[0]["heard"]["local"] + found[1]["heard"]["local"]) / 2
        assert torch.equal(found[0]["heard"]["mean"], found[1]["heard"]["mean"])
        torch.testing.assert_close(found[0]["heard"]["mean"], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "messages"),
    [
        ("ddp", ["CompatibilityError: the averaging of local steps takes the place of DDP.s.*pass the module"] * 2),
        ("another optimizer", ["CompatibilityError: the optimizer must hold parameters of the model"] * 2),
        ("twice", ["CompatibilityError: a model must be attached once"] * 2),
        ("too many fragments", ["ConfigError: fragments must be at most the number of tensors"] * 2),
        ("another model on rank 1", ["DesyncError: every rank must attach with the same model"] * 2),
        ("another buffer on rank 1", ["DesyncError: every rank must attach with the same model"] * 2),
        ("another configuration on rank 1", ["DesyncError: every rank must attach with the same configuration"] * 2),
        ("complex", ["CompatibilityError: parameters must be dense and of a floating dtype"] * 2),
        ("lazy", ["CompatibilityError: parameters must have memory"] * 2),
        ("outer_lr", ["ConfigError: outer_lr must be a number above 0"] * 2),
        (
            "loaded afterwards",
            ["nothing", "CompatibilityError: a model must go into its first step as it was attached"],
        ),
        ("moved", ["CompatibilityError: a model must stay of the dtype.*got 'weight' of torch.float64.*move it"] * 2),
    ],
)
def test_bad_input_is_refused_on_all_ranks(ranks, case, messages):
    for found, message in zip(ranks(2)(local_rank.refused, case), messages, strict=True):
        assert re.search(message, found), found


def test_ranks_that_set_different_outer_learning_rates_keep_one_theta(ranks):
    first, second = ranks(2)(local_rank.with_own_outer_lr, SETTINGS["dense"].to_dict(), 8)
    assert torch.equal(first, second)


def test_a_model_that_is_not_finite_is_not_sent():
    model = local_rank.make_plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    batch = local_rank.INPUTS[:10], local_rank.LABELS[:10]
    with SparseLoCo(inner_steps=2, **SMALL).attach(model, optimizer) as attached:
        for _ in range(3):
            local_rank.step(model, optimizer, batch)
        before = local_rank.theta_of(attached), local_rank.residual_of(attached)
        with torch.no_grad():
            next(model.parameters())[0, 0] = torch.nan
        with pytest.raises(NonFiniteGradientError, match="nothing was sent and no residual was changed"):
            local_rank.step(model, optimizer, batch)
        assert torch.equal(before[0], local_rank.theta_of(attached))
        assert torch.equal(before[1], local_rank.residual_of(attached))
        assert attached.stats()["exchanges"] == 1


def test_a_rank_whose_step_has_failed_leaves_and_says_so_in_each_step_after(ranks):
    (nothing, members, exchanges), (said, _, _) = ranks(2)(local_rank.caught)
    assert (nothing, members, exchanges) == ([], [0], 6)
    assert re.match("NonFiniteGradientError: pseudo-gradients must be finite", said[0])
    assert len(said) == 4
    for each in said[1:]:
        assert re.match("DesyncError: a rank must make all exchanges.*failed with NonFinite.*then attach again", each)


def test_the_shared_model_is_a_copy_and_only_buffers_that_are_saved_are_averaged():
    model = local_rank.make_model()
    model.register_buffer("table", torch.ones(100), persistent=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with SparseLoCo(inner_steps=2, **SMALL).attach(model, optimizer) as attached:
        shared = attached.shared_state_dict()
        before = {name: value.clone() for name, value in shared.items()}
        for _ in range(2):
            local_rank.step(model, optimizer, (local_rank.INPUTS[:10], local_rank.LABELS[:10]))
        assert list(shared) == list(model.state_dict())
        assert all(torch.equal(before[name], value) for name, value in shared.items())
        assert attached._buffers.nbytes == 2 * 8 * 4  # BatchNorm's means and variances


@pytest.mark.parametrize("name", ["sparse", "dense"])
def test_ranks_that_train_on_the_same_data_are_told_once(ranks, name):
    for told in ranks(2)(local_rank.warned, SETTINGS[name].to_dict(), same=True):
        assert [re.match("ranks must train on data of their own, got 2 that", each) is not None for each in told] == [
            True
        ]
    assert ranks(2)(local_rank.warned, SETTINGS[name].to_dict(), same=False) == [[], []]


def test_detach_gives_the_optimizer_and_the_scaler_back(ranks):
    assert ranks(2)(local_rank.given_back) == [(0, True, [0, 1])] * 2


def test_the_mean_moves_and_nothing_is_lost(ranks):
    """sum of Delta == R * updates / alpha + residuals, over all ranks and with beta = 1."""
    algorithm = SparseLoCo(inner_steps=3, decay=1.0, outer_lr=0.5, **SMALL)
    found = ranks(SIZE)(local_rank.deltas, algorithm.to_dict(), 12)
    total = sum(each["deltas"].double() for each in found)
    moved = (found[0]["start"] - found[0]["theta"]).double() * SIZE / algorithm.outer_lr
    left = sum(each["residual"].double() for each in found)
    assert float(left.norm()) > 0.1 * float(moved.norm()) > 0
    np.testing.assert_allclose(total, moved + left, atol=1e-5)

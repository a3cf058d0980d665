"""Robust averages in whole rounds: liars move a plain mean and not these, and small rounds change nothing."""

import pytest
import torch

from distopt.federated import Bulyan, FedAvg, Krum, Median, MultiKrum, Reply, Server, TrimmedMean

D = 6
RULES = [TrimmedMean(num_byzantine=2), Median(num_byzantine=2), Krum(num_byzantine=2), MultiKrum(num_byzantine=2),
         MultiKrum(num_byzantine=2, num_selected=3), Bulyan(num_byzantine=2)]  # fmt: skip


def replies(count, liars=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    deltas = 1 + 0.1 * torch.randn(count, D, generator=generator, dtype=torch.float64)
    deltas[:liars] = -1e9
    return [
        Reply(client=client, version=0, num_samples=5, num_steps=1, tensors={"delta": delta})
        for client, delta in enumerate(deltas)
    ]


def one_round(algorithm, given):
    server = Server(algorithm, D)
    state = server.begin(torch.zeros(D, dtype=torch.float64), 20)
    return server.step(state, given)[0]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_liars_do_not_move_the_model(rule):
    honest = torch.stack([reply.delta for reply in replies(13)[2:]])
    model = one_round(rule, replies(13, liars=2)).model
    assert (model >= honest.amin(0)).all()
    assert (model <= honest.amax(0)).all()
    assert one_round(FedAvg(), replies(13, liars=2)).model.max() < -1e8


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_round_that_is_too_small_changes_nothing_and_is_counted(rule):
    few = rule.fewest_replies - 1
    state = one_round(rule, replies(few))
    assert torch.equal(state.model, torch.zeros(D, dtype=torch.float64))
    assert state.refused == {"too few replies": few}
    assert one_round(rule, replies(few + 1)).model.abs().min() > 0


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_the_order_of_arrival_changes_no_bit(rule):
    given = replies(13, liars=1)
    assert torch.equal(one_round(rule, given).model, one_round(rule, given[::-1]).model)


def test_the_server_s_rate_scales_the_step():
    given = replies(13)
    whole, half = (one_round(Median(server_lr=lr), given).model for lr in (1.0, 0.5))
    assert torch.equal(half, whole / 2)

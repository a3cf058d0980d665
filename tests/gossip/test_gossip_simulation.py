"""Many nodes in one process."""

import gossip_rank
import numpy as np
import pytest
import torch
from torch import nn

from distopt.errors import CompatibilityError, ConfigError
from distopt.gossip import Gossip, NodeBatches, simulate, simulation

NODES = 6


def run(gossip, **changed):
    settings = {
        "make_model": gossip_rank.make_model,
        "batches": gossip_rank.batches(NODES),
        "steps": 20,
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.5),
        "evaluate": lambda model: {
            "accuracy": (model(gossip_rank.INPUTS).argmax(1) == gossip_rank.LABELS).double().mean()
        },
        "evaluate_every": 5,
    }
    return simulate(gossip, **{**settings, **changed})


def test_the_same_arguments_give_the_same_bits():
    first, second = run(Gossip()), run(Gossip())
    assert torch.equal(first.models, second.models)
    assert first.rows == second.rows
    assert not torch.equal(first.models, run(Gossip(), seed=1).models)


def test_what_models_draw_in_training_comes_from_the_seed():
    def with_dropout():
        return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()

    first = run(Gossip(), make_model=with_dropout, steps=3)
    torch.rand(5)
    before = torch.random.get_rng_state()
    second = run(Gossip(), make_model=with_dropout, steps=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.models, second.models)


def test_nodes_learn_and_come_together():
    found = run(Gossip(topology="complete", correction="off"), steps=300, evaluate_every=50)
    assert found.rows[-1]["accuracy"] > 0.8
    assert found.rows[-1]["consensus_distance"] < 1e-8
    assert found.first_step("accuracy", 0.8) in [row["step"] for row in found.rows]
    assert found.first_step("accuracy", 2.0) is None
    numel = found.models.shape[1]
    assert found.rows[-1]["bytes_sent"] == 300 * NODES * (NODES - 1) * numel * 8


def test_the_same_start_gives_equal_models_where_everything_is_averaged():
    same = run(Gossip(topology="complete"), initial="same", steps=1)
    different = run(Gossip(topology="complete", every=5), initial="different", steps=1)
    assert (same.models - same.models.mean(0)).norm() < 1e-12
    assert (different.models - different.models.mean(0)).norm() > 0.1


class Counts(nn.Module):
    """What vmap cannot: a decision on the data."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3).double()

    def forward(self, x):
        return self.linear(x if x.sum() > 0 else -x)


def test_a_model_that_vmap_cannot_compute_is_computed_node_by_node(caplog):
    with caplog.at_level("INFO", logger="distopt"):
        found = run(Gossip(correction="off"), make_model=Counts, steps=4)
    assert "node by node" in caplog.text
    model = Counts()
    assert found.models.shape == (NODES, sum(p.numel() for p in model.parameters()))


def test_256_nodes_at_once_are_what_they_are_one_by_one(monkeypatch):
    inputs = torch.randn(1024, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = (inputs[:, 0] > 0).long()
    given = NodeBatches((inputs, labels), np.array_split(np.arange(1024), 256), 4)
    settings = {"batches": given, "steps": 2, "evaluate": None}
    at_once = run(Gossip(), **settings)
    assert at_once.models.shape[0] == 256

    def fails(*_, **__):
        raise RuntimeError("not now")

    monkeypatch.setattr(simulation, "vmap", fails)
    torch.testing.assert_close(run(Gossip(), **settings).models, at_once.models, rtol=1e-12, atol=1e-12)


def test_moments_are_kept_or_averaged_as_the_policy_says():
    for policy in ("keep", "average"):
        made = []

        def adam(parameters, made=made):
            made.append(torch.optim.Adam(parameters, lr=0.01))
            return made[0]

        run(Gossip(topology="complete", correction="off", optimizer_state=policy), steps=3, optimizer=adam)
        (state,) = made[0].state.values()
        for name in ("exp_avg", "exp_avg_sq"):
            assert (float((state[name] - state[name].mean(0)).abs().max()) < 1e-12) == (policy == "average")


def test_a_scheduler_steps():
    found = run(
        Gossip(correction="off"), steps=4,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 2)),
    )  # fmt: skip
    two = run(Gossip(correction="off", every=1), steps=2)
    assert not torch.equal(found.models, two.models)  # exchanges go on
    still = run(
        Gossip(correction="off", every=100), steps=4,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 2)),
    )  # fmt: skip
    assert torch.equal(still.models, run(Gossip(correction="off", every=100), steps=2).models)


def test_bad_input():
    with pytest.raises(CompatibilityError, match=r"no buffers, got '1.running_mean'; use GroupNorm"):
        run(Gossip(), make_model=lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)).double())
    with pytest.raises(CompatibilityError, match=r"parameters of one dtype, got .*convert it"):
        run(Gossip(), make_model=lambda: nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 3).double()))
    with pytest.raises(ConfigError, match=r"other names than the history's own, got 'step'; rename it"):
        run(Gossip(), evaluate=lambda model: {"step": 1.0})
    with pytest.raises(ConfigError, match=r"at least 50 indices .* got 40 for node 0; use a smaller batch_size"):
        NodeBatches((gossip_rank.INPUTS,), np.array_split(np.arange(240), NODES), 50)
    with pytest.raises(ConfigError, match=r"equally many samples, got \[240, 3\]"):
        NodeBatches((gossip_rank.INPUTS, torch.ones(3)), [np.arange(3)], 1)


def test_each_epoch_takes_every_sample_of_a_node_once():
    given = gossip_rank.batches(NODES)
    for node in range(NODES):
        taken = torch.cat([given.of(node, step)[0] for step in range(4)])
        assert len(torch.unique(taken, dim=0)) == 40
    assert torch.equal(given(2)[0][3], given.of(3, 2)[0])
    assert not torch.equal(given.of(0, 0)[0], given.of(0, 4)[0])

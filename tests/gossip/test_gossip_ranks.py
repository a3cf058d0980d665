"""Gossip between real ranks: what the simulation makes, and what a user's loop may do."""

import gossip_rank
import pytest
import torch
from test_mixing import GOSSIPS

from distopt.gossip import Choco, EdgeList, Gossip, TopKCodec, simulate

job = pytest.mark.job

SIZE, STEPS = 4, 12
HERE = {
    **GOSSIPS,
    "push-sum": Gossip(
        topology=EdgeList(edges=((0, 1), (1, 2), (2, 3), (3, 0), (0, 2)), directed=True), mixing="push-sum"
    ),
    "push-sum overlapped": Gossip(
        topology=EdgeList(edges=((0, 1), (1, 2), (2, 3), (3, 0), (0, 2)), directed=True),
        mixing="push-sum",
        exchange="overlapped",
    ),
    "d-psgd corrected": Gossip(correction="on"),
    "choco corrected": Gossip(
        topology="ring", mixing=Choco(codec=TopKCodec(density=0.5), gamma=0.5), correction="on", every=2
    ),
    "moments averaged": Gossip(optimizer_state="average"),
}


def simulated(gossip, momentum):
    return simulate(
        gossip,
        make_model=gossip_rank.make_model,
        batches=gossip_rank.batches(SIZE),
        steps=STEPS,
        optimizer=lambda parameters: gossip_rank.make_optimizer(parameters, momentum),
        evaluate_every=STEPS,
    )


@job
@pytest.mark.parametrize("name", HERE)
def test_ranks_make_what_the_simulation_makes(ranks, name):
    gossip = HERE[name]
    momentum = 0.0 if gossip.rule.replaces_momentum else 0.5
    found = ranks(SIZE)(gossip_rank.trained, gossip.to_dict(), STEPS, momentum)
    expected = simulated(gossip, momentum)
    for rank, (model, stats) in enumerate(found):
        torch.testing.assert_close(model, expected.models[rank], rtol=1e-9, atol=1e-11)
        assert stats["members"] == list(range(SIZE))
        assert stats["steps"] == STEPS
        assert stats["exchanges"] == STEPS // gossip.every
        assert not stats["lost"]
    ratios = [stats["variance_ratio"] for _, stats in found]
    if gossip.correction == "on":
        assert min(ratios) == pytest.approx(expected.rows[-1]["variance_ratio"], rel=1e-9)
        assert min(ratios) < 1
    assert len({model.numpy().tobytes() for model, _ in found}) > 1 or name == "d-psgd corrected"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_number_of_ranks(ranks, size):
    found = ranks(size)(gossip_rank.trained, Gossip().to_dict(), 6)
    assert all(model.isfinite().all() for model, _ in found)


@job
@pytest.mark.parametrize("name", ["d-psgd", "push-sum", "a2cid2", "moments averaged"])
def test_a_checkpoint_goes_on_to_the_bit(ranks, tmp_path, name):
    described = HERE[name].to_dict()
    whole = ranks(SIZE)(gossip_rank.trained, described, STEPS, 0.5)
    again = ranks(SIZE)(gossip_rank.resumed, described, STEPS, tmp_path)
    for (model, _), resumed in zip(whole, again, strict=True):
        assert torch.equal(model, resumed)


@pytest.mark.parametrize(
    ("name", "views"), [("tied", True), ("mixed", True), ("convolutions", True), ("overlapping", False)]
)
def test_models_of_all_kinds_are_averaged_and_given_back(ranks, name, views):
    gossip = Gossip(topology="complete", correction="off")
    for found, pointers, parameters in ranks(2)(gossip_rank.of_model, name, gossip.to_dict(), 3):
        assert found == views
        assert pointers == (parameters if views else 1)


@job
@pytest.mark.parametrize("exchange", ["synchronous", "overlapped"])
def test_steps_that_a_scaler_skips_are_exchanges_all_the_same(ranks, exchange):
    gossip = Gossip(topology="complete", correction="off", exchange=exchange)
    found = ranks(3)(gossip_rank.with_skipped_steps, gossip.to_dict(), 5)
    assert all((steps, exchanges) == (5, 5) for _, steps, exchanges in found)
    if exchange == "synchronous":
        assert torch.allclose(found[0][0], found[1][0])


def test_consensus_distance(ranks):
    for distance, size in ranks(3)(gossip_rank.consensus, Gossip().to_dict()):
        assert distance == pytest.approx((size * 2 / 3) ** 0.5)  # of 0, 1 and 2 around 1


@pytest.mark.parametrize(
    ("case", "messages"),
    [
        (
            "ddp",
            ["CompatibilityError: the averaging of gossip takes the .*pass the module"] * 2,
        ),
        (
            "a part in ddp",
            ["CompatibilityError: the averaging of gossip takes the .*pass the module"] * 2,
        ),
        ("another optimizer", ["CompatibilityError: the optimizer must hold parameters of the model"] * 2),
        ("momentum", ["quasi-global-momentum has a memory of its own .* momentum 0.9; use torch.optim.SGD"] * 2),
        ("another model on rank 1", ["DesyncError: every rank must attach with the same model"] * 2),
        ("another configuration on rank 1", ["DesyncError: every rank must attach with the same configuration"] * 2),
        ("wrong number of ranks", ["ConfigError: the graph and the job must have equally many ranks, got 3 and 2"] * 2),
        ("another secret on rank 1", ["PeerLostError: rank . must reach rank .*the same DISTOPT_JOB_SECRET"] * 2),
        ("no address of rank 1", ["rank 1 cannot attach: cannot listen on 192", "ConfigError: cannot listen on 192"]),
        ("complex", ["CompatibilityError: parameters must be dense and of a floating dtype, got 'weight'"] * 2),
    ],
)
def test_bad_input_is_refused_on_all_ranks(ranks, case, messages):
    import re

    for found, message in zip(ranks(2)(gossip_rank.refused, case), messages, strict=True):
        assert re.search(message, found), found


@job
def test_asynchronous_exchanges_bring_ranks_together_and_keep_nobody_waiting(ranks):
    gossip = Gossip(topology="complete", correction="off", exchange="asynchronous")
    found = ranks(3)(gossip_rank.trained, gossip.to_dict(), 60)
    models = torch.stack([model for model, _ in found])
    assert all(stats["exchanges"] + stats["passed"] == 60 for _, stats in found)
    alone = ranks(3)(gossip_rank.trained, Gossip(every=1000, correction="off").to_dict(), 60)
    apart = torch.stack([model for model, _ in alone])
    # By how much depends on how many exchanges a busy machine has found time for.
    assert (models - models.mean(0)).norm() < (apart - apart.mean(0)).norm()

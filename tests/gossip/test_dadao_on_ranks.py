"""DADAO between real ranks: what the simulation makes, to the bit."""

import pytest
import torch
import torch.distributed as dist
from test_dadao import ridge

from distopt.errors import CompatibilityError, DistoptError
from distopt.gossip import run_dadao, simulate_dadao

pytestmark = pytest.mark.job
SETTINGS = {"topology": "ring", "num_gradients": 600, "seed": 3}


def on_rank(**changed):
    rank = dist.get_rank()
    problem = ridge(dist.get_world_size(), 3, 10)
    found = run_dadao(
        lambda x: problem["gradient"](rank, x),
        start=problem["start"][rank],
        smoothness=problem["smoothness"],
        strong_convexity=problem["strong_convexity"],
        **{**SETTINGS, **changed},
    )
    return found, problem["solution"]


def refused(case):
    try:
        on_rank(**({"seed": dist.get_rank()} if case == "seed" else {"topology": "one-peer-exponential"}))
    except DistoptError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_ranks_make_what_the_simulation_makes(ranks):
    expected = simulate_dadao(**ridge(4, 3, 10), **SETTINGS).nodes
    for rank, (found, solution) in enumerate(ranks(4)(on_rank)):
        assert torch.equal(found, expected[rank])
        torch.testing.assert_close(found, solution, rtol=0, atol=0.1)


def test_bad_input(ranks):
    for said in ranks(4)(refused, "seed"):
        assert said.startswith("DesyncError: every rank must attach with the same settings")
    for said in ranks(4)(refused, "topology"):
        assert "same graph in every round, got 'one-peer-exponential'; use 'ring'" in said
    with pytest.raises(CompatibilityError, match=r"process group, got none; call init_process_group.* simulate_dadao"):
        run_dadao(lambda x: x, start=torch.zeros(2), smoothness=2.0, strong_convexity=1.0, **SETTINGS)

"""Ranks that wait for nobody: nothing is lost on the way, and what is under way arrives before a checkpoint."""

import execution_rank
import pytest
import torch

from distopt.gossip import EdgeList, Gossip, RandomMatchings, Ring

pytestmark = pytest.mark.job

SIZE = 4
DIRECTED = EdgeList(edges=((0, 1), (1, 2), (2, 3), (3, 0), (0, 2)), directed=True)
GOSSIPS = {
    "d-psgd": Gossip(topology="ring", correction="off", exchange="asynchronous"),
    "push-sum": Gossip(topology=DIRECTED, mixing="push-sum", correction="off", exchange="asynchronous"),
    "a2cid2": Gossip(topology=RandomMatchings(of=Ring()), mixing="a2cid2", exchange="asynchronous"),
}


def check_nothing_is_lost(found):
    """The sum over ranks is that of all starts and updates, to 1e-12 of its size."""
    total, expected = (torch.stack([each[name] for each in found]).mean(0) for name in ("sum", "expected"))
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)
    assert sum(each["weight"] for each in found) == pytest.approx(SIZE, abs=1e-12)
    assert len({each["round"] for each in found}) == 1
    assert all(each["members"] == list(range(SIZE)) and not each["meetings"] for each in found)


@pytest.mark.parametrize("lr", [0.0, 0.1])
@pytest.mark.parametrize("name", GOSSIPS)
def test_nothing_is_lost_among_ranks_at_their_own_pace(ranks, name, lr):
    gossip = GOSSIPS[name]
    found = ranks(SIZE)(execution_rank.waiting_for_nobody, gossip.to_dict(), 40, lr)
    check_nothing_is_lost(found)
    assert all(each["steps"] == 40 + 5 * rank for rank, each in enumerate(found))
    apart = torch.stack([each["expected"] for each in found])
    # By how much depends on how many exchanges a busy machine has found time for.
    assert found[0]["distance"] < float((apart - apart.mean(0)).square().sum(1).mean().sqrt())
    if name == "push-sum":
        assert max(abs(each["weight"] - 1) for each in found) > 0.1


@pytest.mark.parametrize("name", ["push-sum", "a2cid2"])
def test_a_checkpoint_waits_for_what_is_under_way(ranks, tmp_path, name):
    found = ranks(SIZE)(execution_rank.waiting_for_nobody, GOSSIPS[name].to_dict(), 30, 0.1, tmp_path)
    check_nothing_is_lost(found)


@pytest.mark.parametrize("name", ["d-psgd", "push-sum", "a2cid2"])
def test_nobody_waits_for_one_that_has_not_begun(ranks, name):
    """Any that did would wait here for ever."""
    topology = RandomMatchings() if name == "a2cid2" else Ring()
    gossip = Gossip(topology=topology, mixing=name, correction="off", exchange="asynchronous")
    first, second = ranks(2)(execution_rank.one_behind_the_other, gossip.to_dict(), 10)
    assert first["steps"] == second["steps"] == 10
    assert (first["exchanges"], first["passed"]) == (1, 9)  # the first is under way all the time
    assert first["round"] == second["round"] >= 1

"""Ranks that are killed, stopped, late or cut off, in jobs of real processes that no agent holds together."""

import signal
import time

import numpy as np
import pytest

from distopt.gossip import (
    Choco,
    EdgeList,
    Gossip,
    GradientTracking,
    NoLoCo,
    PushSum,
    QuasiGlobalMomentum,
    RandomMatchings,
    TopKCodec,
    Weighted,
)
from rank_job import Job

pytestmark = [pytest.mark.job, pytest.mark.timeout(300)]

SIZE = 4
PATH = tuple((i, i + 1) for i in range(SIZE - 1))
LAZY_RING = tuple(tuple((0.5, 0.25, 0.0, 0.25)[(i - j) % SIZE] for j in range(SIZE)) for i in range(SIZE))
RULES = {
    "d-psgd": Gossip(correction="off"),
    "every 4": Gossip(topology="ring", every=4, correction="off"),
    "corrected": Gossip(topology="complete", correction="on"),
    "path": Gossip(topology=EdgeList(edges=PATH), correction="off"),
    "weights": Gossip(topology=Weighted(weights=LAZY_RING), correction="off"),
    "push-sum": Gossip(
        topology=EdgeList(edges=((0, 1), (1, 2), (2, 3), (3, 0), (0, 2)), directed=True),
        mixing=PushSum(),
        correction="off",
    ),
    "choco": Gossip(topology="ring", mixing=Choco(codec=TopKCodec(density=0.3), gamma=0.4), correction="off"),
    "tracking": Gossip(topology="ring", mixing=GradientTracking()),
    "quasi-global": Gossip(topology="ring", mixing=QuasiGlobalMomentum(), correction="off"),
    "a2cid2": Gossip(topology=RandomMatchings(), mixing="a2cid2"),
    "noloco": Gossip(topology=RandomMatchings(), mixing=NoLoCo(), every=2),
    "overlapped": Gossip(topology="ring", exchange="overlapped", correction="off"),
}


@pytest.fixture
def job(warm_python, tmp_path):
    def start(size, gossips, **options):
        return Job(warm_python, tmp_path / str(len(list(tmp_path.iterdir()))), size, gossips, **options)

    return start


def models(job, ranks, kind, name, key="model"):
    return np.array([job.events(rank, kind, name)[-1][key] for rank in ranks])


def mean_of_reached(job, ranks, name):
    """The means of the survivors' models, in the crew that they have found and where all are in the same round."""
    reached = [job.events(rank, "reached", name)[-1] for rank in ranks]
    assert len({each["round"] for each in reached}) == 1
    assert np.isfinite([each["model"] for each in reached]).all()
    return models(job, ranks, "crew", name).mean(0), np.array([each["model"] for each in reached]).mean(0)


def assert_named(job, ranks, lost):
    """Each survivor counts these as lost, and has said so in one line for each of its attachments."""
    for rank in ranks:
        for event in job.events(rank, "ended"):
            assert event["stats"]["lost"] == lost, event["name"]
            assert event["stats"]["joined"] == []
        (log,) = job.events(rank, "log")
        for one in lost:
            lines = [line for line in log["lines"] if str(one) in line.partition("lost:")[2].split(";")[0]]
            assert len(lines) == len(job.events(rank, "ended")), log["lines"]


def killed(job, victims, gossips):
    left = [rank for rank in range(SIZE) if rank not in victims]
    with job(SIZE, gossips, until=len(left), more=12) as ranks:
        ranks.start()
        ranks.wait_for_rounds(range(SIZE), 3)
        ranks.kill(*victims)
        ranks.wait_for(left, "reached", names=gossips)
        ranks.stop()
        for name in gossips:
            before, after = mean_of_reached(ranks, left, name)
            if name != "corrected":  # keeps the spread, not the mean
                np.testing.assert_allclose(after, before, rtol=0, atol=1e-12, err_msg=name)
            crew = [ranks.events(rank, "crew", name)[-1] for rank in left]
            assert all(each["members"] == left for each in crew)
        assert_named(ranks, left, victims)
        return ranks, left


def test_the_mean_of_those_who_are_left_is_kept_under_every_rule(job):
    ranks, left = killed(job, [1], RULES)
    apart = {name: models(ranks, left, "reached", name) for name in RULES}
    for name, found in apart.items():
        began = models(ranks, range(SIZE), "began", name)
        assert found.std(0).max() < 0.5 * began.std(0).max(), name  # they still average


@pytest.mark.parametrize("victims", [[0], [0, 3]], ids=["the lead", "two at once"])
def test_the_lead_and_several_may_go(job, victims):
    killed(job, victims, {name: RULES[name] for name in ("d-psgd", "path", "choco")})


def test_estimates_of_the_gradient_have_its_mean_again(job):
    gossips = {"tracking": RULES["tracking"]}
    with job(4, gossips, lr=0.05, until=3, more=10) as ranks:
        ranks.start()
        ranks.wait_for_rounds(range(4), 6)
        ranks.kill(2)
        ranks.wait_for([0, 1, 3], "reached", names=gossips)
        ranks.stop()
        states = [ranks.events(rank, "reached")[-1]["states"][0] for rank in (0, 1, 3)]
        tracked, gradient = (np.array([each[key] for each in states]).mean(0) for key in ("tracked", "gradient"))
        np.testing.assert_allclose(tracked, gradient, rtol=0, atol=1e-12)
        assert np.abs(gradient).max() > 1e-3


def test_asynchronous_ranks_go_on_as_well(job):
    gossips = {"async": Gossip(topology="ring", exchange="asynchronous", correction="off")}
    with job(SIZE, gossips, until=3, more=20) as ranks:
        ranks.start()
        ranks.wait_for_rounds(range(SIZE), 6)
        ranks.kill(0)
        left = [1, 2, 3]
        ranks.wait_for(left, "reached")
        ranks.stop()
        before, after = mean_of_reached(ranks, left, "async")
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-12)
        assert_named(ranks, left, [0])


def test_a_stopped_rank_is_waited_for_or_left_out_as_the_configuration_says(job):
    patient = {"ring": Gossip(topology="ring", correction="off"), "every 4": Gossip(every=4, correction="off")}
    asynchronous = {"async": Gossip(topology="ring", exchange="asynchronous", correction="off")}
    impatient = {"ring": Gossip(topology="ring", correction="off", peer_timeout=2.0, grace=1.0)}
    with (
        job(3, patient, until=3, more=10**6) as waiting,
        job(3, asynchronous, until=3, more=10**6) as stepping,
        job(3, impatient, until=3, more=10**6) as leaving,
    ):
        jobs = (waiting, stepping, leaving)
        for each in jobs:
            each.start()
        for each in jobs:
            each.wait_for_rounds(range(3), 8)
            each.signal(0, signal.SIGSTOP)  # the lead
        stopped_at = time.monotonic()
        leaving.wait(lambda: all(leaving.events(rank, "crew") for rank in (1, 2)), "the others go on")
        leaving.wait_for_rounds((1, 2))
        assert [event["members"] for event in leaving.events(1, "crew")] == [[1, 2]]
        time.sleep(max(0.0, 10.0 - (time.monotonic() - stopped_at)))
        steps = {rank: len(stepping.events(rank, "steps")) for rank in (1, 2)}
        stepping.wait(lambda: all(len(stepping.events(rank, "steps")) > steps[rank] for rank in steps), "steps")
        for each in jobs:
            each.signal(0, signal.SIGCONT)
        leaving.wait(lambda: leaving.events(0, "crew"), "the one that was stopped comes back")
        for each in jobs:
            each.wait_for_rounds(range(3))
            for rank in range(3):
                crews = [event["members"] for event in each.events(rank, "crew")]
                assert crews[-1:] == ([[0, 1, 2]] if each is leaving else [])
        for each in jobs:
            each.stop()
            for rank in range(3):
                (log,) = each.events(rank, "log")
                left_out = each is leaving and rank > 0
                assert log["lines"] == ["training goes on with ranks 1, 2; lost: 0"] * left_out
                for ended in each.events(rank, "ended"):
                    assert ended["stats"]["lost"] == ended["stats"]["joined"] == []
        for each in jobs:  # all have averaged since
            for name in each.events(0, "ended"):
                found = models(each, range(3), "ended", name["name"])
                began = models(each, range(3), "began", name["name"])
                np.testing.assert_allclose(found, began.mean(0)[None].repeat(3, 0), rtol=0, atol=0.2 * began.std())


LATE = {
    "d-psgd": Gossip(correction="off"),
    "path": Gossip(topology=EdgeList(edges=((0, 1), (1, 2))), optimizer_state="average", correction="off"),
    "async": Gossip(topology="ring", exchange="asynchronous", correction="off"),
}


@pytest.mark.parametrize("name", [pytest.param("d-psgd", marks=pytest.mark.slow), "path", "async"])
def test_a_rank_that_comes_late_takes_the_average(job, name):
    everybody = [0, 1, 2, 3]
    with job(3, {name: LATE[name]}, until=4, more=12, pause_s=0.02) as ranks:
        ranks.start()
        ranks.wait_for(range(3), "steps")
        ranks.start([3], join={name: ranks.events(1, "attached")[0]["address"]})
        ranks.wait_for(everybody, "reached")
        ranks.stop()
        (came,) = ranks.events(3, "began")
        assert not np.allclose(came["model"], came["before"])
        old = models(ranks, range(3), "crew", name)
        if name != "async":  # where others go on with their own meanwhile
            np.testing.assert_allclose(came["model"], old.mean(0), rtol=0, atol=1e-14)
            statistics = models(ranks, range(3), "crew", name, "statistics")
            np.testing.assert_allclose(came["statistics"], statistics.mean(0), rtol=0, atol=1e-14)
        reached = models(ranks, everybody, "reached", name)
        np.testing.assert_allclose(reached.mean(0), np.vstack([old, [came["model"]]]).mean(0), rtol=0, atol=1e-12)
        for rank in everybody:
            stats = ranks.events(rank, "ended")[0]["stats"]
            assert stats["members"] == everybody
            assert stats["joined"] == ([3] if rank < 3 else [])
            assert stats["lost"] == []


def test_a_job_that_is_killed_and_started_again_ends_with_the_same_bits(job, tmp_path):
    gossips = {"d-psgd": Gossip(every=2), "push-sum": RULES["push-sum"], "moments": Gossip(optimizer_state="average")}
    folder = str(tmp_path / "checkpoints")
    with job(SIZE, gossips, lr=0.1, steps=12, checkpoints=folder + "-of-another") as undisturbed:
        undisturbed.start()
        with job(SIZE, gossips, lr=0.1, steps=12, checkpoints=folder, wait=True) as first:
            first.start()
            first.wait_for(range(SIZE), "trained", names=gossips)
            first.kill(*range(SIZE))
        with job(SIZE, gossips, lr=0.1, steps=12, checkpoints=folder, resume=True) as second:
            second.start()
            second.wait_for(range(SIZE), "ended", names=gossips)
            undisturbed.wait_for(range(SIZE), "ended", names=gossips)
            for name in gossips:
                assert {second.events(rank, "trained", name)[0]["began_at"] for rank in range(SIZE)} == {6}
                for key in ("model", "statistics"):
                    found, expected = (models(each, range(SIZE), "ended", name, key) for each in (second, undisturbed))
                    assert (found == expected).all()
                    assert found.std(0).max() > 0 or key == "statistics"
            second.stop()
        undisturbed.stop()


def test_a_flush_leaves_nothing_of_asynchronous_ranks_under_way(job):
    """Ranks of different speed; then all stop at once, wherever they are."""
    gossips = {
        "d-psgd": Gossip(topology="ring", exchange="asynchronous", correction="off"),
        "push-sum": Gossip(
            topology=RULES["push-sum"].topology, mixing="push-sum", exchange="asynchronous", correction="off"
        ),
    }
    with job(SIZE, gossips, flush_after=60) as ranks:
        ranks.start(pause_s=[0.0, 0.001, 0.004, 0.012])
        ranks.wait_for(range(SIZE), "reached", names=gossips)
        ranks.stop()
        for name in gossips:
            began, reached = (models(ranks, range(SIZE), kind, name) for kind in ("began", "reached"))
            assert len({ranks.events(rank, "reached", name)[0]["round"] for rank in range(SIZE)}) == 1
            weights = [each["states"][0].get("weight", [[1.0]])[0][0] for rank in range(SIZE)
                       for each in ranks.events(rank, "reached", name)]  # fmt: skip
            np.testing.assert_allclose(np.average(reached, 0, weights), began.mean(0), rtol=0, atol=1e-12)
            assert np.ptp(weights) > 1e-3 or name == "d-psgd"

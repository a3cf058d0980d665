"""The model of the link against hand calculations, and what it makes of the routes."""

import pytest
import torch
import torch.distributed as dist

import distopt
from distopt.comm import Link, Place, measure_link
from distopt.ddp.forecast import Forecaster
from distopt.ddp.prediction import Predictor, measure_speed

M = 25_557_032
NO_WORK = dict.fromkeys(("average_s", "select_s", "select_more_s", "scan_s", "add_s", "clear_s", "overhead_s"), 0.0)
NANOSECOND = NO_WORK | {"average_s": 5e-10, "select_s": 5e-10, "select_more_s": 1e-8, "add_s": 2e-9, "clear_s": 1e-10}
GIGABIT = Link(latency_s=1e-4, bandwidth=1.25e8)


def forecaster(link=GIGABIT, numel=M, speed=NO_WORK, **fields):
    from distopt.ddp.prediction import Speed

    return Forecaster(numel=numel, predictor=Predictor(link=link, speed=Speed(**speed)), **fields)


def test_collectives_by_hand():
    link = Link(latency_s=1e-3, bandwidth=1e6, reduction=1e8)
    assert link.allreduce_s(4, 4e6) == pytest.approx(6 * (1e-3 + 1.0) + 0.04)
    assert link.allgather_s(4, 1e6) == pytest.approx(3 * 1.001)
    assert link.alltoall_s(4, 1e5) == pytest.approx(3 * 0.101)
    assert link.gather_to_first_s(3, 2e6) == pytest.approx(2 * 2.001)
    assert Link(latency_s=1e-3, bandwidth=1e6).allreduce_s(2, 2e6) == pytest.approx(2.002)


@pytest.mark.parametrize("num_ranks", [2, 4, 16, 1024])
def test_without_work_seconds_are_bytes_and_messages(num_ranks):
    ask = forecaster()
    for route, messages in (("whole", 3), ("allgather", 1), ("balanced", 2)):
        found = ask.forecast(route, num_ranks, 1e-3)
        expected = found.link_bytes / 1.25e8 + messages * (num_ranks - 1) * 1e-4
        assert found.seconds == pytest.approx(expected, rel=1e-3)


def test_bytes_of_the_balanced_exchange_stay_flat_and_those_of_the_all_gather_grow():
    curves = forecaster().curves((8, 16, 64, 256, 1024), 1e-3)
    sent = {route: [each.link_bytes for each in curve] for route, curve in curves.items()}
    assert max(sent["balanced"]) < 1.25 * min(sent["balanced"])
    for n, found in zip((8, 16, 64, 256, 1024), sent["allgather"], strict=True):
        assert found == pytest.approx((n - 1) * 8 * 25_558, rel=1e-3)
    assert sent["allgather"][-1] > sent["whole"][-1]  # past break-even at 1,000 ranks


def test_who_wins_where():
    slow = forecaster(Link(latency_s=1e-5, bandwidth=1.25e7), speed=NANOSECOND)
    assert slow.fastest(2, 1e-3).route == "allgather"
    assert slow.fastest(64, 1e-3).route == "balanced"
    assert forecaster(Link(latency_s=1e-9, bandwidth=1e15), speed=NANOSECOND).fastest(8, 1e-3).route == "whole"


def test_break_even_density():
    assert forecaster().break_even_density(16) == pytest.approx(8 / (16 * 8), rel=0.01)
    assert forecaster(values="fp16").break_even_density(16) == pytest.approx(4 / (16 * 6), rel=0.01)
    assert forecaster(Link(latency_s=1e-9, bandwidth=1e15), speed=NANOSECOND).break_even_density(4) is None
    assert forecaster(values="fp16", indices="block16").break_even_density(2) == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"numel": 0}, "numel must be an integer of at least 1"), ({"values": "int8"}, "values must be one of")],
)
def test_refused(fields, message):
    with pytest.raises(distopt.errors.ConfigError, match=message):
        forecaster(**fields)


def test_hierarchy_pays_for_what_is_inside_the_node_and_spares_the_network():
    from distopt.ddp.prediction import Speed

    slow, fast = Link(latency_s=1e-4, bandwidth=1.25e7), Link(latency_s=1e-6, bandwidth=1e11)
    predict = Predictor(link=slow, speed=Speed(**NO_WORK), node_link=fast, leader_link=slow)
    plan = forecaster().plan("allgather", 16, 0.01)
    import dataclasses

    place = Place(num_ranks=16, num_nodes=2, node_size=8)
    returned = dataclasses.replace(plan.layout, num_flags=0)
    status = dataclasses.replace(plan.layout, count=0)
    tree = dataclasses.replace(plan, route="hierarchical", place=place, layout=status, returned=returned)
    assert predict(tree) < predict(dataclasses.replace(plan, place=place)) / 5
    assert predict(tree) > returned.nbytes / 1.25e7  # one payload crosses the network


def both():
    group = dist.group.WORLD
    return measure_link(group, torch.device("cpu")), measure_speed(group, torch.device("cpu"))


def test_every_rank_measures_the_same(ranks):
    results = ranks(3)(both)
    assert results[0] == results[1] == results[2]
    link, speed = results[0]
    assert link.latency_s > 0
    assert link.bandwidth > 0
    assert speed.select_s > 0
    assert speed.select_more_s >= 0

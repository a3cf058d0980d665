"""Whole jobs under Flower's simulation engine, in its real processes, against `distopt.federated.Simulation`."""

import re

import pytest
import torch

pytest.importorskip("flwr", reason="Flower has an environment of its own: make test-flower")

from flower_processes import Flower

from distopt.federated import FederatedAlgorithm
from flower_test_app.work import Job

pytestmark = [pytest.mark.job, pytest.mark.timeout(1200)]

NUM_CLIENTS = 4
OFTEN = {"participation": "bernoulli", "probability": 0.6}
ONE_BY_ONE = {"num_byzantine": 0}
JOBS = [
    {"algorithm": {"algorithm": "fedau", "cutoff": 3}, "participation": OFTEN},
    {"algorithm": {"algorithm": "fedavg", "server_optimizer": {"optimizer": "adam"}}},
    {"algorithm": {"algorithm": "fedavg"}, "uplink": True, "participation": {"participation": "uniform", "count": 2}},
    {"algorithm": {"algorithm": "scaffold"}, "participation": OFTEN},
    {"algorithm": {"algorithm": "fedspeed"}, "participation": OFTEN},
    {"algorithm": {"algorithm": "feddyn"}},
    {"algorithm": {"algorithm": "fedprox"}},
    {"algorithm": {"algorithm": "fednova"}},
    {"algorithm": {"algorithm": "fedvarp"}, "participation": OFTEN},
    {"algorithm": {"algorithm": "mifa"}, "participation": OFTEN},
    {"algorithm": {"algorithm": "average-all"}, "participation": OFTEN},
    {"algorithm": {"algorithm": "known-participation", "probability": 0.6}, "participation": OFTEN},
    {"algorithm": {"algorithm": "fisher"}},
    {"algorithm": {"algorithm": "krum", **ONE_BY_ONE}},
    {"algorithm": {"algorithm": "multi-krum", **ONE_BY_ONE}},
    {"algorithm": {"algorithm": "trimmed-mean", **ONE_BY_ONE}},
    {"algorithm": {"algorithm": "median", **ONE_BY_ONE}},
    {"algorithm": {"algorithm": "bulyan", **ONE_BY_ONE}},
    # Of those that do not wait: every aggregation has everybody, so that the real clock decides nothing.
    {"algorithm": {"algorithm": "fedbuff", "buffer_size": NUM_CLIENTS}},
]
DO_NOT_WAIT = {"fedfix", "fedbuff", "fedasync", "async-fedavg"}  # test_flower_rounds.py has them on a clock
PRIVATE = {"diff2", "dp-gd", "dp-fedavg"}  # whose noise is each process's own: test_flower_rounds.py
NAMES = [each["algorithm"]["algorithm"] for each in JOBS]


@pytest.fixture(scope="module")
def flower(tmp_path_factory):
    flower = Flower(tmp_path_factory.mktemp("flower"), simulation=True)
    yield flower
    flower.close()


@pytest.fixture(scope="module")
def left(flower):
    return flower.left({"num_clients": NUM_CLIENTS, "jobs": JOBS}, num_nodes=NUM_CLIENTS)


def test_every_algorithm_is_among_the_jobs():
    known = {name for name, made in FederatedAlgorithm._known.items() if issubclass(made, FederatedAlgorithm)}
    assert known == {*NAMES, *DO_NOT_WAIT, *PRIVATE}


@pytest.mark.parametrize("number", range(len(JOBS)), ids=NAMES)
def test_model_and_history_are_the_simulators_to_the_bit(left, number):
    simulation = Job(JOBS[number]).simulated(NUM_CLIENTS)
    rows = [{key: value for key, value in row.items() if key != "time_s"} for row in left[number]["history"]]
    expected = [{key: value for key, value in row.items() if key != "time_s"} for row in simulation.history]
    assert rows == expected
    for name, tensor in simulation.model.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(left[number]["arrays"][name], tensor), name
    assert left[number]["refused"] == left[number]["lost"] == {}


def test_replies_that_do_not_fit_and_a_client_that_fails(flower):
    """NaN, garbage in place of an array, another shape, an exception: each counts as not participating."""
    faults = {"1": {"0": "nan", "1": "garbage"}, "2": {"1": "shape", "2": "raise"}}
    job = {"algorithm": {"algorithm": "fedau", "cutoff": 50}, "rounds": 4}
    told = {"num_clients": NUM_CLIENTS, "jobs": [job], "faults": faults}
    (left,) = flower.left(told, num_nodes=NUM_CLIENTS)
    assert left["refused"] == {"not finite": 1, "unreadable": 1, "shape": 1}
    assert sum(left["lost"].values()) == 1
    assert "no data today" in next(iter(left["lost"]))
    assert [row["participants"] for row in left["history"]] == [[0, 1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2, 3]]
    assert [row["refused"] for row in left["history"]] == [1, 2, 0, 0]
    assert all(tensor.isfinite().all() for tensor in left["arrays"].values())


@pytest.mark.slow
def test_fewer_nodes_than_clients_and_a_node_with_another_model(flower):
    job = {"algorithm": {"algorithm": "fedavg"}}
    told = {"num_clients": NUM_CLIENTS, "jobs": [job]}
    (left,) = flower.left({**told, "other_model": 1}, num_nodes=NUM_CLIENTS)
    assert "CompatibilityError" in left["error"]
    assert "got 0.weight [12, 16] torch.float32 trained and 0.weight [13, 16] torch.float32" in left["error"]
    (left,) = flower.left({**told, "connect_s": 20.0}, num_nodes=NUM_CLIENTS - 2)
    assert "PeerLostError" in left["error"]
    assert re.search(r"nobody is client .*2, 3;", left["error"])

"""Whole jobs between a SuperLink and SuperNodes, real processes on loopback, against `distopt.federated.Simulation`."""

import threading
import time

import pytest
import torch

pytest.importorskip("flwr", reason="Flower has an environment of its own: make test-flower")

from credentials import make_key
from flower_processes import Flower, end_group

from flower_test_app.work import Job

pytestmark = [pytest.mark.job, pytest.mark.timeout(1200)]

# Every message is a new Python process at its node, which takes seconds: so few clients, rounds and jobs.
NUM_CLIENTS = 2
OFTEN = {"participation": "bernoulli", "probability": 0.7}
JOBS = [
    {"algorithm": {"algorithm": "fedau", "cutoff": 3}, "participation": OFTEN, "rounds": 5},
    {"algorithm": {"algorithm": "scaffold"}, "uplink": True, "rounds": 2},
    {"algorithm": {"algorithm": "fedbuff", "buffer_size": NUM_CLIENTS}, "rounds": 1},
]
NAMES = [each["algorithm"]["algorithm"] for each in JOBS]


@pytest.fixture(scope="module")
def flower(tmp_path_factory):
    home = tmp_path_factory.mktemp("flower")
    flower = Flower(home, variables={"FLOWER_TEST_FOLDER": str(home / "kept")})
    yield flower
    flower.close()


@pytest.fixture(scope="module")
def nodes(flower):
    return [flower.supernode(client) for client in range(NUM_CLIENTS)]


@pytest.fixture(scope="module")
def left(flower, nodes):
    return flower.left({"num_clients": NUM_CLIENTS, "jobs": JOBS})


def wait_for(path, deadline_s=1000):
    until = time.monotonic() + deadline_s
    while not path.exists():
        assert time.monotonic() < until, f"{path.name} does not come"
        time.sleep(0.2)


def without_times(rows):
    return [{key: value for key, value in row.items() if key != "time_s"} for row in rows]


@pytest.mark.parametrize("number", range(len(JOBS)), ids=NAMES)
def test_model_and_history_are_the_simulators_to_the_bit(left, number):
    simulation = Job(JOBS[number]).simulated(NUM_CLIENTS)
    assert without_times(left[number]["history"]) == without_times(simulation.history)
    for name, tensor in simulation.model.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(left[number]["arrays"][name], tensor), name
    assert left[number]["refused"] == left[number]["lost"] == {}


@pytest.mark.slow
def test_a_server_that_is_killed_goes_on_from_its_checkpoint(flower, nodes, left, tmp_path):
    job = {"algorithm": {"algorithm": "scaffold"}, "participation": OFTEN, "rounds": 3}
    told = {"num_clients": NUM_CLIENTS, "jobs": [job], "checkpoint": str(tmp_path / "run.pt"), "checkpoint_every": 1}
    flower.run(job={**told, "die_after": 1}, stream=False)
    wait_for(flower.home / "died")
    (again,) = flower.left(told)
    simulation = Job(job).simulated(NUM_CLIENTS)
    assert again["resumed"]
    assert again["history"] == simulation.history.rows
    for name, tensor in simulation.model.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(again["arrays"][name], tensor), name


@pytest.mark.slow
def test_a_node_that_is_killed_while_it_works_and_started_again(flower, nodes, left):
    """Its round ends without it when Flower misses it, and it takes part again as soon as it is there."""
    killed = nodes[1]

    def start_again():
        killed.wait()
        end_group(killed)
        nodes[1] = flower.supernode(1)

    helper = threading.Thread(target=start_again)
    helper.start()
    job = {"algorithm": {"algorithm": "fedau", "cutoff": 50}, "rounds": 7}
    told = {"num_clients": NUM_CLIENTS, "jobs": [job], "faults": {"1": {"1": "kill node"}}}
    (after,) = flower.left(told)
    helper.join()
    took_part = [row["participants"] for row in after["history"]]
    assert took_part[:2] == [[0, 1], [0]]
    assert [0, 1] in took_part[2:]
    assert sum(after["lost"].values()) >= 1
    assert after["refused"] == {}


def test_encrypted_and_with_nodes_that_are_known(tmp_path):
    flower = Flower(tmp_path, secure=True)
    try:
        known, unknown = make_key(tmp_path, "known"), make_key(tmp_path, "unknown")
        status, printed = flower.flwr("supernode", "register", f"{known}.pub", "test")
        assert status == 0, printed
        flower.supernode(0, "--auth-supernode-private-key", str(known))
        refused = flower.supernode(1, "--auth-supernode-private-key", str(unknown))
        job = {"algorithm": {"algorithm": "fedau"}, "rounds": 1}
        (left,) = flower.left({"num_clients": 1, "jobs": [job]})
        assert refused.wait(60) != 0
        assert left["history"] == Job(job).simulated(1).history.rows
    finally:
        flower.close()

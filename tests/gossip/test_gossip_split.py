"""A network that falls into two halves and comes together again: real ranks on hosts of their own."""

import subprocess

import numpy as np
import pytest

from distopt.gossip import Gossip
from netns import NAME, cluster, needs_namespaces
from rank_job import Job

pytestmark = [pytest.mark.job, pytest.mark.timeout(300)]
HALVES = ([0, 1], [2, 3])


def switch(*arguments):
    subprocess.run(["ip", "-n", f"distopt-{NAME}-switch", "link", *arguments], check=True, timeout=20)


@pytest.fixture
def hosts():
    made = cluster("up", 4, "none")
    assert made.returncode == 0, made.stderr
    yield [f"distopt-{NAME}-{host}" for host in range(1, 5)]
    cluster("down")


def models(job, ranks, kind):
    return np.array([job.events(rank, kind)[-1]["model"] for rank in ranks])


@needs_namespaces
def test_halves_that_are_cut_off_from_each_other_go_on_and_become_one_again(hosts, warm_python, tmp_path):
    gossips = {"ring": Gossip(topology="ring", correction="off", peer_timeout=3.0, grace=1.0)}
    environment = {"GLOO_SOCKET_IFNAME": "eth0"}
    with Job(warm_python, tmp_path / "job", 4, gossips, master="10.88.0.1", pause_s=0.05) as job:
        job.start(namespace=hosts, environment=[environment] * 4)
        job.wait_for(range(4), "steps")
        switch("add", "other", "type", "bridge", "stp_state", "0")
        switch("set", "other", "up")
        for port in ("port3", "port4"):
            switch("set", port, "master", "other")
        job.wait(
            lambda: all(
                [event["members"] for event in job.events(rank, "crew")][-1:] == [half]
                for half in HALVES
                for rank in half
            ),
            "two crews",
        )
        job.wait_for_rounds(range(4), 8)  # each half goes on
        for port in ("port3", "port4"):
            switch("set", port, "master", "bridge")
        job.wait(
            lambda: all(job.events(rank, "crew")[-1]["members"] == [0, 1, 2, 3] for rank in range(4)), "one crew again"
        )
        brought = models(job, range(4), "crew")
        job.wait_for_rounds(range(4), 40)
        job.stop()
        for half in HALVES:  # they had agreed, on different models
            np.testing.assert_allclose(brought[half[0]], brought[half[1]], rtol=0, atol=1e-6)
        assert np.abs(brought[0] - brought[2]).max() > 1e-3
        expected = brought.mean(0)[None].repeat(4, 0)
        np.testing.assert_allclose(models(job, range(4), "ended"), expected, rtol=0, atol=1e-9)
        for rank in range(4):
            (ended,) = job.events(rank, "ended")
            assert ended["stats"]["lost"] == ended["stats"]["joined"] == []

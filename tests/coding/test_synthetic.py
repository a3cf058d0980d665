"""Synthetic traces have the distribution that their parameters promise."""

import numpy as np
import pytest

from distopt.coding import Cluster
from distopt.errors import ConfigError

STILL = {"workers": 50, "spread_s": 0.0, "burst_probability": 0.0}


def test_the_same_seed_gives_the_same_trace_and_another_seed_another():
    cluster = Cluster(workers=8)
    assert np.array_equal(cluster.trace(20, 1).seconds, cluster.trace(20, 1).seconds)
    assert not np.array_equal(cluster.trace(20, 1).seconds, cluster.trace(20, 2).seconds)


def test_the_load_shifts_every_time():
    cluster = Cluster(workers=8, seconds_per_load=3.0)
    loaded = cluster.trace(20, 1, load=0.5)
    np.testing.assert_allclose(loaded.seconds, cluster.trace(20, 1).seconds + 1.5)
    np.testing.assert_allclose(loaded.at_load(0.0), cluster.trace(20, 1).seconds)


def test_the_tail_is_heavy():
    """P(X > x) = (1 + x)^-tail, at several x."""
    cluster = Cluster(workers=200, base_s=0.0, spread_s=1.0, tail=1.5, burst_probability=0.0)
    times = cluster.trace(500, 0).seconds
    for x in (0.5, 3.0, 20.0):
        expected = (1 + x) ** -1.5
        assert abs((times > x).mean() - expected) < 5 * np.sqrt(expected / times.size)


def test_bursts_have_the_length_and_the_frequency_of_their_parameters():
    cluster = Cluster(workers=300, base_s=1.0, spread_s=0.0, burst_probability=0.02, burst_rounds=3.0)
    slow = cluster.trace(600, 0).seconds > 1.0
    starts = slow[1:] & ~slow[:-1]
    assert starts.sum() / (~slow[:-1]).sum() == pytest.approx(0.02, rel=0.1)
    assert slow[1:].sum() / starts.sum() == pytest.approx(3.0, rel=0.1)
    assert slow[0].mean() == pytest.approx(slow.mean(), abs=0.05)  # no start-up phase


def test_slow_nodes_are_slow_in_every_round():
    slow = Cluster(**STILL, slow_fraction=0.1, slow_s=2.0).trace(30, 3).seconds > 2.0
    assert slow.all(axis=0).sum() == 5
    assert slow.any(axis=0).sum() == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"workers": 0}, "workers must be an integer of at least 1, got 0"),
        ({"tail": 0}, "tail must be positive, got 0"),
        ({"base_s": -1}, "base_s must be seconds of at least 0, got -1"),
        ({"burst_probability": 1.5}, r"burst_probability must be in \[0, 1\], got 1.5"),
        ({"burst_rounds": 0.5}, "burst_rounds must be at least 1, got 0.5"),
        ({"seconds_per_load": -2}, "seconds_per_load must be a number of at least 0, got -2"),
    ],
)
def test_bad_parameters(given, message):
    with pytest.raises(ConfigError, match=message):
        Cluster(**{"workers": 4, **given})


def test_no_round():
    with pytest.raises(ConfigError, match="rounds must be an integer of at least 1"):
        Cluster(workers=4).trace(0, 0)

import math

import numpy as np
import pytest
from coded_job import train

from distopt.coding import Trace
from distopt.coding.statistics import Statistics
from distopt.errors import CompatibilityError


def played():
    """Two rounds of three workers: worker 1 answers round 0 after 3 s, worker 2 skips it after 5 s."""
    statistics = Statistics(3)
    statistics.begin(0, 100.0)
    statistics.arrived(0, 0, 1.0, 0.8)
    statistics.end(0, 1.0)
    statistics.decoded(2.0)
    statistics.begin(1, 101.0)
    statistics.arrived(1, 0, 1.0, 0.9)
    statistics.arrived(0, 1, 3.0, 2.5)
    statistics.end(1, 3.0)
    statistics.decoded(1.0)
    statistics.arrived(0, 2, 5.0)
    return statistics


def test_who_was_late_and_by_how_much():
    report = played().report({2: "left"})
    in_time, late, skipped = (
        [worker[name] for worker in report["workers"]] for name in ("in_time", "late", "unanswered")
    )
    assert in_time == [2, 0, 0]
    assert late == [0, 1, 0]
    assert skipped == [0, 1, 2]
    assert [worker["late_mean_s"] for worker in report["workers"]] == [0.0, 2.0, 4.0]
    assert report["gone"] == {2: "left"}


def test_what_waiting_would_have_cost_counts_once_per_round():
    report = played().report({})
    assert report["waited_s"] == 4.0
    assert report["saved_s"] == 4.0  # round 0 would have lasted 5 s, not 1 + 2 + 4


def test_amplification_is_the_mean_and_the_largest():
    report = played().report({})
    assert report["amplification_mean"] == 1.5
    assert report["amplification_max"] == 2.0
    assert report["last"]["amplification"] == 1.0


def test_reasons_of_refusals_are_counted_and_bounded():
    statistics = Statistics(2)
    for round in range(1000):
        statistics.refuse(1, f"round {round} is wrong")
        statistics.refuse(1, "garbage") if round < 3 else None
    report = statistics.report({})
    assert report["refused_messages"] == 1003
    assert report["refused"]["garbage"] == 3
    assert sum(report["refused"].values()) == 1003
    assert len(report["refused"]) < 30


def test_a_worker_that_was_busy_has_the_time_when_it_was_next_heard_of():
    statistics = Statistics(2)
    for round, began in enumerate((10.0, 11.0, 12.0)):
        statistics.begin(round, began)
        statistics.arrived(round, 0, 0.5, 0.4)
        statistics.end(round, 0.5)
    statistics.arrived(0, 1, 2.7)  # at 12.7 it says that it skips round 0
    seconds = np.stack([arrivals.seconds for arrivals in statistics.history])
    assert seconds[:, 1] == pytest.approx([2.7, 1.7, 0.7])


def test_report_trace_and_plot_of_a_training(tmp_path):
    ranks = train(5, 6)
    coded, stats = ranks[0].coded, ranks[0].stats
    assert stats["steps"] == stats["rounds"] == 6
    assert stats["load"] == 0.5
    assert stats["last"]["round"] == 5
    assert stats["bytes_received"] > 0
    assert "fractional(n=4, s=1" in ranks[0].report
    assert "Decode amplification" in ranks[0].report
    trace = coded.trace()
    assert trace.seconds.shape == (6, 4)
    assert trace.load == 0.5
    assert math.isfinite(trace.slope)
    trace.save(tmp_path / "trace.csv")
    assert np.allclose(Trace.read(tmp_path / "trace.csv").seconds, trace.seconds, equal_nan=True)
    coded.plot_arrivals(tmp_path / "arrivals.png")
    assert (tmp_path / "arrivals.png").read_bytes().startswith(b"\x89PNG")
    assert ranks[1].report == ""
    assert ranks[1].stats["role"] == "worker"
    with pytest.raises(CompatibilityError, match="known on the master"):
        ranks[1].coded.trace()

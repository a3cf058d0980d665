"""The planner chooses well on traces that it has not seen, and says what to configure."""

import math

import numpy as np
import pytest

from distopt.coding import (
    FAMILIES,
    MSGC,
    SRSGC,
    Cluster,
    SequentialCode,
    Trace,
    Uncoded,
    binary,
    fractional,
    plan,
    simulate,
)
from distopt.coding.planning import TIE
from distopt.errors import ConfigError

WORKERS, PROBE_ROUNDS, HELD_OUT_ROUNDS = 64, 300, 6000


def drawn(seed):
    """A cluster with parameters of its own."""
    rng = np.random.default_rng(seed)
    return Cluster(
        workers=WORKERS,
        seconds_per_load=float(rng.choice([0.5, 3.0, 10.0, 40.0, 150.0, 500.0])),
        tail=float(rng.choice([1.5, 2.0, 3.0])),
        burst_probability=float(rng.choice([0.002, 0.01, 0.05])),
        burst_rounds=float(rng.choice([1.0, 1.5, 3.0])),
        burst_s=float(rng.choice([1.0, 4.0])),
        slow_fraction=float(rng.choice([0.0, 0.0, 0.03])),
        slow_s=1.0,
    )


def all_schemes(n):
    """A grid of the test's own, independent of the planner's: uncoded, GC over s, both sequential codes."""
    counts = sorted({round(2 ** (half / 2)) for half in range(2 * n.bit_length() - 2)} | {n - 1, n})
    yield Uncoded(n)
    for s in range(1, n // 2):
        yield fractional(n, s) if n % (s + 1) == 0 else binary(n, s)
    for burst in (1, 2, 3):
        for count in counts:
            for longer in (1, 2, 3, 5):
                yield MSGC(n=n, burst=burst, window=burst + longer, stragglers=count)
            for times in (1, 2, 3):
                if count < n:
                    yield SRSGC(n=n, burst=burst, window=burst * times + 1, stragglers=count)


def best_seconds(trace):
    """Of the best scheme in hindsight; what is far behind in the first rounds is not asked for all of them."""
    left = list(all_schemes(WORKERS))
    for num_rounds, behind in ((150, 1.1), (1200, 1.04)):
        start = trace.first(num_rounds)
        seconds = [simulate(scheme, start).seconds for scheme in left]
        limit = behind * min(seconds)
        left = [scheme for scheme, found in zip(left, seconds, strict=True) if found <= limit]
    return min(simulate(scheme, trace).seconds for scheme in left)


def regret(seed):
    """How much slower the planner's choice is than the best fixed scheme on a trace it has not seen; its family.

    That trace is long: with a heavy tail, even in 1,200 rounds some scheme of hundreds wins by a few percent of luck.
    """
    cluster = drawn(seed)
    chosen = plan(cluster.trace(PROBE_ROUNDS, 2 * seed))[0]
    held_out = cluster.trace(HELD_OUT_ROUNDS, 2 * seed + 1)
    return simulate(chosen.scheme, held_out).seconds / best_seconds(held_out) - 1, chosen.family


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_choice_is_near_the_best_on_20_held_out_traces():
    """The aim is 2% on each; what 300 rounds of a heavy tail do not show makes it 3% on some (docs/coding.md)."""
    found = [regret(seed) for seed in range(20)]
    slower = sorted(each for each, _ in found)
    assert slower[17] <= 0.02, found
    assert slower[-1] <= 0.05, found
    assert {"uncoded", "gradient-coding", "m-sgc"} <= {family for _, family in found}, found  # no one answer for all


@pytest.fixture(scope="module")
def planned():
    trace = Cluster(workers=16, seconds_per_load=4.0, burst_probability=0.05, burst_rounds=1.0).trace(30, 0)
    return trace, plan(trace, jobs=40)


def test_fastest_first_with_the_best_of_every_family(planned):
    trace, found = planned
    assert {each.family for each in found} == set(FAMILIES)
    seconds = [each.seconds for each in found]
    assert seconds[0] <= (1 + TIE) * min(seconds)  # as fast as the fastest, and simpler
    assert sorted(seconds[5:]) == seconds[5:]
    uncoded = next(each for each in found if each.family == "uncoded")
    assert uncoded.ratio == 1
    assert all(each.ratio == each.seconds / uncoded.seconds for each in found)
    assert found[0].ratio < 1  # these bursts are worth coding for
    for each in found:
        one = simulate(each.scheme, trace, jobs=40).seconds
        assert 0.5 < each.seconds / one < 2  # the mean with the copies is of the same kind


def test_the_order_of_the_workers_does_not_matter():
    """Two that are slow in all rounds, in one group of a code or in two."""
    seconds = np.random.default_rng(0).uniform(1.0, 1.1, (30, 16))
    seconds[:, 6:8] += 3.0
    trace = Trace(seconds=seconds, load=0.0, seconds_per_load=4.0)
    order = np.random.default_rng(1).permutation(16)
    families = ("uncoded", "gradient-coding")
    plans = [plan(each, families=families) for each in (trace, trace.reordered(order))]
    first, second = ([(each.config, each.seconds) for each in found] for found in plans)
    assert first == second


def test_the_same_question_has_the_same_answer(planned):
    trace, found = planned
    again = plan(trace, jobs=40)
    assert [(each.seconds, each.config) for each in again] == [(each.seconds, each.config) for each in found]


def test_the_configuration_names_the_scheme(planned):
    _, found = planned
    for each in found:
        config = dict(each.config)
        assert config.pop("algorithm") == "gradient-coding"
        if isinstance(each.scheme, SequentialCode):
            assert SequentialCode.for_workers(config["scheme"], 16) == each.scheme
            assert "n" not in config["scheme"]
        elif each.family == "uncoded":
            assert config == {"code": "fractional", "stragglers": 0}
        else:
            s = each.scheme.code.tolerance
            assert config == {"code": "binary" if 16 % (s + 1) else "fractional", "stragglers": s}
            assert each.parameters == {"stragglers": s}


def test_cheap_work_and_many_stragglers_want_codes_and_dear_work_without_stragglers_wants_none():
    slow = Cluster(workers=12, seconds_per_load=0.1, burst_probability=0.1, burst_s=10.0)
    assert plan(slow.trace(20, 0))[0].family != "uncoded"
    even = Cluster(workers=12, seconds_per_load=100.0, burst_probability=0.0, spread_s=0.01, tail=5.0)
    assert plan(even.trace(20, 0))[0].family == "uncoded"


def test_the_simplest_of_equals_comes_first():
    """Nobody is ever slow and work costs nothing: all are as fast as each other, and uncoded is the simplest."""
    found = plan(Trace(seconds=np.ones((10, 8)), load=0.125, seconds_per_load=0.0))
    assert found[0].family == "uncoded"


def test_slowness_that_all_workers_share_stays_shared():
    """A copy that broke it up would make each of its rounds slow for somebody, and flatter the codes."""
    rng = np.random.default_rng(0)
    together = np.repeat(rng.random((30, 1)) < 0.2, 8, axis=1) * 5.0 + 1 + 0.01 * rng.random((30, 8))
    trace = Trace(seconds=together, load=0.125, seconds_per_load=1.0)
    uncoded = next(each for each in plan(trace, families=("gradient-coding",)) if each.family == "uncoded")
    assert uncoded.seconds == pytest.approx(simulate(Uncoded(8), trace).seconds)
    apart = trace.shifted(np.arange(8) * 7)
    assert simulate(Uncoded(8), apart).seconds > 1.5 * simulate(Uncoded(8), trace).seconds


def test_only_the_families_that_were_asked_for(planned):
    trace, _ = planned
    found = plan(trace, jobs=20, families=("gradient-coding",))
    assert {each.family for each in found} == {"gradient-coding", "uncoded"}
    assert all(each.scheme.delay == 0 for each in found)
    with pytest.raises(ConfigError, match="families must be some of uncoded, gradient-coding, sr-sgc, m-sgc, got 'gc'"):
        plan(trace, families=("gc",))
    with pytest.raises(ConfigError, match="jobs must be an integer of at least 1"):
        plan(trace, jobs=0)
    with pytest.raises(ConfigError, match="stop must be one of"):
        plan(trace, stop="never")


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_few_workers(workers):
    assert plan(Cluster(workers=workers).trace(10, 0))[-1].seconds > 0


def test_a_dead_worker_leaves_only_schemes_that_do_without_it():
    seconds = np.ones((30, 6))
    seconds[10:, 2] = np.nan
    found = plan(Trace(seconds=seconds, load=1 / 6, seconds_per_load=0.5))
    assert found[0].ratio == 0
    assert found[0].seconds < math.inf
    assert {each.seconds for each in found if each.family in ("uncoded", "m-sgc")} == {math.inf}
    assert math.isnan(next(each.ratio for each in found if each.family == "uncoded"))

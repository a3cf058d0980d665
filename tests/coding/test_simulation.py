"""The fast simulation agrees with the obvious one in every round and for every worker; the obvious one is right."""

import math

import numpy as np
import pytest

from distopt.coding import (
    MSGC,
    SRSGC,
    STOP_RULES,
    Cluster,
    OneRound,
    Scheme,
    Trace,
    Uncoded,
    approximate,
    binary,
    cyclic,
    fractional,
    replay,
    simulate,
)
from distopt.coding.decode_time import DecodeTime
from distopt.coding.heterogeneous import heterogeneous
from distopt.errors import ConfigError

N = 12
SCHEMES = [
    Uncoded(N),
    fractional(N, 3),
    binary(N, 4),
    cyclic(N, 3),
    heterogeneous([1 + worker % 3 for worker in range(N)], 2),
    SRSGC(n=N, burst=1, window=3, stragglers=5),
    SRSGC(n=N, burst=2, window=5, stragglers=7),
    SRSGC(n=N, burst=2, window=5, stragglers=7, code="cyclic"),
    MSGC(n=N, burst=1, window=2, stragglers=3),
    MSGC(n=N, burst=2, window=4, stragglers=4),
    MSGC(n=N, burst=3, window=4, stragglers=5, code="cyclic"),
    MSGC(n=N, burst=2, window=3, stragglers=N),
    MSGC(n=N, burst=2, window=3, stragglers=N - 1),
    MSGC(n=N, burst=2, window=3, stragglers=0),
]


def traces():
    for seed, slope in enumerate((0.0, 2.2, 20.0)):
        cluster = Cluster(
            workers=N,
            burst_probability=0.1,
            burst_rounds=1 + seed,
            slow_fraction=0.1,
            slow_s=seed,
            seconds_per_load=slope,
        )
        yield cluster.trace(20, seed, load=0.05 * seed)
    rng = np.random.default_rng(9)
    seconds = np.round(rng.exponential(size=(30, N)), 1)  # many answers at the same moment
    yield Trace(seconds=seconds, load=0.2, seconds_per_load=1.0)
    seconds[rng.random(seconds.shape) < 0.01] = np.nan
    yield Trace(seconds=seconds, load=0.2, seconds_per_load=1.0)


@pytest.mark.parametrize("stop", STOP_RULES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_fast_is_obvious(scheme, stop):
    for trace in traces():
        fast, obvious = (each(scheme, trace, jobs=25, stop=stop, mu=0.5) for each in (simulate, replay))
        np.testing.assert_allclose(fast.per_round, obvious.per_round, rtol=1e-12)
        assert np.array_equal(fast.straggled, obvious.straggled)
        assert (fast.seconds, fast.repeated) == (pytest.approx(obvious.seconds), obvious.repeated)


@pytest.mark.parametrize("code", [fractional(12, 3), binary(12, 4), binary(11, 3), cyclic(9, 2), approximate(12, 3)])
def test_the_moment_a_code_decodes(code):
    """Against asking the code after each arrival."""
    rng = np.random.default_rng(0)
    decode_time = DecodeTime(code)
    for _ in range(150):
        times = rng.permutation(code.num_workers).astype(float)
        times[rng.random(len(times)) < 0.2] = math.inf
        times[rng.random(len(times)) < 0.2] = -math.inf
        moments = [-math.inf, *sorted(times[np.isfinite(times)]), math.inf]
        reached = [
            each for each in moments if each < math.inf and code.decodable(np.flatnonzero(times <= each).tolist())
        ]
        expected = reached[0] if reached else math.inf
        assert decode_time.at(times) == expected
        assert decode_time.at(times, 3.5) == max(expected, 3.5)


def test_a_small_example_by_hand():
    seconds = [[1.0, 4.0, 2.0, 3.0], [1.0, 1.0, 1.0, 9.0]]
    trace = Trace(seconds=seconds, load=0.25, seconds_per_load=4.0)
    assert simulate(Uncoded(4), trace).per_round.tolist() == [4.0, 9.0]
    coded = simulate(fractional(4, 1), trace)  # load 1/2: one second more; groups {0, 1} and {2, 3}
    assert coded.per_round.tolist() == [3.0, 2.0]
    assert coded.straggled.T.tolist() == [[False, True, False, True], [False, False, False, True]]
    assert coded.stragglers.tolist() == [2, 1]
    assert coded.seconds_per_job == 2.5
    paper = simulate(fractional(4, 1), trace, stop="paper", mu=0.6)  # 3.2 s: two are missing, one is allowed: wait
    assert paper.per_round.tolist() == [5.0, 3.2]
    minimal = simulate(fractional(4, 1), trace, stop="minimal", mu=0.6)
    assert minimal.per_round.tolist() == [4.0, 3.2]
    assert simulate(OneRound(fractional(4, 1)), trace, seconds_per_load=0.0).per_round.tolist() == [2.0, 1.0]


def test_a_trace_that_is_too_short_starts_again():
    trace = Trace(seconds=[[1.0], [2.0], [4.0]], load=1.0, seconds_per_load=0.0)
    found = simulate(Uncoded(1), trace, jobs=7)
    assert found.per_round.tolist() == [1, 2, 4, 1, 2, 4, 1]
    assert found.repeated == 2
    assert simulate(Uncoded(1), trace).repeated == 0


def test_a_round_that_would_never_end_takes_for_ever():
    trace = Trace(seconds=[[1.0, 1.0], [1.0, np.nan], [1.0, 1.0]], load=0.5, seconds_per_load=1.0)
    found = simulate(Uncoded(2), trace)
    assert found.per_round.tolist() == [1.0, math.inf, math.inf]
    assert found.seconds == math.inf
    assert found.straggled[:, 1].tolist() == [False, True]
    assert simulate(fractional(2, 1), trace).seconds < math.inf


def test_as_soon_as_decodable_is_never_slower_than_the_paper_for_a_gradient_code():
    for trace in traces():
        fast, minimal, paper = (simulate(binary(N, 2), trace, stop=stop).per_round for stop in STOP_RULES)
        assert (fast <= minimal).all()
        assert (minimal <= paper).all()


def test_the_direction_of_the_published_table_and_where_it_turns_round():
    """Under the paper's stop rule with bursts of one round; dear work favours little load, cheap work plain codes."""

    def seconds(slope):
        trace = Cluster(workers=256, seconds_per_load=slope, burst_rounds=1.0).trace(80, 2)
        schemes = {
            "uncoded": Uncoded(256),
            "gc": fractional(256, 3),
            "sr-sgc": SRSGC(n=256, burst=1, window=3, stragglers=6),
            "m-sgc": MSGC(n=256, burst=1, window=2, stragglers=256),
            "gc s=7": fractional(256, 7),
        }
        return {name: simulate(scheme, trace, stop="paper").seconds for name, scheme in schemes.items()}

    dear = seconds(150.0)
    assert dear["m-sgc"] < dear["sr-sgc"] < dear["gc"] < dear["uncoded"]
    cheap = seconds(1.0)
    assert cheap["gc s=7"] < cheap["m-sgc"] < cheap["uncoded"]
    dearest = seconds(1000.0)
    assert dearest["m-sgc"] < dearest["uncoded"] < dearest["gc"]


class Alternating(Scheme):
    """A scheme of a user: all wait for everybody."""

    name, num_workers, load = "alternating", N, 1 / N
    chunks = np.full(N, 1 / N)

    def begin(self, num_jobs):
        return Uncoded(N).begin(num_jobs)

    def to_dict(self):
        return {}


def test_a_scheme_of_ones_own_is_replayed():
    trace = next(traces())
    assert simulate(Alternating(), trace).per_round.tolist() == simulate(Uncoded(N), trace).per_round.tolist()


def test_many_workers_and_many_jobs():
    """n = 1,024: every scheme of the planner's kinds ends, and every job is decoded."""
    trace = Cluster(workers=1024).trace(40, 0)
    for scheme in (SRSGC(n=1024, burst=1, window=3, stragglers=60), MSGC(n=1024, burst=2, window=4, stragglers=60)):
        found = simulate(scheme, trace, jobs=100)
        assert math.isfinite(found.seconds)
        assert found.straggled.shape == (1024, 100 + scheme.delay)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda trace: simulate(Uncoded(3), trace), "the scheme must be for the trace's 2 workers, got one for 3"),
        (lambda trace: simulate(Uncoded(2), trace, jobs=0), "jobs must be an integer of at least 1, got 0"),
        (lambda trace: simulate(Uncoded(2), trace, stop="now"), "stop must be one of"),
        (lambda trace: simulate(Uncoded(2), trace, stop="paper", mu=-1), "mu must be a number of at least 0"),
        (lambda trace: simulate(Uncoded(2), trace, seconds_per_load=-1.0), "seconds_per_load must be a number of at"),
        (lambda trace: replay(Uncoded(3), trace), "the scheme must be for the trace's 2 workers"),
    ],
)
def test_bad_questions(call, message):
    with pytest.raises(ConfigError, match=message):
        call(Trace(seconds=[[1.0, 2.0]], load=0.5, seconds_per_load=1.0))

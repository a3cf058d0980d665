"""SR-SGC and M-SGC: what they cost, that they decode whatever their straggler models allow, and fail one step outside.

The laws run with the cyclic inner code, which decodes no set of fewer than n - s: a 0/1 code also decodes some by luck.
"""

import numpy as np
import pytest

import distopt.coding
from distopt.coding import MSGC, SRSGC, Arbitrary, Bursty, OneRound, Scheme, SequentialCode, Uncoded, binary, fractional
from distopt.errors import ConfigError, DecodeError

SR_SETS = [(8, 1, 2, 3), (8, 1, 3, 4), (10, 2, 3, 4), (9, 2, 5, 6), (12, 3, 4, 5), (10, 1, 2, 9)]
M_SETS = [(8, 1, 2, 3), (8, 1, 3, 2), (10, 2, 3, 4), (9, 2, 4, 8), (12, 3, 4, 5), (6, 1, 2, 6), (10, 2, 5, 3)]
PATTERNS = 200


def made(kind, parameters, **others):
    n, burst, window, stragglers = parameters
    return kind(n=n, burst=burst, window=window, stragglers=stragglers, **others)


SCHEMES = [made(SRSGC, each, code="cyclic") for each in SR_SETS] + [made(MSGC, each, code="cyclic") for each in M_SETS]
LIVE = [Uncoded(6), OneRound(fractional(6, 2)), OneRound(binary(7, 2)), *SCHEMES]
LIVE += [made(SRSGC, (9, 2, 5, 6)), made(MSGC, (9, 2, 4, 5)), made(MSGC, (6, 2, 3, 6))]


def play(scheme, pattern, jobs):
    """All rounds with the stragglers of the pattern, up to the first job that fails; what was true at their ends."""
    run = scheme.begin(jobs)
    decoded, conforming, may_end = [], [], []
    for round in range(run.num_rounds):
        run.tasks(round)
        for worker in np.flatnonzero(~pattern[:, round]).tolist():
            run.record(round, worker)
        conforming.append(run.conforms(round))
        may_end.append(run.may_end(round))
        if round >= scheme.delay:
            decoded.append(run.decodable(round - scheme.delay))
            if not decoded[-1]:
                break
    assert len(decoded) == jobs or not decoded[-1]
    return decoded, conforming, may_end


def jobs_for(scheme):
    return scheme.window + 2 * scheme.burst + 4


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_every_conforming_pattern_decodes_every_job_in_time(scheme):
    rng = np.random.default_rng(0)
    jobs = jobs_for(scheme)
    for each in range(PATTERNS):
        pattern = scheme.models[each % 2].generate(scheme.n, jobs + scheme.delay, rng)
        decoded, conforming, may_end = play(scheme, pattern, jobs)
        assert all(decoded), pattern.astype(int)
        assert all(conforming)
        assert all(may_end)  # the looser rule is looser


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_one_step_outside_the_model_most_patterns_fail(scheme):
    """The negative control: a burst of B + 1 rounds, and for M-SGC lambda + 2 stragglers."""
    jobs = jobs_for(scheme)
    outside = [Bursty(scheme.burst + 1, scheme.window, scheme.stragglers)]
    if isinstance(scheme, MSGC) and scheme.stragglers + 2 <= scheme.n:
        outside.append(Arbitrary(scheme.burst, scheme.window + scheme.burst - 1, scheme.stragglers + 2))
    for model in outside:
        rng = np.random.default_rng(0)
        failed = 0
        for _ in range(PATTERNS):
            decoded, conforming, _ = play(scheme, model.generate(scheme.n, jobs + scheme.delay, rng), jobs)
            failed += not all(decoded)
            assert all(decoded) or not all(conforming)
        assert failed > 0.8 * PATTERNS, (model, failed)


@pytest.mark.parametrize("scheme", [SCHEMES[3], SCHEMES[8]], ids=repr)
def test_a_pattern_must_keep_to_one_model(scheme):
    """A round of one model after a round of the other may fail, and then `conforms` has said so before."""
    rng = np.random.default_rng(0)
    jobs, failed = 20, 0
    for _ in range(60):
        pattern = np.zeros((scheme.n, jobs + scheme.delay), dtype=bool)
        for round in range(pattern.shape[1]):
            before = pattern[:, :round]
            alone = scheme.models[rng.integers(2)].limits(before)
            new = rng.permutation(np.flatnonzero(~alone.recent))[: max(0, alone.distinct - alone.recent.sum())]
            stragglers = alone.recent & ~alone.barred & (rng.random(scheme.n) < 0.9)
            stragglers[new] = True
            if any(model.allows(before, stragglers) for model in scheme.models):
                pattern[:, round] = stragglers
        decoded, conforming, _ = play(scheme, pattern, jobs)
        failed += not all(decoded)
        assert all(decoded) or not all(conforming)
    assert failed > 0


@pytest.mark.parametrize("scheme", LIVE, ids=repr)
def test_whatever_ends_when_it_may_end_decodes_if_all_answer_from_then_on(scheme):
    """`may_end` is feasibility: rounds are cut as early as it allows for a while, then nobody straggles."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        jobs = 14
        run = scheme.begin(jobs)
        cut = rng.integers(1, jobs)
        for round in range(run.num_rounds):
            run.tasks(round)
            for worker in rng.permutation(scheme.num_workers).tolist():
                if round < cut and run.may_end(round):
                    break
                run.record(round, worker)
            assert run.may_end(round)
            if round >= scheme.delay:
                assert run.decodable(round - scheme.delay)


def total(scheme, run, decoded, answers, gradients, job):
    """The decoded gradient, from vectors that the workers computed as their tasks say."""
    size = gradients.shape[-1]
    result = np.zeros(size)
    for round, worker, task, coefficient in decoded:
        given = answers[round][worker][task]
        assert given.job == job
        result += coefficient * sum(value * gradients[job, chunk] for chunk, value in given.row)
    return result


@pytest.mark.parametrize("late", [False, True], ids=["in time", "some late"])
@pytest.mark.parametrize("scheme", LIVE, ids=repr)
def test_the_decoded_gradient_is_the_sum_over_all_chunks(scheme: Scheme, late):
    rng = np.random.default_rng(1)
    jobs = 9
    gradients = rng.standard_normal((jobs, len(scheme.chunks), 3))
    run = scheme.begin(jobs)
    models = getattr(scheme, "models", None)
    pattern = (
        models[0].generate(scheme.num_workers, run.num_rounds, rng)
        if models
        else np.zeros((scheme.num_workers, run.num_rounds), dtype=bool)
    )
    if isinstance(scheme, OneRound):
        pattern[: scheme.code.tolerance] = True
    answers = []
    for round in range(run.num_rounds):
        answers.append(run.tasks(round))
        for worker in np.flatnonzero(pattern[:, round - 1] if late and round else []).tolist():
            if rng.random() < 0.5:
                run.record(round - 1, worker)
        for worker in np.flatnonzero(~pattern[:, round]).tolist():
            run.record(round, worker)
        job = round - scheme.delay
        if job >= 0:
            decoded = run.decode(job)
            found = total(scheme, run, decoded, answers, gradients, job)
            np.testing.assert_allclose(found, gradients[job].sum(axis=0), rtol=0, atol=1e-9)
            assert not any(pattern[part.worker, part.round] for part in decoded) or late
            for earlier in range(max(0, round - scheme.delay), round):  # late answers change nothing now
                for worker in np.flatnonzero(pattern[:, earlier]).tolist() if late else []:
                    run.record(earlier, worker)
            assert run.decode(job) == decoded


@pytest.mark.parametrize("scheme", LIVE, ids=repr)
def test_chunks_are_the_whole_data_and_no_worker_has_more_than_it_should(scheme: Scheme):
    assert scheme.chunks.sum() == pytest.approx(1, abs=1e-12)
    assert (scheme.chunks > 0).all()
    run = scheme.begin(3 * (scheme.delay + 1))
    for round in range(run.num_rounds):
        loads = [sum(scheme.chunks[chunk] for task in own for chunk, _ in task.row) for own in run.tasks(round)]
        for worker in range(scheme.num_workers):
            run.record(round, worker)
        if round == scheme.delay and not isinstance(scheme, OneRound):  # all slots are in use
            without_repeats = scheme.load
            if isinstance(scheme, MSGC) and not scheme.coded:
                without_repeats = (scheme.window - 1) * scheme.chunks[0]
            assert np.mean(loads) == pytest.approx(without_repeats, abs=1e-12)


def test_the_loads_of_the_sheet():
    scheme = MSGC(n=256, burst=1, window=2, stragglers=27)
    assert scheme.load == 2 * 28 / (256 * 29)
    assert round(scheme.load, 5) == 0.00754
    assert scheme.delay == 1
    assert OneRound(fractional(256, 15)).load == 0.0625
    assert Uncoded(256).load == 1 / 256
    scheme = SRSGC(n=256, burst=2, window=3, stragglers=23)
    assert (scheme.inner_stragglers, scheme.load, scheme.delay) == (12, 13 / 256, 2)


@pytest.mark.parametrize("n", [4, 9])
@pytest.mark.parametrize(("burst", "window"), [(1, 2), (1, 4), (2, 3), (3, 5)])
def test_the_load_of_m_sgc_meets_the_lower_bound_at_the_two_ends_only(n, burst, window):
    def bound(stragglers):
        return (window - 1 + burst) / (n * (window - 1) + burst * (n - stragglers))

    loads = {count: MSGC(n=n, burst=burst, window=window, stragglers=count).load for count in range(n + 1)}
    assert loads[n] == pytest.approx(bound(n), rel=1e-12)
    assert loads[n - 1] == pytest.approx(bound(n - 1), rel=1e-12)
    assert loads[0] == pytest.approx(1 / n, rel=1e-12)
    assert all(loads[count] > bound(count) * (1 + 1e-9) for count in range(1, n - 1))


def test_a_due_job_that_lacks_answers_names_them():
    run = made(SRSGC, (4, 1, 2, 2)).begin(3)
    run.tasks(0)
    run.record(0, 2)
    run.tasks(1)
    with pytest.raises(DecodeError, match=r"job 0 cannot be decoded .* workers 0, 1, 3 are missing") as caught:
        run.decode(0)
    assert caught.value.missing == (0, 1, 3)
    assert not run.may_end(1)
    run.tasks(2)
    assert not run.decodable(0)
    with pytest.raises(ConfigError, match=r"job must be one of 1\.\.2, which round 2 works on, got 0"):
        run.decode(0)


def test_m_sgc_cannot_do_without_a_worker_for_good():
    run = made(MSGC, (4, 1, 2, 3)).begin(2)
    for round in range(2):
        run.tasks(round)
        for worker in (0, 1, 3):
            run.record(round, worker)
    assert not run.may_end(1)
    with pytest.raises(DecodeError, match="the answers of worker 2 are missing"):
        run.decode(0)


def test_repeats_stop_when_the_late_answer_is_there_before_the_round():
    run = made(SRSGC, (4, 1, 2, 2)).begin(3)  # s = 1
    run.tasks(0)
    run.record(0, 0)
    run.record(0, 3)
    assert [task.job for own in run.tasks(1) for task in own] == [1, 1, 1, 1]  # 0 and 3: a complete class
    run = made(SRSGC, (4, 1, 2, 2)).begin(3)
    run.tasks(0)
    run.record(0, 0)
    assert run.missing(0) == [1, 2, 3]
    assert [task.job for own in run.tasks(1) for task in own] == [1, 0, 0, 1]
    run.record(0, 2)
    assert run.decodable(0) == SRSGC(n=4, burst=1, window=2, stragglers=2).inner.decodable([0, 2])


def test_the_last_rounds_ask_for_nothing_that_is_not_needed():
    run = made(SRSGC, (4, 1, 2, 2)).begin(1)
    run.tasks(0)
    for worker in range(3):
        run.record(0, worker)
    assert run.tasks(1) == [[], [], [], []]
    assert run.missing(1) == []
    assert run.may_end(1)
    assert run.conforms(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: run.tasks(1), "round must be 0, the next one of 4, got 1"),
        (lambda run: run.record(0, 0), r"round must be in 0\.\.-1, the rounds so far, got 0"),
        (lambda run: run.decodable(3), r"job must be in 0\.\.2, got 3"),
        (lambda run: (run.tasks(0), run.record(0, 4)), r"worker must be in 0\.\.3, got 4"),
        (lambda run: (run.tasks(0), run.tasks(0)), "round must be 1, the next one"),
        (lambda run: (run.tasks(0), run.conforms(1)), "round must be the current one, 0, got 1"),
        (lambda run: run.missing(0), "round must be one of the last 2 rounds"),
    ],
)
def test_wrong_bookkeeping_is_an_error(call, message):
    with pytest.raises(ConfigError, match=message):
        call(made(SRSGC, (4, 1, 2, 2)).begin(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SRSGC(n=8, burst=2, window=4, stragglers=3), "burst must divide window - 1 .* use window 5"),
        (lambda: SRSGC(n=4, burst=1, window=2, stragglers=8), "stragglers must be at most the 4 workers, got 8"),
        (lambda: SRSGC(n=1, burst=1, window=2, stragglers=1), "stragglers must leave somebody who answers"),
        (lambda: MSGC(n=8, burst=2, window=2, stragglers=3), "burst must be less than window .* use window 3"),
        (lambda: MSGC(n=8, burst=0, window=2, stragglers=3), "burst must be an integer of at least 1, got 0"),
        (lambda: MSGC(n=8, burst=1, window=2, stragglers=-1), "stragglers must be an integer of at least 0"),
        (lambda: MSGC(n=0, burst=1, window=2, stragglers=0), "n must be an integer of at least 1, got 0"),
        (lambda: MSGC(n=8, burst=1, window=2, stragglers=3, code="mds"), "code must be one of 'binary', 'fractional'"),
        (lambda: MSGC(n=8, burst=1, window=2, stragglers=2, code="fractional"), r"s \+ 1 must divide n = 8"),
        (lambda: MSGC(n=8, burst=1, window=2, stragglers=3).begin(0), "num_jobs must be an integer of at least 1"),
    ],
)
def test_bad_parameters_say_what_to_use(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_the_configuration_is_the_scheme(scheme):
    plain = scheme.to_dict()
    assert plain["scheme"] == scheme.name
    assert SequentialCode.from_dict(plain) == scheme
    n = plain.pop("n")
    assert SequentialCode.for_workers(plain, n) == scheme
    with pytest.raises(ConfigError, match="n must be the job's 3 workers"):
        SequentialCode.for_workers({**plain, "n": n}, 3)


def test_every_public_name_is_there():
    assert all(hasattr(distopt.coding, name) for name in distopt.coding.__all__)

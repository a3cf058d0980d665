"""Advice: the share it promises follows from its equation, nothing nearer reaches it, a faster link asks no more."""

import itertools

import pytest

from distopt.comm import Link
from distopt.errors import ConfigError
from distopt.local import DiLoCo, SparseLoCo
from distopt.local.advice import MOST_INNER_STEPS, choose, contribution_bytes, every_step, plan
from distopt.local.fragment import Fragment

MBIT = 1e6 / 8
ALGORITHMS = (SparseLoCo(), SparseLoCo(fragments=4, values="fp16"), DiLoCo(), DiLoCo(fragments=3))
RATES = (0.1, 1, 5, 20, 100, 1000, 10_000)


def advised(algorithm, mbit, *, step_seconds=0.05, num_ranks=4, parameters=1_000_000, **options):
    link = Link(latency_s=1e-3, bandwidth=mbit * MBIT)
    return plan(
        algorithm, link, num_ranks=num_ranks, parameters=parameters, step_seconds=step_seconds, **options
    )  # fmt: skip


def seconds_of_a_round(found, fragments, step_seconds, work_seconds=0.0):
    waited = max(0.0, found.exchange_s / fragments - found.overlap * step_seconds)
    return found.inner_steps * step_seconds + work_seconds + fragments * waited


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=repr)
@pytest.mark.parametrize("work_seconds", [0.0, 0.02])
def test_the_share_is_reached_and_nothing_nearer_reaches_it(algorithm, work_seconds):
    for mbit, share in itertools.product(RATES, (0.5, 0.95, 0.99)):
        found = advised(algorithm, mbit, share=share, work_seconds=work_seconds)
        took = seconds_of_a_round(found, algorithm.fragments, 0.05, work_seconds)
        assert found.compute_share == pytest.approx(found.inner_steps * 0.05 / took)
        assert found.step_s == pytest.approx(took / found.inner_steps)
        assert found.reaches == (found.compute_share >= share)
        if not found.reaches:
            assert found.inner_steps == MOST_INNER_STEPS
            continue
        assert (found.algorithm.inner_steps, found.algorithm.overlap) == (found.inner_steps, found.overlap)
        # by trial, with every overlap: nothing with a smaller sum is both possible and enough
        part = found.exchange_s / algorithm.fragments / 0.05
        for overlap in range(found.steps_apart // 2 + 1):
            inner_steps = found.steps_apart - 1 - overlap
            possible = max(overlap + 1, algorithm.fragments) <= inner_steps <= MOST_INNER_STEPS
            if overlap:
                possible = possible and inner_steps >= algorithm.fragments * part
            if possible:
                waited = work_seconds / 0.05 + algorithm.fragments * max(0.0, part - overlap)
                assert inner_steps / (inner_steps + waited) < share


def test_a_share_that_rounding_misses_takes_one_step_more():
    """343 steps of 0.05 s to 0.35 s of work are 98%, and in floating point a little less."""
    assert 343 * 0.05 / (343 * 0.05 + 0.35) < 0.98
    link = Link(latency_s=1e-12, bandwidth=1e18)
    found = plan(SparseLoCo(), link, num_ranks=2, parameters=1, step_seconds=0.05, share=0.98, work_seconds=0.35)
    assert (found.inner_steps, found.overlap, found.reaches) == (344, 0, True)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=repr)
def test_a_faster_link_or_a_slower_step_never_asks_for_more(algorithm):
    for found in (
        [advised(algorithm, mbit) for mbit in RATES],
        [advised(algorithm, 20, step_seconds=seconds) for seconds in (0.001, 0.01, 0.1, 1.0, 10.0)],
        [advised(algorithm, 20, num_ranks=ranks) for ranks in (64, 16, 4, 2)],
        [advised(algorithm, 20, parameters=count) for count in (10**8, 10**7, 10**6, 10**5)],
        [advised(algorithm, 20, share=share) for share in (0.99, 0.95, 0.9, 0.5)],
    ):
        apart = [each.steps_apart for each in found]
        assert apart == sorted(apart, reverse=True)
        assert apart[0] > apart[-1]
        reaches = [each.reaches for each in found]
        assert reaches == sorted(reaches)


def test_bytes_are_those_of_a_fragment():
    import torch

    for algorithm in (SparseLoCo(), SparseLoCo(k=256, values="int8", indices="block16"), DiLoCo()):
        real = Fragment(algorithm, [256 * 4096], torch.zeros(256 * 4096)).nbytes
        assert contribution_bytes(algorithm, 256 * 4096) == pytest.approx(real, abs=4)
    # 200 times fewer bytes per exchange than the whole model (arXiv:2508.15706's setting)
    assert contribution_bytes(DiLoCo(), 10**6) > 200 * contribution_bytes(SparseLoCo(), 10**6)


def test_the_choice_changes_the_training_least():
    def gradients(name, exchange_s):
        return every_step(name, exchange_s=exchange_s, link_bytes=1, step_seconds=1.0)

    slow, fast = advised(DiLoCo(), 20), advised(SparseLoCo(), 20)
    assert slow.steps_apart > fast.steps_apart
    assert choose([gradients("dense", 9.0), gradients("dgc", 0.01), slow, fast]).name == "dgc"
    assert choose([gradients("dense", 0.01), gradients("dgc", 0.01), slow, fast]).name == "dense"
    assert choose([gradients("dense", 9.0), gradients("dgc", 0.1), slow, fast]) is fast
    hopeless = [advised(algorithm, 1e-4) for algorithm in (DiLoCo(), SparseLoCo())]
    assert not any(each.reaches for each in hopeless)
    assert choose(hopeless) is hopeless[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.0}, r"share must be a number in \(0, 1\), got 1.0; use 0.95"),
        ({"share": True}, r"share must be a number in \(0, 1\), got True"),
        ({"step_seconds": 0}, "step_seconds must be positive seconds, got 0; use what a step takes without"),
        ({"num_ranks": 1}, "num_ranks must be .*, got 1; use the number of hosts"),
        ({"parameters": 0}, "parameters must be .*, got 0; use the number of parameters"),
    ],
)
def test_a_bad_question_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        advised(SparseLoCo(), 20, **options)
    if not options.keys() & {"num_ranks", "parameters"}:
        with pytest.raises(ConfigError, match=message):
            every_step("dgc", **{"exchange_s": 1, "link_bytes": 1, "step_seconds": 1.0, **options})
    with pytest.raises(ConfigError, match="one or more, got none"):
        choose([])

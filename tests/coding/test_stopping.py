"""The stop rules, on a run whose answers are given; and that live use may ask them at any moment."""

import math

import pytest

from distopt.coding import SRSGC, Decodable, Minimal, OneRound, Paper, fractional, stop_rule
from distopt.errors import ConfigError


class Given:
    """A run that conforms and may end from certain numbers of answers on."""

    def __init__(self, conforms_from, may_end_from, num_workers=5):
        self.here = 0
        self._conforms_from, self._may_end_from, self._num_workers = conforms_from, may_end_from, num_workers

    def missing(self, round):
        return list(range(self.here, self._num_workers))

    def conforms(self, round):
        return self.here >= self._conforms_from

    def may_end(self, round):
        return self.here >= self._may_end_from


def end_of(rule, run, times, round=0):
    """When the round ends, if the rule is asked after each answer and when it wants to be."""
    first = min(times)
    check = rule.next_check_s(first)
    for moment in sorted({*times, *([check] if check is not None else [])}):
        run.here = sum(time <= moment for time in times)
        if rule.ends(run, round, moment, first):
            return moment
    return math.inf


TIMES = [1.0, 1.5, 3.0, 5.0, 9.0]


@pytest.mark.parametrize(
    ("rule", "conforms_from", "expected"),
    [
        (Decodable(), 0, 3.0),
        (Paper(), 0, 2.0),  # not before (1 + mu) times the first
        (Paper(), 2, 2.0),
        (Paper(), 3, 9.0),  # one answer too few: for everybody
        (Paper(), 4, 9.0),
        (Paper(mu=3), 3, 4.0),
        (Minimal(), 0, 2.0),
        (Minimal(), 2, 2.0),
        (Minimal(), 3, 3.0),  # only until it conforms again
        (Minimal(), 4, 5.0),
        (Minimal(mu=0), 1, 1.0),
        (Paper(mu=0), 1, 1.0),
        (Paper(mu=20), 0, 9.0),  # never longer than everybody
        (Minimal(mu=20), 0, 9.0),
    ],
)
def test_when_the_round_ends(rule, conforms_from, expected):
    assert end_of(rule, Given(conforms_from, 3), TIMES) == expected


def test_who_judged_one_round_judges_the_next_anew():
    rule = Paper()
    assert end_of(rule, Given(3, 3), TIMES, round=0) == 9.0
    assert end_of(rule, Given(2, 3), TIMES, round=1) == 2.0


def test_no_rule_ends_before_the_first_answer():
    run = Given(0, 0)
    for rule in (Decodable(), Minimal(mu=0), Paper(mu=0)):
        assert rule.next_check_s(math.inf) is None
        assert not rule.ends(run, 0, 100.0, math.inf)


def test_on_a_real_run():
    run = OneRound(fractional(4, 1)).begin(2)
    run.tasks(0)
    rule = stop_rule("decodable")
    for worker, expected in ((0, False), (2, False), (1, True)):  # one of each group {0, 1}, {2, 3} is enough
        ended = rule.ends(run, 0, 1.0 + worker, 1.0)
        assert not ended
        run.record(0, worker)
        if worker == 2:
            assert rule.ends(run, 0, 3.0, 1.0)
            break
        assert expected is False
    run = SRSGC(n=4, burst=1, window=2, stragglers=2).begin(2)
    run.tasks(0)
    run.record(0, 0)
    assert not stop_rule("minimal").ends(run, 0, 5.0, 1.0)  # three missing, two allowed
    run.record(0, 1)
    assert stop_rule("minimal").ends(run, 0, 5.0, 1.0)


def test_bad_rules():
    with pytest.raises(ConfigError, match="stop must be one of 'decodable', 'minimal', 'paper', got 'never'"):
        stop_rule("never")
    for mu in (-1, math.nan, math.inf, "1", True):
        with pytest.raises(ConfigError, match="mu must be a number of at least 0"):
            stop_rule("paper", mu=mu)

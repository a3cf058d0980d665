"""When fragments are sent and taken in."""

import dataclasses
import itertools
from collections import Counter

import pytest

from distopt.local import DiLoCo, rounds

RHYTHMS = [
    DiLoCo(inner_steps=1),
    DiLoCo(inner_steps=5),
    DiLoCo(inner_steps=7, overlap=6),
    DiLoCo(inner_steps=6, fragments=4, overlap=2),
    DiLoCo(inner_steps=8, warmup_rounds=5, fragments=3, overlap=5),
    DiLoCo(inner_steps=1, warmup_rounds=4),
]
END = 100


@pytest.mark.parametrize("rhythm", RHYTHMS, ids=repr)
def test_every_fragment_is_sent_once_in_each_round_and_taken_in_before_it_is_sent_again(rhythm):
    sent = [each for step in range(END) for each in rounds.sent_after(rhythm, step)]
    taken = [each for step in range(END) for each in rounds.taken_after(rhythm, step)]
    complete = rounds.round_of(rhythm, END - 1)
    assert Counter((e.round, e.fragment) for e in sent if e.round < complete) == {
        (round, fragment): 1 for round in range(complete) for fragment in range(rhythm.fragments)
    }
    assert set(taken) == {each for each in sent if each.taken < END}
    assert len(taken) == len(set(taken))
    for fragment in range(rhythm.fragments):
        own = [each for each in sent if each.fragment == fragment]
        for before, after in itertools.pairwise(own):
            assert before.sent <= before.taken <= after.sent
    for each in sent:
        assert rounds.first_step_of(rhythm, each.round) < each.sent <= rounds.first_step_of(rhythm, each.round + 1)
        assert each.taken == each.sent + rhythm.overlap or each.round < rhythm.warmup_rounds


@pytest.mark.parametrize("rhythm", RHYTHMS, ids=repr)
def test_what_is_under_way_is_what_was_sent_and_not_yet_taken_in(rhythm):
    waiting = set()
    for step in range(END):
        waiting -= set(rounds.taken_after(rhythm, step))
        waiting |= {each for each in rounds.sent_after(rhythm, step) if each.taken > step}
        assert set(rounds.under_way(rhythm, step)) == waiting


def test_rounds_grow_in_a_warm_up():
    rhythm = DiLoCo(inner_steps=9, warmup_rounds=4)
    lengths = [rhythm.inner_steps_of(round) for round in range(7)]
    assert lengths == [1, 3, 5, 7, 9, 9, 9]
    assert [rounds.first_step_of(rhythm, round) for round in range(7)] == [sum(lengths[:r]) for r in range(7)]
    assert [rounds.round_of(rhythm, step) for step in range(17)] == [0, *[1] * 3, *[2] * 5, *[3] * 7, 4]
    assert dataclasses.replace(rhythm, warmup_rounds=0).inner_steps_of(0) == 9


def test_fragments_are_sent_in_turn():
    rhythm = DiLoCo(inner_steps=10, fragments=4, overlap=3)
    assert [(e.fragment, e.sent, e.taken) for s in range(11) for e in rounds.sent_after(rhythm, s)] == [
        (0, 3, 6), (1, 5, 8), (2, 8, 11), (3, 10, 13),
    ]  # fmt: skip

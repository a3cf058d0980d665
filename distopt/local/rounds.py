"""When what is sent and taken in: pure functions of the number of inner steps that are done, so a resumed run agrees.

Round r lasts H_r inner steps. Fragment p of P is sent `ceil((p + 1) H_r / P)` steps into it, the last one at its end,
and taken in `overlap` steps later; at the latest where the same fragment is sent again, as in a warm-up with short
rounds.

After a step, first comes what is to be taken in and was sent before (`taken_after`), then what is to be sent
(`sent_after`), then, of this, what is taken in at once (`taken == sent`).
"""

import bisect
from functools import lru_cache
from typing import NamedTuple, Protocol


class Rhythm(Protocol):
    """What is read of a configuration."""

    @property
    def inner_steps(self) -> int:
        """H."""

    @property
    def warmup_rounds(self) -> int:
        """Rounds over which H grows from 1."""

    @property
    def fragments(self) -> int:
        """P."""

    @property
    def overlap(self) -> int:
        """Inner steps that an exchange may take."""


class Sending(NamedTuple):
    """One exchange of one fragment.

    Attributes:
        round: Counted from 0.
        fragment: Counted from 0.
        sent: After so many inner steps of the run.
        taken: After so many.
    """

    round: int
    fragment: int
    sent: int
    taken: int


def inner_steps_of(rhythm: Rhythm, round: int) -> int:
    """Inner steps of a round, counted from 0: 1 in the first of a warm-up, and H from its end on."""
    if round >= rhythm.warmup_rounds:
        return rhythm.inner_steps
    return 1 + (rhythm.inner_steps - 1) * round // rhythm.warmup_rounds


def first_step_of(rhythm: Rhythm, round: int) -> int:
    """Inner steps of all rounds before this one."""
    starts = _starts(rhythm.inner_steps, rhythm.warmup_rounds)
    if round < len(starts):
        return starts[round]
    return starts[-1] + (round - rhythm.warmup_rounds) * rhythm.inner_steps


def round_of(rhythm: Rhythm, step: int) -> int:
    """The round to which the inner step after `step` others belongs."""
    starts = _starts(rhythm.inner_steps, rhythm.warmup_rounds)
    if step < starts[-1]:
        return bisect.bisect_right(starts, step) - 1
    return rhythm.warmup_rounds + (step - starts[-1]) // rhythm.inner_steps


def sent_after(rhythm: Rhythm, step: int) -> tuple[Sending, ...]:
    """What is sent once `step` inner steps are done, in the order of the fragments."""
    if step < 1:
        return ()
    return tuple(each for each in _of_round(rhythm, round_of(rhythm, step - 1)) if each.sent == step)


def taken_after(rhythm: Rhythm, step: int) -> tuple[Sending, ...]:
    """What is taken in once `step` inner steps are done, in the order in which it was sent."""
    return tuple(each for each in _near(rhythm, step) if each.taken == step)


def under_way(rhythm: Rhythm, step: int) -> tuple[Sending, ...]:
    """What has been sent once `step` inner steps are done and all is taken in that must be, in that order."""
    return tuple(each for each in _near(rhythm, step) if each.sent <= step < each.taken)


def sending(rhythm: Rhythm, number: int) -> Sending:
    """The exchange with this number, counted from 0 through all rounds."""
    round, fragment = divmod(number, rhythm.fragments)
    return _of_round(rhythm, round)[fragment]


@lru_cache
def _starts(inner_steps: int, warmup_rounds: int) -> tuple[int, ...]:
    """First steps of the rounds of the warm-up, and of the one after it."""
    starts = [0]
    for round in range(warmup_rounds):
        starts.append(starts[-1] + 1 + (inner_steps - 1) * round // warmup_rounds)
    return tuple(starts)


def _near(rhythm: Rhythm, step: int) -> list[Sending]:
    """All of the rounds from which something may be under way: no exchange outlives the round after its own."""
    if step < 1:
        return []
    last = round_of(rhythm, step - 1)
    return [each for round in range(max(0, last - 1), last + 1) for each in _of_round(rhythm, round)]


def _of_round(rhythm: Rhythm, round: int) -> list[Sending]:
    found = []
    for fragment in range(rhythm.fragments):
        sent, again = _sent(rhythm, round, fragment), _sent(rhythm, round + 1, fragment)
        found.append(Sending(round, fragment, sent, min(sent + rhythm.overlap, again)))
    return sorted(found, key=lambda each: each.sent)


def _sent(rhythm: Rhythm, round: int, fragment: int) -> int:
    steps = -(-(fragment + 1) * inner_steps_of(rhythm, round) // rhythm.fragments)
    return first_step_of(rhythm, round) + steps

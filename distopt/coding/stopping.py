"""Stop rules: when the master stops waiting for answers and ends the round.

| name | the round ends |
|---|---|
| `paper` | at (1 + mu) times the fastest answer; if the stragglers are then outside the model, with the last answer |
| `minimal` | not before (1 + mu) times the fastest answer; then as soon as the stragglers are within the model |
| `decodable` | with the first answer after which the job that is due decodes and all later ones still can |

No rule waits for more than everybody, nor ends a round before its first answer. `paper` is the rule of Krishnan,
Ebrahimi & Khisti, *Sequential Gradient Coding For Straggler Mitigation*, ICLR 2023, section 2; it waits for everybody
because of a single answer too few.

Limits: `paper` and `minimal` wait without end for a worker that is gone if the model needs it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from distopt.coding.scheme import Run
from distopt.config import check_choice, check_number

STOP_RULES = ("decodable", "minimal", "paper")


class StopRule(ABC):
    """Base of the rules. One object serves one run."""

    @abstractmethod
    def ends(self, run: Run, round: int, elapsed_s: float, first_s: float) -> bool:
        """Whether the round ends now. To be asked after each answer and at `next_check_s`.

        Args:
            run: Has recorded all answers so far.
            round: The current one.
            elapsed_s: Seconds since the round started.
            first_s: Seconds from its start to its first answer; inf if there is none yet.
        """

    def next_check_s(self, first_s: float) -> float | None:
        """Seconds after the round's start at which to ask even if nobody answers then, None if never.

        Args:
            first_s: As for `ends`.
        """
        return None


class Decodable(StopRule):
    """As soon as `Run.may_end`."""

    def ends(self, run: Run, round: int, elapsed_s: float, first_s: float) -> bool:
        """See `StopRule.ends`."""
        return not run.missing(round) or (elapsed_s >= first_s and run.may_end(round))


@dataclass
class _AfterFirst(StopRule):
    mu: float = 1.0  # larger waits longer before it calls anybody a straggler

    def __post_init__(self) -> None:
        remedy = "1.0 waits for twice the fastest answer"
        if self.mu != 0:
            check_number("mu", self.mu, rule="a number of at least 0", remedy=remedy, low=0.0, high=1e9)

    def next_check_s(self, first_s: float) -> float | None:
        """See `StopRule.next_check_s`: (1 + mu) times the first answer."""
        return (1 + self.mu) * first_s if first_s < float("inf") else None


@dataclass
class Minimal(_AfterFirst):
    """Waits only until the stragglers are within the model again."""

    def ends(self, run: Run, round: int, elapsed_s: float, first_s: float) -> bool:
        """See `StopRule.ends`."""
        return not run.missing(round) or (elapsed_s >= (1 + self.mu) * first_s and run.conforms(round))


@dataclass
class Paper(_AfterFirst):
    """Judges once; outside the model it waits for everybody."""

    _judged: int = -1  # the last round that was found outside the model

    def ends(self, run: Run, round: int, elapsed_s: float, first_s: float) -> bool:
        """See `StopRule.ends`."""
        if not run.missing(round):
            return True
        if elapsed_s < (1 + self.mu) * first_s or self._judged == round:
            return False
        self._judged = round
        return run.conforms(round)


def stop_rule(name: str, *, mu: float = 1.0) -> StopRule:
    """The rule of this name.

    Raises:
        ConfigError: There is none, or mu breaks its rule.
    """
    check_choice("stop", name, STOP_RULES)
    if name == "decodable":
        return Decodable()
    return Paper(mu) if name == "paper" else Minimal(mu)

"""A mixing rule: what a rank does with its gradient, and with its parameters in an exchange.

A rule acts on rows: (n, d) of flat parameters, one row on a real rank, one for each node in a simulation. It is told of
every step of the optimizer, and of every exchange, which come every few steps.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from distopt.config import Configurable
from distopt.gossip.correction import Correction
from distopt.gossip.mixing.mixer import Mixer
from distopt.gossip.topology import Topology

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a rule may ask about the job.

    Attributes:
        topology: Who talks to whom.
        num_ranks: n.
        every: Steps from one exchange to the next.
    """

    topology: Topology
    num_ranks: int
    every: int


class Mixing(Configurable, tag="mixing"):
    """Base of all rules; each is a frozen dataclass.

    Attributes:
        needs_mean: Whether the weights themselves must keep the mean.
        can_correct: Whether its averages may be variance-corrected.
        can_overlap: Whether an exchange may change the rows by what it would have done to older ones, while the
            optimizer changes them further. Its state is then the exchange's own.
        replaces_momentum: Whether the optimizer must be SGD without momentum, because the rule has its own.
    """

    needs_mean: ClassVar[bool] = True
    can_correct: ClassVar[bool] = False
    can_overlap: ClassVar[bool] = False
    replaces_momentum: ClassVar[bool] = False

    def check(self, around: Surroundings) -> None:  # most rules work anywhere
        """Raises `ConfigError` if this rule cannot work there; says what can."""

    def begin(self, rows: Tensor, around: Surroundings) -> State:
        """What it remembers, each (n, ...), before the first step from `rows`."""
        return {}

    def gradient_(self, state: State, grads: Tensor) -> None:
        """Makes of the gradients (n, d), in place, what the optimizer takes; called in every step, before it."""

    def stepped_(self, state: State, rows: Tensor) -> None:
        """The optimizer has taken a step to `rows`; called in every step."""

    def at_(self, state: State, now: float) -> None:
        """An exchange begins at this time, in units of that of a gradient; in steps where all ranks go in step."""

    def clock(self, state: State) -> float:
        """The time of a rank, for rules that have one; see `level_`."""
        return 0.0

    def level_(self, state: State, rows: Tensor, clock: float) -> None:
        """Brings the rows, in place, to a time that all ranks have in common, the latest of theirs."""

    def regroup_(self, state: State, rows: Tensor, around: Surroundings) -> None:
        """Other ranks take part from now on, all told between two exchanges. What was known of them is void."""

    @abstractmethod
    def exchange_(
        self, state: State, rows: Tensor, mixer: Mixer, lr: Tensor | float, correction: Correction | None
    ) -> None:
        """Changes the rows, in place, by what the others have.

        Args:
            state: As `begin` made it; changed in place.
            rows: (n, d), after the optimizer's step.
            mixer: Of this round.
            lr: The learning rate of the last step, of all elements or (d,).
            correction: Restores the averages' spread; None if they are left as they are.
        """


def average_(rows: Tensor, mixer: Mixer, correction: Correction | None) -> None:
    """`W rows` in their place, corrected if that is asked for."""
    if correction is None:
        mixer.mix_(rows)
        return
    (targets,) = mixer.mix_(rows, correction.variances(rows))
    correction.restore_(rows, targets, mixer.squares)

"""The vectors of one job, step by step: when they are exchanged, by which rule, and what is still under way.

The same on a real rank, whose vectors have one row, and in a simulation, where they have a row for each node.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from distopt.errors import StateMismatchError
from distopt.gossip.configuration import Gossip
from distopt.gossip.correction import Correction, Segment
from distopt.gossip.gradient_clock import GradientClock
from distopt.gossip.mixing.mixer import Mixer
from distopt.gossip.mixing.rule import State, Surroundings
from distopt.spans import span

Act = Callable[[Mixer], None]


class Later(Protocol):
    """Something that is being done."""

    def done(self) -> bool:
        """Whether it is."""

    def result(self) -> None:
        """Waits for it."""


class AtOnce:
    """Done when it is asked for."""

    def __init__(self, task: Callable[[], None]) -> None:
        task()

    def done(self) -> bool:
        """See `Later`."""
        return True

    def result(self) -> None:
        """See `Later`."""


class Participant:
    """See the module.

    Args:
        gossip: The configuration.
        around: Of this job.
        vectors: Each (n, d) of one dtype, the first parameters; not changed here.
        segments: The tensors in each of the vectors.
        perform: Calls what it is given with the next round's exchange, once or, if that fails, again.
        start: Begins to do something; an exchange that overlaps with the computation is done there.

    Attributes:
        steps: Of the optimizer so far, those that a gradient scaler has skipped included.
        corrections: Of the variance, one for each vector; None where there is none.
        passed: How often a step has not begun an exchange because the one before was still under way.
    """

    def __init__(
        self,
        gossip: Gossip,
        around: Surroundings,
        vectors: Sequence[Tensor],
        segments: Sequence[Sequence[Segment]],
        perform: Callable[[Act], None],
        start: Callable[[Callable[[], None]], Later] = AtOnce,
    ) -> None:
        self._gossip, self._rule = gossip, gossip.rule
        self._states: list[State] = [self._rule.begin(rows, around) for rows in vectors]
        self.corrections = [Correction(gossip.correction, each) if gossip.corrects else None for each in segments]
        self._perform, self._start = perform, start
        waits = gossip.exchange != "asynchronous" or start is AtOnce
        self._clock = None if waits else GradientClock(gossip.every)
        self._sent: list[Tensor] = []
        self._mixed: list[Tensor] = []
        self._under_way: Later | None = None
        self._sent_moments: list[Tensor] = []
        self._mixed_moments: list[Tensor] = []
        self.steps = self.passed = 0

    def gradients_(self, grads: Sequence[Tensor]) -> None:
        """Before the optimizer's step: makes of the gradients, each (n, d), what it takes, in place."""
        for state, grad in zip(self._states, grads, strict=True):
            self._rule.gradient_(state, grad)

    def stepped_(
        self, vectors: Sequence[Tensor], lrs: Sequence[Tensor | float], moments: Sequence[Tensor] = ()
    ) -> bool:
        """After the optimizer's step: changes the vectors, in place; whether an exchange was made or begun.

        Args:
            vectors: Each (n, d).
            lrs: Of that step, for each vector; of all elements, or (d,). Read only where an exchange is due.
            moments: Of the optimizer and the like, each (n, k), averaged with the same weights, in place.
        """
        self.steps += 1
        if self._clock is not None:
            self._clock.stepped()
        for state, rows in zip(self._states, vectors, strict=True):
            self._rule.stepped_(state, rows)
        if self.steps % self._gossip.every:
            return False
        if self._gossip.exchange == "synchronous":
            self._tell_the_time()
            self._perform(lambda mixer: self._exchange_(vectors, lrs, moments, mixer))
            return True
        if self._gossip.exchange == "asynchronous" and self.is_busy():
            self.passed += 1
            return False
        self.begin_(vectors, lrs, moments)
        return True

    def _tell_the_time(self) -> None:
        if self._clock is not None:
            self._clock.exchanged()
        now = float(self.steps) if self._clock is None else self._clock.now
        for state in self._states:
            self._rule.at_(state, now)

    def is_busy(self) -> bool:
        """Whether an exchange is under way."""
        return self._under_way is not None and not self._under_way.done()

    def begin_(self, vectors: Sequence[Tensor], lrs: Sequence[Tensor | float], moments: Sequence[Tensor] = ()) -> None:
        """Begins an exchange of these as they are now, and first takes in the one before; see `stepped_`."""
        self.settle_(vectors, moments)
        self._tell_the_time()
        self._sent = [_copied(rows, at) for rows, at in _beside(vectors, self._sent)]
        self._mixed = [_copied(rows, at) for rows, at in _beside(vectors, self._mixed)]
        self._sent_moments = [rows.clone() for rows in moments]
        self._mixed_moments = [rows.clone() for rows in moments]
        mixed, others = self._mixed, self._mixed_moments
        self._under_way = self._start(lambda: self._perform(lambda mixer: self._exchange_(mixed, lrs, others, mixer)))

    def shown(self, vectors: Sequence[Tensor]) -> Sequence[Tensor]:
        """What may be read of the vectors in the thread of an exchange: the vectors, or what it began with."""
        return vectors if self._gossip.exchange == "synchronous" or not self._sent else self._sent

    def _exchange_(
        self, vectors: Sequence[Tensor], lrs: Sequence[Tensor | float], moments: Sequence[Tensor], mixer: Mixer
    ) -> None:
        """Changes all or, if it raises, nothing: it is tried again with those that are left."""
        with span("gossip", "exchange"):
            kept = [(rows.clone(), _cloned(state)) for rows, state in zip(vectors[:-1], self._states, strict=False)]
            moments_mixed = mixer.mix(*moments) if moments else ()
            try:
                for rows, state, lr, correction in zip(vectors, self._states, lrs, self.corrections, strict=True):
                    self._rule.exchange_(state, rows, mixer, lr, correction)
            except BaseException:
                for rows, state, (rows_before, state_before) in zip(vectors, self._states, kept, strict=False):
                    rows.copy_(rows_before)
                    for name, tensor in state_before.items():
                        state[name].copy_(tensor)
                raise
            for moment, mixed in zip(moments, moments_mixed, strict=True):
                moment.copy_(mixed)

    def settle_(self, vectors: Sequence[Tensor], moments: Sequence[Tensor] = ()) -> None:
        """Waits for an exchange that is under way and takes in, in place, what it has made of what was sent.

        What goes with the vectors moves by as much as it has moved there, and no further than to where it came to lie:
        a variance, say, never becomes negative.
        """
        if self._under_way is None:
            return
        later, self._under_way = self._under_way, None
        with span("gossip", "wait"):
            later.result()
        for rows, mixed, sent in zip(vectors, self._mixed, self._sent, strict=True):
            rows.add_(mixed).sub_(sent)
        for rows, mixed, sent in zip(moments, self._mixed_moments, self._sent_moments, strict=True):
            least, most = torch.minimum(rows, mixed), torch.maximum(rows, mixed)
            rows.add_(mixed - sent).clamp_(least, most)

    @property
    def clock(self) -> float:
        """The time of this rank, where its rule has one; `settle_` first."""
        return max(map(self._rule.clock, self._states), default=0.0)

    def level_(self, vectors: Sequence[Tensor], clock: float) -> None:
        """Brings the vectors, in place, to a time that all ranks have in common."""
        for state, rows in zip(self._states, vectors, strict=True):
            self._rule.level_(state, rows, clock)

    def regroup_(self, vectors: Sequence[Tensor], around: Surroundings) -> None:
        """Other ranks take part from now on."""
        for state, rows in zip(self._states, vectors, strict=True):
            self._rule.regroup_(state, rows, around)

    def restart(self, vectors: Sequence[Tensor], around: Surroundings) -> None:
        """Begins anew from these vectors: those of a rank that has joined."""
        self._states = [self._rule.begin(rows, around) for rows in vectors]

    @property
    def variance_ratio(self) -> float | None:
        """The least that the last average left of a corrected tensor's variance; None where nothing is corrected."""
        ratios = [each.ratio.min() for each in self.corrections if each is not None and each.ratio is not None]
        return float(torch.stack(ratios).min()) if ratios else None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers, shared; `settle_` first."""
        assert self._under_way is None
        now = None if self._clock is None else self._clock.now
        return {"rule": [dict(state) for state in self._states], "steps": self.steps, "clock": now}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another was.

        Raises:
            StateMismatchError: It had another rule, or other parameters.
        """
        saved, own = _forms(state["rule"]), _forms(self._states)
        if saved != own:
            raise StateMismatchError(
                f"the state must be of {self._rule.name} with {own}, got {saved}; load it into the configuration and "
                "model that it was saved from"
            )
        for mine, theirs in zip(self._states, state["rule"], strict=True):
            for name, tensor in mine.items():
                tensor.copy_(theirs[name])
        self.steps = int(state["steps"])
        if self._clock is not None:
            self._clock.now = float(state["clock"])
        self._under_way = None


def _beside(vectors: Sequence[Tensor], kept: Sequence[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    places: Sequence[Tensor | None] = kept or [None] * len(vectors)
    return list(zip(vectors, places, strict=True))


def _cloned(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def _copied(rows: Tensor, at: Tensor | None) -> Tensor:
    return rows.detach().clone() if at is None else at.copy_(rows)


def _forms(states: Sequence[Mapping[str, Tensor]]) -> list[dict[str, tuple[int, ...]]]:
    return [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in states]

"""Synthetic traces: round times with heavy tails, bursts of slowness and slow nodes, as clusters have them.

    seconds = base_s + load * seconds_per_load + spread_s * Lomax(tail) + what bursts and slow nodes add

- The tail: a Lomax variable has P(X > x) = (1 + x)^-tail, so `tail` near 1 gives a few very late answers, independent
  of each other.
- Bursts: each worker is a Gilbert-Elliott chain of a quick and a slow state. In a round it falls into the slow one
  with `burst_probability` and leaves it with 1 / `burst_rounds`, so bursts have a geometric length of that mean. A slow
  answer takes `burst_s` times an exponential variable of mean 1 longer, drawn anew in each round.
- Slow nodes: a fixed part of the workers, `slow_fraction`, takes `slow_s` longer in every round.

Limits: workers are independent of each other but for the fixed slow ones; `seconds_per_load` is the same for all.
"""

from dataclasses import dataclass

import numpy as np

from distopt.coding.trace import Trace, check_slope
from distopt.config import check_count, check_number
from distopt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a synthetic trace is drawn from.

    Raises:
        ConfigError: A value breaks its rule.
    """

    workers: int  # n
    base_s: float = 1.0  # of every answer: network, start, what does not depend on the load
    seconds_per_load: float = 2.2  # what one worker would take for the whole data: larger makes redundancy dearer
    spread_s: float = 0.05  # scale of the tail: larger spreads all answers
    tail: float = 2.0  # tail index: smaller makes the rare very late answers later
    burst_probability: float = 0.01  # per round, of a quick worker turning slow: larger makes more stragglers
    burst_rounds: float = 1.5  # mean length of a burst, at least 1: longer needs a longer B
    burst_s: float = 4.0  # mean slowness within a burst: larger makes waiting dearer
    slow_fraction: float = 0.0  # of the workers, slow in every round
    slow_s: float = 0.0  # what those take longer

    def __post_init__(self) -> None:
        check_count("workers", self.workers, low=1, remedy="give the number of workers")
        check_slope(self.seconds_per_load)
        check_number("tail", self.tail, rule="positive", remedy="use 2.0", low=0.0, high=1e6)
        for name in ("base_s", "spread_s", "burst_s", "slow_s"):
            if getattr(self, name) != 0:
                check_number(
                    name, getattr(self, name), rule="seconds of at least 0", remedy="use 0 for none", low=0, high=1e9
                )
        for name in ("burst_probability", "slow_fraction"):
            if getattr(self, name) != 0:
                check_number(name, getattr(self, name), rule="in [0, 1]", remedy="use 0 for none", low=0, high=1)
        if not 1 <= self.burst_rounds < float("inf"):
            raise ConfigError(
                f"burst_rounds must be at least 1, got {self.burst_rounds!r}; a burst has one round or more"
            )

    def trace(self, rounds: int, seed: int, *, load: float = 0.0) -> Trace:
        """A trace of this cluster.

        Args:
            rounds: Its length.
            seed: The same seed gives the same trace.
            load: Of each worker; 0 gives the profile that is shifted to the load of each scheme.
        """
        check_count("rounds", rounds, low=1, remedy="give the length of the trace")
        rng = np.random.default_rng(seed)
        shape = (rounds, self.workers)
        seconds = self.base_s + load * self.seconds_per_load + self.spread_s * rng.pareto(self.tail, shape)
        seconds += self._bursts(rng, rounds) * self.burst_s * rng.exponential(size=shape)
        slow = rng.permutation(self.workers) < round(self.slow_fraction * self.workers)
        return Trace(seconds=seconds + slow * self.slow_s, load=load, seconds_per_load=self.seconds_per_load)

    def _bursts(self, rng: np.random.Generator, rounds: int) -> np.ndarray:
        """(rounds, workers) bool, from the chain's stationary state on."""
        enter, leave = self.burst_probability, 1 / self.burst_rounds
        draws = rng.random((rounds, self.workers))
        bursting = np.empty((rounds, self.workers), dtype=np.bool_)
        state = rng.random(self.workers) < enter / (enter + leave)
        for each in range(rounds):
            bursting[each] = state
            state = np.where(state, draws[each] >= leave, draws[each] < enter)
        return bursting

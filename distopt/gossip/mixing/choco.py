"""CHOCO: gossip of compressed differences."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from distopt.config import check_number
from distopt.errors import ConfigError
from distopt.gossip.codec import Codec, TopKCodec
from distopt.gossip.correction import Correction
from distopt.gossip.mixing.mixer import Mixer
from distopt.gossip.mixing.rule import Mixing, State, Surroundings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choco(Mixing, name="choco"):
    """Each rank sends what its neighbours do not know yet of its model, compressed.

    `x <- x + gamma (s - h); q = Q(x - h); h <- h + q; s <- s + W q`, h and s zero at the start (Koloskova, Stich and
    Jaggi, "Decentralized Stochastic Optimization and Gossip Algorithms with Compressed Communication", ICML 2019,
    algorithm 2, with two vectors per rank): h is what the others know of x, s the average of what is known. What is not
    sent is not lost, it is in the next difference. Keeps the mean of the ranks. s is only right while the graph stays
    the same.
    """

    codec: Codec = dataclasses.field(default=TopKCodec(), metadata={"configurable": Codec})
    gamma: float = 0.4  # of the step towards the average; what is compressed harder needs a smaller one

    can_correct: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.codec, Codec):
            raise ConfigError(f"codec must be a codec, got {self.codec!r}; use distopt.gossip.TopKCodec(density=0.01)")
        check_number("gamma", self.gamma, rule="a number in (0, 1]", remedy="use 0.4", low=0.0, high=1.0)

    def check(self, around: Surroundings) -> None:
        """See `Mixing.check`."""
        if around.topology.period(around.num_ranks) != 1:
            raise ConfigError(
                f"choco must have the same graph in every round, got {around.topology.name!r}; use 'ring', 'torus', "
                "'exponential' or another that does not change"
            )

    def begin(self, rows: Tensor, around: Surroundings) -> State:
        """See `Mixing.begin`."""
        return {"known": torch.zeros_like(rows), "average": torch.zeros_like(rows)}

    def regroup_(self, state: State, rows: Tensor, around: Surroundings) -> None:
        """See `Mixing.regroup_`: all begin to tell each other anew."""
        state["known"].zero_()
        state["average"].zero_()

    def exchange_(
        self, state: State, rows: Tensor, mixer: Mixer, lr: Tensor | float, correction: Correction | None
    ) -> None:
        """See `Mixing.exchange_`."""
        known, average = state["known"], state["average"]
        targets = None if correction is None else correction.variances(rows)
        sent, mixed = mixer.mix_coded(rows + self.gamma * (average - known) - known, self.codec)
        rows.add_(average - known, alpha=self.gamma)
        known.add_(sent)
        average.add_(mixed)
        if correction is not None and targets is not None:
            (others,) = mixer.mix(targets)
            # The new row is (1 - gamma) times the own one and gamma times the average, as far as that is known.
            least = 1 - self.gamma + self.gamma * mixer.squares.sqrt()
            correction.restore_(rows, torch.lerp(targets, others, self.gamma), least.square())

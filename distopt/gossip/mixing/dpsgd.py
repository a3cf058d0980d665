"""Decentralised parallel SGD."""

import dataclasses
from typing import ClassVar

from torch import Tensor

from distopt.gossip.correction import Correction
from distopt.gossip.mixing.mixer import Mixer
from distopt.gossip.mixing.rule import Mixing, State, average_


@dataclasses.dataclass(frozen=True)
class DPSGD(Mixing, name="d-psgd"):
    """`x <- W (x - lr g)`; any optimizer's update may stand for `lr g`. Keeps the mean of the ranks.

    Lian et al., "Can Decentralized Algorithms Outperform Centralized Algorithms?", NeurIPS 2017. This is the form that
    adapts, then combines; overlapped exchanges make the paper's own, `x <- W x - lr g`, of it.
    """

    can_correct: ClassVar[bool] = True
    can_overlap: ClassVar[bool] = True

    def exchange_(
        self, state: State, rows: Tensor, mixer: Mixer, lr: Tensor | float, correction: Correction | None
    ) -> None:
        """See `Mixing.exchange_`."""
        average_(rows, mixer, correction)

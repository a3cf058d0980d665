"""Server optimizers: what a server makes of the round's sum of deltas, D, which stands for a negative gradient.

Hsu et al., *Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification*, 2019
(FedAvgM: momentum); Reddi et al., *Adaptive Federated Optimization*, ICLR 2021, algorithm 2 (the adaptive ones):

    m = b1 m + (1 - b1) D;   x = x + eta_g * m / (sqrt(v) + tau)

with m = 0 and v = tau^2 at first and no bias correction. They speak of the trained elements only; a server averages
buffers by itself.

Limits: a round without replies is none for them: m and v stay.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distopt.config import Configurable, check_number
from distopt.errors import ConfigError
from distopt.federated.memory import ServerMemory

FIRST_MOMENT = "first_moment"
SECOND_MOMENT = "second_moment"


class ServerOptimizer(Configurable, tag="optimizer"):
    """Base of all.

    Attributes:
        usual_lr: eta_g where the algorithm's `server_lr` is left out.
    """

    usual_lr: ClassVar[float] = 1.0

    @abstractmethod
    def direction(self, memory: ServerMemory, delta: Tensor) -> Tensor:
        """(d,): what is multiplied by eta_g and added to the model; `delta` is D. Called once per round."""

    def begin(self, memory: ServerMemory) -> None:
        """Puts vectors of its own into a new memory."""


def _check_decay(field: str, value: object) -> None:
    valid = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
    if not valid:
        raise ConfigError(f"{field} must be a number in [0, 1), got {value!r}; use 0.9 to remember about ten rounds")


@dataclass(frozen=True, kw_only=True)
class PlainStep(ServerOptimizer, name="plain"):
    """`x + eta_g D`."""

    def direction(self, memory: ServerMemory, delta: Tensor) -> Tensor:
        """See `ServerOptimizer.direction`."""
        return delta


@dataclass(frozen=True, kw_only=True)
class ServerMomentum(ServerOptimizer, name="momentum"):
    """FedAvgM: `m = b m + D; x + eta_g m`."""

    momentum: float = 0.9  # b: larger remembers more rounds, and steps up to 1/(1-b) times as far

    def __post_init__(self) -> None:
        _check_decay("momentum", self.momentum)

    def begin(self, memory: ServerMemory) -> None:
        """See `ServerOptimizer.begin`."""
        memory.remember(FIRST_MOMENT)

    def direction(self, memory: ServerMemory, delta: Tensor) -> Tensor:
        """See `ServerOptimizer.direction`."""
        first = self.momentum * memory.vectors[FIRST_MOMENT] + delta
        memory.vectors[FIRST_MOMENT] = first
        return first


@dataclass(frozen=True, kw_only=True)
class _Adaptive(ServerOptimizer):
    beta1: float = 0.9  # larger remembers more rounds of D
    tau: float = 1e-3  # larger adapts less: smaller steps, and more alike between coordinates

    usual_lr = 0.01

    def __post_init__(self) -> None:
        _check_decay("beta1", self.beta1)
        check_number("tau", self.tau, rule="a number in (0, 1e6]", remedy="use 0.001", low=0.0, high=1e6)

    def begin(self, memory: ServerMemory) -> None:
        """See `ServerOptimizer.begin`."""
        memory.remember(FIRST_MOMENT)
        memory.remember(SECOND_MOMENT, self.tau**2)

    def direction(self, memory: ServerMemory, delta: Tensor) -> Tensor:
        """See `ServerOptimizer.direction`."""
        first = self.beta1 * memory.vectors[FIRST_MOMENT] + (1 - self.beta1) * delta
        second = self.second_moment(memory.vectors[SECOND_MOMENT], delta * delta)
        memory.vectors[FIRST_MOMENT] = first
        memory.vectors[SECOND_MOMENT] = second
        return first / (second.sqrt() + self.tau)

    @abstractmethod
    def second_moment(self, before: Tensor, square: Tensor) -> Tensor:
        """The next v, (d,), of the last and of D^2."""


@dataclass(frozen=True, kw_only=True)
class ServerAdagrad(_Adaptive, name="adagrad"):
    """FedAdagrad: `v = v + D^2`, so steps only ever get smaller."""

    def second_moment(self, before: Tensor, square: Tensor) -> Tensor:
        """See `_Adaptive.second_moment`."""
        return before + square


@dataclass(frozen=True, kw_only=True)
class _Decaying(_Adaptive):
    beta2: float = 0.99  # larger remembers more rounds of D^2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_decay("beta2", self.beta2)


@dataclass(frozen=True, kw_only=True)
class ServerAdam(_Decaying, name="adam"):
    """FedAdam: `v = b2 v + (1 - b2) D^2`."""

    def second_moment(self, before: Tensor, square: Tensor) -> Tensor:
        """See `_Adaptive.second_moment`."""
        return self.beta2 * before + (1 - self.beta2) * square


@dataclass(frozen=True, kw_only=True)
class ServerYogi(_Decaying, name="yogi"):
    """FedYogi: `v = v - (1 - b2) D^2 sign(v - D^2)`; after a large D it forgets more slowly than Adam."""

    def second_moment(self, before: Tensor, square: Tensor) -> Tensor:
        """See `_Adaptive.second_moment`."""
        return before - (1 - self.beta2) * square * torch.sign(before - square)

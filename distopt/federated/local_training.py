"""What a client does in a round: how many steps, on which batches, with which optimizer.

Batches come from the seed, the round and the client alone: whoever computes them, in whatever order, gets the same, and
a run that goes on from a checkpoint needs no generator's state for them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from distopt.config import Configurable, FrozenMapping, check_count, check_number, check_switch
from distopt.errors import ConfigError
from distopt.federated.checks import check_from_zero
from distopt.federated.randomness import stream


@dataclass(frozen=True, kw_only=True)
class LocalTraining(Configurable, tag="local", name="local"):
    """The local part of a round.

    Args:
        lr: eta_l.
        lr_decay: The rate of round t is `lr * lr_decay**t`.
        batch_size: Samples per step; a client with fewer takes all of them.
        epochs: Passes over the client's data, the last batch of each being what is left; or
        steps: So many batches, going on into further passes.
        drop_last: Whether what is left is left out, where the client has a whole batch.
        optimizer: Name of a class in torch.optim, or in pytorch_optimizer where it is installed.
        options: Its other arguments, such as {"momentum": 0.9}.
        max_norm: Of the gradient and its correction together; None does not clip.
        weight_decay: Of the objective: every gradient gets this times the parameters that it is taken at, before an
            algorithm corrects it; FedSpeed's ascent step sees it. An optimizer's own, in `options`, comes after.
    """

    lr: float = 0.1  # larger moves further and drifts further apart
    lr_decay: float = 1.0  # below 1 the rate shrinks from round to round
    batch_size: int = 32
    epochs: int | None = None  # more local work, fewer rounds, more drift
    steps: int | None = None
    drop_last: bool = False  # True: all batches of a size, for BatchNorm, and a few samples unseen in each pass
    optimizer: str = "SGD"
    options: Mapping[str, Any] = FrozenMapping()
    max_norm: float | None = None
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_number("lr", self.lr, rule="a number above 0", remedy="use 0.1", low=0.0, high=math.inf)
        check_number("lr_decay", self.lr_decay, rule="a number in (0, 1]", remedy="use 1.0 for none", low=0.0, high=1.0)
        check_count("batch_size", self.batch_size, low=1, remedy="use 32")
        if self.epochs is None and self.steps is None:
            raise ConfigError("one of epochs and steps must be given, got none; steps=5, say")
        if self.epochs is not None and self.steps is not None:
            raise ConfigError(
                f"epochs must be None beside steps={self.steps}, got {self.epochs}; leave one of them out"
            )
        for field in ("epochs", "steps"):
            if (value := getattr(self, field)) is not None:
                check_count(field, value, low=1, remedy="use 5")
        check_switch("drop_last", self.drop_last)
        if self.max_norm is not None:
            check_number("max_norm", self.max_norm, rule="a number above 0", remedy="use 10.0", low=0.0, high=math.inf)
        check_from_zero("weight_decay", self.weight_decay, remedy="use 1e-3, or 0.0 for none")
        if not isinstance(self.options, Mapping):
            raise ConfigError(f'options must be a mapping, got {self.options!r}; use {{"momentum": 0.9}}')
        object.__setattr__(self, "options", FrozenMapping(self.options))
        optimizer_class(self.optimizer)

    @property
    def is_plain_sgd(self) -> bool:
        """Whether a step is lr times the gradient."""
        return self.optimizer == "SGD" and not self.options.get("momentum") and not self.options.get("weight_decay")

    def make(self, parameters: list[nn.Parameter], round: int) -> torch.optim.Optimizer:
        """The optimizer of a round."""
        kind = optimizer_class(self.optimizer)
        made: torch.optim.Optimizer = kind(parameters, lr=self.lr * self.lr_decay**round, **self.options)
        return made

    def num_steps(self, num_samples: int) -> int:
        """How many batches a client with so many samples takes."""
        if not num_samples:
            return 0
        return self.steps if self.steps is not None else (self.epochs or 0) * len(self.batch_sizes(num_samples))

    def batch_sizes(self, num_samples: int) -> list[int]:
        """Of the batches of one pass over so many samples."""
        whole, left = divmod(num_samples, self.batch_size)
        return [self.batch_size] * whole + ([left] if left and not (self.drop_last and whole) else [])

    def batches(self, part: NDArray[np.int64], key: list[int], round: int, client: int) -> Iterator[NDArray[np.int64]]:
        """The samples of each step.

        Args:
            part: Those that the client owns.
            key: Of the job's streams of batches, see `randomness.stream_key`.
            round: Which one.
            client: Its number.
        """
        rng, left = stream(key, round, client), self.num_steps(len(part))
        while left > 0:
            order = part[rng.permutation(len(part))]
            for size in self.batch_sizes(len(part))[:left]:
                yield order[:size]
                order = order[size:]
                left -= 1


def optimizer_class(name: str) -> Any:
    """The optimizer of that name.

    Raises:
        ConfigError: Neither torch.optim nor pytorch_optimizer has it.
    """
    found, where = getattr(torch.optim, str(name), None), ""
    if found is None:
        try:
            import pytorch_optimizer
        except ModuleNotFoundError:
            where = "; pytorch_optimizer, which has more, is not installed"
        else:
            found = getattr(pytorch_optimizer, str(name), None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(
            f"optimizer must be the name of a class in torch.optim or pytorch_optimizer, got {name!r}{where}; use 'SGD'"
        )
    return found

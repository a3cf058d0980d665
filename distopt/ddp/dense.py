"""Plain averaging through the same hook: the control that the others are measured against.

Does what DDP does without a hook, to the bit, and counts bytes and seconds in the same `stats()`.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from distopt.compress import INDEX_FORMATS
from distopt.ddp.algorithm import DDPAlgorithm, check_peer_timeout
from distopt.ddp.memory import Memory, NoMemory
from distopt.ddp.parameters import Hyperparameters
from distopt.ddp.policy import StepPolicy, WirePolicy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense(DDPAlgorithm, name="dense"):
    """Average every gradient whole. NaN and Inf pass through, as in DDP."""

    makes_dense_mean: ClassVar[bool] = True

    peer_timeout: float = 120.0  # s; shorter notices a lost rank sooner and mistakes a busy one for it; 0: no watch

    def __post_init__(self) -> None:
        check_peer_timeout(self.peer_timeout)

    def step_policy(self, *, tracks_usage: bool) -> StepPolicy:
        """See `DDPAlgorithm.step_policy`."""
        wire = WirePolicy(
            value_dtype=None,
            index_format=INDEX_FORMATS["int32"],
            exchange="whole",
            with_status=False,
            with_used_flags=False,
        )
        return StepPolicy(warmup=None, clip=None, nonfinite="ignore", wire=wire)

    def densities_for(self, parameters: Mapping[str, Tensor]) -> dict[str, float | None]:
        """See `DDPAlgorithm.densities_for`."""
        return dict.fromkeys(parameters)

    def memory_for(self, parameter: Tensor, whole: bool, hyperparameters: Hyperparameters) -> Memory:
        """See `DDPAlgorithm.memory_for`."""
        return NoMemory()

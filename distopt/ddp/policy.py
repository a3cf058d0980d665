"""What the configuration decides about a step and about the wire, apart from the mechanism that does it."""

import dataclasses

import torch

from distopt.compress import IndexFormat
from distopt.ddp.schedule import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class WirePolicy:
    """How entries travel.

    Attributes:
        value_dtype: Dtype of sent values; None keeps each bucket's own.
        index_format: How positions are written.
        choice: "sparse", "dense", or "auto" for whichever puts fewer bytes on the link.
        with_status: Whether every bucket carries a header, also one that is sent whole.
        with_used_flags: Whether headers say which parameters the backward pass reached.
    """

    value_dtype: torch.dtype | None
    index_format: IndexFormat
    choice: str
    with_status: bool
    with_used_flags: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPolicy:
    """What is done with a whole step.

    Attributes:
        warmup: Density by step; None for the final density from the start.
        clip: Threshold of local gradient clipping, or None.
        nonfinite: "error", "skip" or "ignore".
        wire: How entries travel.
    """

    warmup: Schedule | None
    clip: float | None
    nonfinite: str
    wire: WirePolicy

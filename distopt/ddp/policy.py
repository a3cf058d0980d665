"""What the configuration decides about a step and about the wire, apart from the mechanism that does it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from distopt.comm import Link, Place
from distopt.compress import IndexFormat
from distopt.ddp.schedule import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class WirePolicy:
    """How entries travel.

    Attributes:
        value_dtype: Dtype of sent values; None keeps each bucket's own.
        index_format: How positions are written.
        exchange: How selected entries travel: a route of `distopt.ddp.plan`, or "auto" for the fastest.
        link: What "auto" predicts with; None measures.
        ranks_per_node: Consecutive ranks that share a node; None asks the launcher.
        with_status: Whether every bucket carries a header, also one that is sent whole.
        with_used_flags: Whether headers say which parameters the backward pass reached.
    """

    value_dtype: torch.dtype | None
    index_format: IndexFormat
    exchange: str
    with_status: bool
    with_used_flags: bool
    link: Link | None = None
    ranks_per_node: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """What is known, once attached, about the ways from here.

    Attributes:
        place: Where this rank stands.
        routes: The usual one, then those that are taken where they are predicted to be faster.
        predict: Seconds that a plan will take, the same on every rank.
    """

    place: Place
    routes: tuple[str, ...]
    predict: Callable[[Any], float] | None = None


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

"""Finding NaN and Inf in gradients, and saying where: parameter name and rank."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.futures import Future

from distopt import ops
from distopt.comm import all_gather
from distopt.ddp.arrival import NonFiniteReport
from distopt.ddp.bucket import Bucket
from distopt.errors import NonFiniteGradientError


def first_nonfinite(bucket: Bucket) -> int | None:
    """Position in the bucket of the first parameter whose gradient holds NaN or Inf, or None."""
    if ops.all_finite(bucket.buffer()):
        return None
    bad = (i for i, gradient in enumerate(bucket.gradients()) if not bool(torch.isfinite(gradient).all()))
    return next(bad, None)


def agree_on_nonfinite(
    first: int | None,
    names: list[str],
    group: dist.ProcessGroup,
    device: torch.device,
    wait: Callable[["Future[Any]"], None],
) -> list[NonFiniteReport]:
    """Tells every rank what each found. Blocking and collective.

    Args:
        first: Index into `names` of the first bad parameter of this rank, or None.
        names: The parameters, in an order that all ranks share.
        group: The ranks.
        device: Where the group's backend wants its tensors.
        wait: For a collective; may raise.
    """
    found = torch.tensor([0 if first is None else first + 1], dtype=torch.int32, device=device)
    gathered, done = all_gather(found, group)
    wait(done)
    return [NonFiniteReport(rank, names[code - 1]) for rank, code in enumerate(gathered.view(-1).tolist()) if code]


def describe(reports: Iterable[NonFiniteReport]) -> str:
    """The reports as one phrase."""
    return ", ".join(f"{report.name!r} on rank {report.rank}" for report in reports)


def nonfinite_error(reports: Iterable[NonFiniteReport]) -> NonFiniteGradientError:
    """The error that every rank raises for these reports."""
    return NonFiniteGradientError(
        f"gradients must be finite, got NaN or Inf in {describe(reports)}; no parameter was changed. Lower the "
        'learning rate or clip (clip=1.0), use nonfinite="skip" to leave such steps out, and go on from a checkpoint'
    )

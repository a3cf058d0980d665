"""The alpha-beta-gamma model of a link: how long a collective of a given size takes, measured or given.

A message of b bytes takes `latency_s + b / bandwidth`, and an all-reduce adds up at `reduction` bytes per second
(Hockney 1994; Thakur, Rabenseifner & Gropp 2005). N ranks exchange in rings:

    all-reduce of b bytes             2 (N-1) (latency + b/N / bandwidth) + b / reduction
    all-gather of b bytes per rank    (N-1) (latency + b / bandwidth)
    all-to-all, messages of b bytes   (N-1) (latency + b / bandwidth)

Limits: one number for all pairs of ranks; traffic of others is not foreseen.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.distributed as dist

from distopt.comm.agreement import gather_json
from distopt.comm.collectives import all_gather, all_reduce_sum
from distopt.comm.stopwatch import least_seconds
from distopt.config import Configurable, check_number

_SMALL_NBYTES = 8
_LARGE_NBYTES = 1 << 19


class LinkModel(Configurable, tag="link"):
    """Base of what can be given as `link=`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link(LinkModel, name="alpha-beta"):
    """A link between ranks.

    Raises:
        ConfigError: A value breaks its rule.
    """

    latency_s: float  # of one message; larger favours fewer phases
    bandwidth: float  # bytes per second that one rank sends; smaller favours compression
    reduction: float | None = None  # bytes per second at which an all-reduce adds up; smaller disfavours dense

    def __post_init__(self) -> None:
        remedy = "use the numbers that `distopt link` prints"
        check_number("latency_s", self.latency_s, rule="positive seconds", remedy=remedy, low=0.0, high=math.inf)
        check_number("bandwidth", self.bandwidth, rule="positive", remedy=remedy, low=0.0, high=math.inf)
        if self.reduction is not None:
            check_number("reduction", self.reduction, rule="positive", remedy=remedy, low=0.0, high=math.inf)

    def allreduce_s(self, num_ranks: int, nbytes: float) -> float:
        """Seconds of a ring all-reduce of a tensor of `nbytes`."""
        messages = 2 * (num_ranks - 1)
        adding_s = nbytes / self.reduction if self.reduction is not None else 0.0
        return messages * (self.latency_s + nbytes / num_ranks / self.bandwidth) + adding_s

    def allgather_s(self, num_ranks: int, nbytes: float) -> float:
        """Seconds of an all-gather to which each rank contributes `nbytes`."""
        return (num_ranks - 1) * (self.latency_s + nbytes / self.bandwidth)

    def alltoall_s(self, num_ranks: int, nbytes: float) -> float:
        """Seconds of an all-to-all with messages of `nbytes`."""
        return (num_ranks - 1) * (self.latency_s + nbytes / self.bandwidth)

    def gather_to_first_s(self, num_ranks: int, nbytes: float) -> float:
        """Seconds until one rank has, or has sent, `nbytes` from or to each of the others."""
        return (num_ranks - 1) * (self.latency_s + nbytes / self.bandwidth)


def measure_link(group: dist.ProcessGroup, device: torch.device) -> Link:
    """Times small and large collectives; the same result on every rank. Collective, takes a few of them.

    Args:
        group: The ranks, at least two.
        device: Where the group's backend wants its tensors.
    """
    num_ranks = group.size()

    def gather(nbytes: int) -> Callable[[], None]:
        tensor = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        return lambda: all_gather(tensor, group)[1].wait()

    def reduce(nbytes: int) -> Callable[[], None]:
        tensor = torch.zeros(nbytes // 4, device=device)
        return lambda: all_reduce_sum(tensor, group).wait()

    small = least_seconds(gather(_SMALL_NBYTES), device)
    large = least_seconds(gather(_LARGE_NBYTES), device)
    reduced = least_seconds(reduce(_LARGE_NBYTES), device)
    latency_s = small / (num_ranks - 1)
    # The slowest rank decides; all must come to the same numbers.
    told = gather_json([latency_s, max(large - small, 1e-7), reduced], group, device)
    latency_s, transfer_s, reduced = (max(column) for column in zip(*told, strict=True))
    bandwidth = (num_ranks - 1) * _LARGE_NBYTES / transfer_s
    without_sums = Link(latency_s=latency_s, bandwidth=bandwidth).allreduce_s(num_ranks, _LARGE_NBYTES)
    adding_s = reduced - without_sums
    return Link(
        latency_s=latency_s,
        bandwidth=bandwidth,
        reduction=_LARGE_NBYTES / adding_s if adding_s > 0 else None,
    )

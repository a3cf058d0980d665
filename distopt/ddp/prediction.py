"""How long a plan will take, from a model of the link and from measured speeds of selection and decoding.

This is what `exchange="auto"` chooses by. Every term is linear in sizes that all ranks know, and the speeds are agreed,
so all ranks choose alike. Work and transfer are added up: how much of either hides behind the backward pass is not
known at attach.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Self

import torch
import torch.distributed as dist

from distopt import ops
from distopt.comm import Link, gather_json, least_seconds
from distopt.ddp.plan import BucketPlan

_PROBE_NUMEL = 1 << 18


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of work per entry, on the slowest rank.

    Attributes:
        average_s: An entry that is averaged: the pass that scales it, and the one of its momentum.
        select_s: Selecting from an entry, with momentum, at a density of 0.1%.
        select_more_s: The same, for each entry selected.
        scan_s: Selecting for owners: one more read.
        add_s: Adding up one entry that arrived.
        clear_s: Setting an entry to zero.
        overhead_s: Of Python and torch for a bucket on a sparse route, whatever its size.
    """

    average_s: float
    select_s: float
    select_more_s: float
    scan_s: float
    add_s: float
    clear_s: float
    overhead_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictor:
    """Predicts the seconds of a plan.

    Attributes:
        link: Between all ranks.
        speed: Of the work before and behind the network.
        node_link: Inside a node, or None if no node has several ranks.
        leader_link: Between the nodes' leaders, or None.
    """

    link: Link
    speed: Speed
    node_link: Link | None = None
    leader_link: Link | None = None

    def to_json(self) -> str:
        """Everything that the choice of routes depends on: a run that goes on elsewhere must choose alike."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote."""
        facts = json.loads(text)
        between = {name: Link(**facts[name]) for name in ("node_link", "leader_link") if facts[name]}
        return cls(link=Link(**facts["link"]), speed=Speed(**facts["speed"]), **between)

    def __call__(self, plan: BucketPlan) -> float:
        """Seconds from the hook's call to the update in the buffer, if nothing else is going on."""
        n = plan.place.num_ranks
        if n == 1:
            return self._work_s(plan)
        first = plan.layout.nbytes if plan.layout else 0
        second = plan.returned.nbytes if plan.returned else 0
        seconds = self._work_s(plan)
        if plan.route == "balanced":
            seconds += self.link.alltoall_s(n, first) + self.link.allgather_s(n, second)
        elif plan.layout is not None:
            seconds += self.link.allgather_s(n, first)
        if plan.route == "hierarchical":
            seconds += self._through_leaders_s(plan, second)
        elif plan.is_reduced:
            # what was held back goes out once, and does not count for the choice
            once = plan.dense_nbytes if plan.route != "whole" else plan.numel * plan.dense_dtype.itemsize
            seconds += self.link.allreduce_s(n, once)
        return seconds

    def _through_leaders_s(self, plan: BucketPlan, payload_nbytes: int) -> float:
        assert self.node_link is not None
        assert self.leader_link is not None
        nodes, size = plan.place.num_nodes, max(2, round(plan.place.num_ranks / plan.place.num_nodes))
        inside = self.node_link.gather_to_first_s(size, plan.numel * 4 + plan.dense_nbytes)
        back = self.node_link.gather_to_first_s(size, nodes * payload_nbytes + plan.dense_nbytes)
        between = self.leader_link.allgather_s(nodes, payload_nbytes)
        if plan.is_reduced:
            between += self.leader_link.allreduce_s(nodes, plan.dense_nbytes)
        return inside + back + between

    def _work_s(self, plan: BucketPlan) -> float:
        speed = self.speed
        whole = plan.numel - plan.sparse_numel
        seconds = whole * speed.average_s
        if plan.dense_dtype.itemsize < 4:
            seconds += 4 * plan.dense_numel * speed.clear_s  # conversions there and back, and the rounding error
        if not plan.count:
            return seconds
        seconds += speed.overhead_s + plan.sparse_numel * speed.select_s + plan.count * speed.select_more_s
        seconds += plan.numel * speed.clear_s
        if plan.route == "balanced":
            assert plan.returned is not None
            arriving = plan.num_ranks * plan.returned.count
            seconds += speed.overhead_s + plan.sparse_numel * speed.scan_s + plan.count * speed.add_s
        elif plan.route == "hierarchical":
            arriving = plan.place.num_nodes * plan.count
        elif plan.route == "dense":
            arriving = plan.count
            seconds += 2 * plan.sparse_numel * speed.clear_s
        else:
            arriving = plan.num_ranks * plan.count
        return seconds + arriving * speed.add_s


def measure_speed(group: dist.ProcessGroup, device: torch.device) -> Speed:
    """Times the work on a quarter of a million entries; the same result on every rank. Collective."""
    numel = _PROBE_NUMEL
    gradient, u, v = (torch.randn(numel, device=device) for _ in range(3))
    few, many = numel // 1000, numel // 10
    tables = {k: torch.tensor([[0, numel, k]], device=device) for k in (few, many)}
    tiny = torch.tensor([[0, 64, 1]], device=device)
    values, indices = ops.topk_abs(gradient, many)

    def sparsify(k: int) -> Callable[[], object]:
        return lambda: ops.dgc_sparsify_segments_(gradient, u, v, tables[k], k, momentum=0.9)

    def average() -> None:
        ops.scale_(gradient, 0.5)
        ops.momentum_step_(gradient, u, momentum=0.9)

    measured = {
        "average_s": least_seconds(average, device) / numel,
        "few": least_seconds(sparsify(few), device) / numel,
        "many": least_seconds(sparsify(many), device) / numel,
        "scan_s": least_seconds(lambda: ops.topk_abs_interleaved(v, few // 4, 4), device) / numel,
        "add_s": least_seconds(lambda: ops.scatter_add_(u, indices, values), device) / many,
        "clear_s": least_seconds(lambda: u.zero_(), device) / numel,
        "overhead_s": 4
        * least_seconds(lambda: ops.dgc_sparsify_segments_(gradient, u[:64], v[:64], tiny, 1, momentum=0.9), device),
    }
    told = gather_json(measured, group, device)
    agreed = {name: max(other[name] for other in told) for name in measured}
    few_s, many_s = agreed.pop("few"), agreed.pop("many")
    return Speed(select_s=few_s, select_more_s=max(0.0, (many_s - few_s) * numel / (many - few)), **agreed)

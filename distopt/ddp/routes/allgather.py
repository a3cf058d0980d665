"""One phase: every rank sends its entries to all, and the dense part is all-reduced beside them or travels with them.

At most two collectives, of sizes known beforehand, started from the hook in bucket order; the callback behind them only
computes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.futures import Future

from distopt.comm import Channels, all_gather, all_reduce_sum, await_at_exit
from distopt.ddp.contribution import Contribution, NonFiniteSlotError, add_dense_part, nothing, select
from distopt.ddp.inflight import InFlight
from distopt.ddp.statistics import Statistics


def send(
    item: InFlight, channels: Channels, statistics: Statistics, land: Callable[[InFlight, Exception | None], None]
) -> None:
    """Launches the bucket. See `distopt.ddp.routes`."""
    plan = item.plan
    with statistics.selecting():
        made = item.contribution = _contribute(item)
    futures: list[Future[Any]] = []
    gathered = None
    with statistics.launching():
        if plan.layout is not None:
            count = plan.layout.count  # 0 if only the status is gathered
            dense = made.dense if plan.layout.num_dense else None
            payload = plan.layout.pack(item.header, made.indices[:count], made.values[:count], dense)
            gathered, future = all_gather(payload, channels.world)
            futures.append(future)
        if plan.is_reduced:
            item.reduced = made.dense
            futures.append(all_reduce_sum(made.dense, channels.world))

    def arrived(done: Future[list[Future[Any]]]) -> None:
        try:
            done.value()  # raises what a collective raised
            if plan.layout is not None and gathered is not None:
                item.headers = [plan.layout.unpack_header(payload) for payload in gathered]
                if plan.layout.count:
                    item.arrived = [plan.layout.unpack(payload) for payload in gathered]
                if plan.layout.num_dense:
                    item.reduced = _add_up(plan.layout.unpack_dense(gathered))
        except Exception as error:
            land(item, error)
            return
        land(item, None)

    if plan.route == "allgather" and not item.buffer.is_cuda:  # (there the callback has a stream of its own)
        item.clear_update()  # while the network is busy: nothing of the gradient is needed any more
    await_at_exit(arrived)
    torch.futures.collect_all(futures).then(arrived)


def _add_up(shares: Tensor) -> Tensor:
    """The sum of the rows in rank order, in no less than float32: the same bits on every rank."""
    total = shares[0].to(torch.promote_types(shares.dtype, torch.float32), copy=True)
    for share in shares[1:]:
        total += share
    return total


def _contribute(item: InFlight) -> Contribution:
    plan, groups, buffer = item.plan, item.groups, item.buffer
    if item.header.nonfinite:
        return nothing(plan, buffer)
    item.take_snapshots()
    made = Contribution.empty(buffer)
    if not item.takes:
        if plan.count:
            made.indices, made.values = select(plan, groups, buffer)
        add_dense_part(plan, groups, buffer, made)
        return made
    try:
        add_dense_part(plan, groups, buffer, made, checks=True)
        if plan.count:
            made.indices, made.values = select(plan, groups, buffer, takes=True)
            item.gradients_are_taken()
        return made
    except NonFiniteSlotError as found:
        item.found_nonfinite(found.position)
        return nothing(plan, buffer)

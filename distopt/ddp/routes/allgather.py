"""One phase: every rank sends its entries to all, and the dense part is all-reduced beside them.

At most two collectives, of sizes known beforehand, started from the hook in bucket order; the callback behind them only
computes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.futures import Future

from distopt.comm import Channels, all_gather, all_reduce_sum, await_at_exit
from distopt.ddp.contribution import Contribution, add_dense_part, nothing, select
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
            payload = plan.layout.pack(item.header, made.indices[:count], made.values[:count])
            gathered, future = all_gather(payload, channels.world)
            futures.append(future)
        if plan.dense_numel:
            item.reduced = made.dense
            futures.append(all_reduce_sum(made.dense, channels.world))

    def arrived(done: Future[list[Future[Any]]]) -> None:
        try:
            done.value()  # raises what a collective raised
            if plan.layout is not None and gathered is not None:
                item.headers = [plan.layout.unpack_header(payload) for payload in gathered]
                if plan.layout.count:
                    item.arrived = [plan.layout.unpack(payload) for payload in gathered]
        except Exception as error:
            land(item, error)
            return
        land(item, None)

    await_at_exit(arrived)
    torch.futures.collect_all(futures).then(arrived)


def _contribute(item: InFlight) -> Contribution:
    if item.header.nonfinite:
        return nothing(item.plan, item.buffer)
    item.take_snapshots()
    made = Contribution.empty(item.buffer)
    if item.plan.count:
        made.indices, made.values = select(item.plan, item.groups, item.buffer)
    add_dense_part(item.plan, item.groups, item.buffer, made)
    return made

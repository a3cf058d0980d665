"""Dense inside a node, sparse between nodes: only the nodes' leaders compress, and only they use the network.

1. Inside each node the gradients are summed to its first rank, the leader; likewise the dense parts.
2. The leader selects from the sum. It alone holds u and v of the node: everything that a memory does is linear, so the
   sum over the ranks is what it would be if each had its own, and the others hold zeros. What the others have kept from
   before (momentum that was taken over, a dense step, another route, a checkpoint) is added to the leader's, once.
3. The leaders all-gather their entries and all-reduce the dense part.
4. Inside each node the leader hands on what arrived, and every rank decodes it.

The ranks' status goes to all, in an all-gather of its own.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.comm import Channels, all_gather, all_reduce_sum, broadcast_from_first, reduce_to_first
from distopt.compress import Header
from distopt.ddp.contribution import Contribution, add_dense_part, select, zeros_for_dense_part
from distopt.ddp.inflight import InFlight
from distopt.ddp.statistics import Statistics
from distopt.spans import span


def send(
    item: InFlight, channels: Channels, statistics: Statistics, land: Callable[[InFlight, Exception | None], None]
) -> None:
    """Launches the bucket. See `distopt.ddp.routes`."""
    plan, buffer = item.plan, item.buffer
    assert plan.layout is not None
    with statistics.selecting():
        item.contribution = Contribution.empty(buffer)
        item.take_snapshots()
        if item.header.nonfinite:
            buffer.zero_()
            item.contribution.dense = zeros_for_dense_part(plan, buffer)
        else:
            add_dense_part(plan, item.groups, buffer, item.contribution)
    with statistics.launching():
        nobody = item.contribution
        status, told = all_gather(plan.layout.pack(item.header, nobody.indices, nobody.values), channels.world)

    def phases() -> None:
        try:
            with span("ddp", "exchange"):
                _through_leaders(item, channels, statistics)
                told.wait()
                assert plan.layout is not None
                item.headers = [plan.layout.unpack_header(row) for row in status]
        except Exception as error:
            land(item, error)
            return
        land(item, None)

    channels.worker.submit(phases)


def _through_leaders(item: InFlight, channels: Channels, statistics: Statistics) -> None:
    plan, made = item.plan, item.contribution
    assert channels.node is not None
    assert plan.returned is not None
    assert made is not None
    # 1. To the leader. Sums of 16-bit gradients are made in float32.
    gradients = item.buffer.to(torch.promote_types(item.buffer.dtype, torch.float32))
    reduce_to_first(gradients, channels.node)
    if plan.dense_numel:
        reduce_to_first(made.dense, channels.node)
    shape = (plan.place.num_nodes, plan.returned.nbytes)
    payloads = torch.empty(shape, dtype=torch.uint8, device=gradients.device)
    _put_memories_together(item, channels.node, statistics)
    if channels.leaders is not None:
        # 2. and 3. Among the leaders.
        payloads.copy_(_among_leaders(item, gradients, channels, statistics))
    else:
        for slot in plan.sparse:
            slot.tracked.memory.sit_out_()
    # 4. To all ranks of the node.
    broadcast_from_first(payloads, channels.node)
    if plan.dense_numel:
        broadcast_from_first(made.dense, channels.node)
        item.reduced = made.dense
    for payload in payloads:
        plan.returned.unpack_header(payload)
        item.arrived.append(plan.returned.unpack(payload))


def _put_memories_together(item: InFlight, node: dist.ProcessGroup, statistics: Statistics) -> None:
    """Sums u and v of the node's ranks to the leader where that has not been done, and clears the others'."""
    for group in item.groups.sparse:
        memories = [slot.tracked.memory for slot in group.slots]
        if all(memory.at_leader for memory in memories):
            continue
        for tensor in group.memory.tensors().values():
            wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            reduce_to_first(wide, node)
            if item.plan.place.leads:
                tensor.copy_(wide)
            else:
                tensor.zero_()
                statistics.add(node_bytes_sent=wide.nbytes)
        for memory in memories:
            memory.at_leader = True


def _among_leaders(item: InFlight, gradients: Tensor, channels: Channels, statistics: Statistics) -> Tensor:
    plan, made = item.plan, item.contribution
    assert channels.leaders is not None
    assert plan.returned is not None
    assert made is not None
    with statistics.selecting():
        indices, values = select(plan, item.groups, gradients)
    payload = plan.returned.pack(Header(step=item.header.step), indices, values)
    gathered, done = all_gather(payload, channels.leaders)
    if plan.dense_numel:
        all_reduce_sum(made.dense, channels.leaders).wait()
    done.wait()
    return gathered

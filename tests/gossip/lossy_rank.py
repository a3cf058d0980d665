"""A transport that loses messages, and what each rank of an average over it does."""

import numpy as np
import torch
import torch.distributed as dist

from distopt.comm import GlooTransport
from distopt.gossip import Exponential, RandomMatchings
from distopt.gossip.lossy import CommittedPairs, CumulativePushSum

NODES, SIZE, LOSS = 12, 4, 0.1
VALUES = torch.from_numpy(np.random.default_rng(0).standard_normal((NODES, SIZE)) + 3.0)


class Losing:
    """A transport that loses frames by chance."""

    def __init__(self, inner, seed):
        self._inner, self._random = inner, np.random.default_rng(seed)
        self.rank, self.size = inner.rank, inner.size
        self.is_losing, self.lost_frames = True, 0

    def send(self, destination, frame):
        if self.is_losing and self._random.random() < LOSS:
            self.lost_frames += 1
        else:
            self._inner.send(destination, frame)

    def receive(self, timeout_s):
        return self._inner.receive(timeout_s or 0.0)


def averaged(kind, rounds):
    """The rank's estimate, and how many of its frames were lost. Ranks go at their own pace."""
    rank, size = dist.get_rank(), dist.get_world_size()
    inner = GlooTransport(max_frame_bytes=1024)
    transport = Losing(inner, (3, rank))
    node = kind(transport, VALUES[rank])
    topology = RandomMatchings() if kind is CommittedPairs else Exponential()
    for number in range(rounds):
        receivers = topology.graph(size, number).receivers(rank)
        node.send([other for other in receivers if other > rank] if kind is CommittedPairs else receivers)
        node.listen(0.002)
    if kind is CommittedPairs:
        open_deals = torch.ones(1)
        while open_deals:  # messages go on being lost meanwhile
            node.settle()
            node.listen(0.05)
            open_deals.fill_(not node.settled)
            dist.all_reduce(open_deals)
    else:
        transport.is_losing = False  # the last message of each has to arrive, and is the next one's difference
        last = topology.graph(size, rounds)
        node.send(last.receivers(rank))
        others = last.senders(rank)
        while isinstance(node, CumulativePushSum) and any(node._heard[each][0] <= rounds for each in others):
            node.listen(0.05)
    dist.barrier()
    node.listen(0.5)
    dist.barrier()
    inner.close(10.0)
    return node.estimate, transport.lost_frames

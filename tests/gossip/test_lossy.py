"""Averages while a tenth of all messages is lost: what keeps the mean, and what does not."""

import lossy_rank
import pytest
import torch
from lossy_rank import NODES, SIZE, VALUES, Losing

from distopt.comm import InProcess, Message
from distopt.comm.message import encode
from distopt.gossip import Exponential, RandomMatchings
from distopt.gossip.lossy import CommittedPairs, CumulativePushSum, PlainPairs, PlainPushSum

ROUNDS = 120


def averaged(kind, topology, seed, *, one_sided=False):
    """The nodes' estimates after many lossy rounds, and how many frames were lost."""
    transports = [Losing(end, (seed, rank)) for rank, end in enumerate(InProcess.connect(NODES))]
    nodes = [kind(transport, value) for transport, value in zip(transports, VALUES, strict=True)]
    for number in range(ROUNDS):
        graph = topology.graph(NODES, number)
        for node in nodes:
            receivers = graph.receivers(node.rank)
            node.send([other for other in receivers if other > node.rank] if one_sided else receivers)
        while sum(node.listen() for node in nodes):
            pass
    lost = sum(transport.lost_frames for transport in transports)
    assert lost > ROUNDS
    if kind is CommittedPairs:
        while not all(node.settled for node in nodes):  # messages go on being lost meanwhile
            for node in nodes:
                node.settle()
            while sum(node.listen() for node in nodes):
                pass
    return torch.stack([node.estimate for node in nodes])


def error(estimates):
    mean = VALUES.mean(0)
    return float((estimates.mean(0) - mean).norm() / mean.norm())


@pytest.mark.parametrize("seed", range(3))
def test_running_sums_and_committed_pairs_keep_the_mean(seed):
    mean = VALUES.mean(0).expand(NODES, SIZE)
    sums = averaged(CumulativePushSum, Exponential(), seed)
    assert error(sums) < 1e-12
    torch.testing.assert_close(sums, mean, rtol=0, atol=1e-11)
    pairs = averaged(CommittedPairs, RandomMatchings(), seed, one_sided=True)
    assert error(pairs) < 1e-12
    torch.testing.assert_close(pairs, mean, rtol=0, atol=0.1)  # deals that were open for long bring old values


def test_the_naive_ways_lose_it():
    """The negative controls: agreement on a wrong mean."""
    for kind, topology in ((PlainPushSum, Exponential()), (PlainPairs, RandomMatchings())):
        found = [averaged(kind, topology, seed) for seed in range(3)]
        assert max(error(each) for each in found) > 1e-3, kind.__name__
        for each in found:
            torch.testing.assert_close(each, each.mean(0).expand(NODES, SIZE), rtol=0, atol=1e-2)


@pytest.mark.parametrize("kind", [CumulativePushSum, CommittedPairs])
def test_between_real_ranks_they_keep_it_too(ranks, kind):
    estimates, lost = zip(*ranks(4)(lossy_rank.averaged, kind, ROUNDS), strict=True)
    assert sum(lost) > ROUNDS / 4
    mean = VALUES[:4].mean(0)
    assert float((torch.stack(estimates).mean(0) - mean).norm() / mean.norm()) < 1e-12
    torch.testing.assert_close(torch.stack(estimates), mean.expand(4, SIZE), rtol=0, atol=0.1)


def test_between_real_ranks_plain_push_sum_loses_it(ranks):
    estimates, lost = zip(*ranks(4)(lossy_rank.averaged, PlainPushSum, ROUNDS), strict=True)
    assert sum(lost) > ROUNDS / 4
    assert float((torch.stack(estimates).mean(0) - VALUES[:4].mean(0)).norm() / VALUES[:4].mean(0).norm()) > 1e-3


@pytest.mark.parametrize("kind", [CumulativePushSum, CommittedPairs])
def test_garbage_and_copies_change_nothing(kind):
    ends = InProcess.connect(2)
    nodes = [kind(end, value) for end, value in zip(ends, VALUES, strict=False)]
    sent = []
    for end in ends:
        end.send_before = end.send

        def send(destination, frame, end=end):
            sent.append((end, destination, frame))
            end.send_before(destination, frame)

        end.send = send
    for _ in range(5):
        nodes[0].send([1])
        if kind is CumulativePushSum:
            nodes[1].send([0])
        for end, destination, frame in sent:
            end.send_before(destination, frame)  # all that was ever sent, once more
        ends[0].send_before(1, torch.zeros(100, dtype=torch.uint8))
        for tensors in ((), (torch.zeros(1).double(),), (torch.zeros(SIZE),), (torch.zeros(SIZE + 9).double(),)):
            for message_kind in (1, 2, 3):
                ends[0].send_before(1, encode(Message(message_kind, 10**6, 0, tensors)))
        while sum(node.listen() for node in nodes):
            pass
    estimates = torch.stack([node.estimate for node in nodes])
    torch.testing.assert_close(estimates, VALUES[:2].mean(0).expand(2, SIZE), rtol=0, atol=1e-12)

"""What ranks run for the tests of their exchange."""

import torch
import torch.distributed as dist

from distopt.comm.crew.interruption import BrokenError
from distopt.comm.crew.staging import Staging
from distopt.gossip.ranks import rank_mixer
from distopt.gossip.topology import Topology


def mixed_both_ways(described, numel):
    """How far averaging in place is from what `mix` makes, and both from what the weights say."""
    rank, size = dist.get_rank(), dist.get_world_size()
    graph = Topology.from_dict(described).graph(size)
    everything = torch.randn(size, numel, generator=torch.Generator().manual_seed(0))
    beside = torch.arange(size, dtype=torch.float64).view(size, 1).repeat(1, 3)
    kept = rank_mixer._PIECE_BYTES, rank_mixer._BLOCK
    rank_mixer._PIECE_BYTES, rank_mixer._BLOCK = 4096, 1000  # so that there are many, and some that are not full
    try:
        staging, rows = Staging(), everything[rank : rank + 1].clone()
        first, second = (
            rank_mixer.RankMixer(dist.group.WORLD, rank, graph, number, staging, 60.0) for number in range(2)
        )
        apart, told = first.mix(rows, beside[rank : rank + 1])
        (also_told,) = second.mix_(rows, beside[rank : rank + 1])
    finally:
        rank_mixer._PIECE_BYTES, rank_mixer._BLOCK = kept
    weights = torch.from_numpy(graph.weights.copy())
    torch.testing.assert_close(rows, (weights @ everything.double())[rank : rank + 1].float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(also_told, (weights @ beside)[rank : rank + 1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(apart, rows, rtol=1e-6, atol=1e-7)
    assert torch.equal(told, also_told)
    return first.bytes_sent, second.bytes_sent


def mixed_with_one_who_goes(numel):
    """Whether the rows of a rank are what they were after an exchange in which another went half-way."""
    rank, size = dist.get_rank(), dist.get_world_size()
    graph = Topology.from_dict({"topology": "ring"}).graph(size)
    rows = torch.randn(1, numel, generator=torch.Generator().manual_seed(rank))
    before = rows.clone()
    kept = rank_mixer._PIECE_BYTES, rank_mixer._BLOCK
    rank_mixer._PIECE_BYTES, rank_mixer._BLOCK = 4096, 1000
    averaged = []

    class Breaking(rank_mixer.RankMixer):
        def _wait(self, works, broken):
            super()._wait(works, broken)
            averaged.append(not torch.equal(rows, before))
            if len(averaged) == 4:
                broken.add(0)

    try:
        Breaking(dist.group.WORLD, rank, graph, 0, Staging(), 60.0).mix_(rows)
    except BrokenError:
        return any(averaged), torch.equal(rows, before)
    finally:
        rank_mixer._PIECE_BYTES, rank_mixer._BLOCK = kept
    return "nothing broke"

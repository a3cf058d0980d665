"""What ranks run for the test of the mean model."""

import gossip_rank
import torch
from torch import nn

from distopt.gossip import Gossip


class TiedWithBuffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 3)
        self.last.bias.requires_grad_(False)

    def forward(self, x):
        return self.last(self.norm(self.second(torch.tanh(self.first(x)))))


def mean_and_own(buffers):
    """The mean state, this rank's own before and after, and what gossip says."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(rank)
    model = TiedWithBuffers().double()
    optimizer = gossip_rank.make_optimizer([p for p in model.parameters() if p.requires_grad])
    given = gossip_rank.batches(size)
    with Gossip(topology="ring", buffers=buffers, every=2).attach(model, optimizer) as attached:
        for number in range(3):
            gossip_rank.step(model, optimizer, given.of(rank, number))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        mean = attached.mean_state_dict()
        after = {name: value.clone() for name, value in model.state_dict().items()}
        again = TiedWithBuffers().double()
        again.load_state_dict(mean)
        assert again.first.weight is again.second.weight
    return {name: value.detach() for name, value in mean.items()}, before, after

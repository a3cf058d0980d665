"""What ranks must agree in before they meet: else gloo would end the process, or averages mix what does not belong."""

import torch
from torch import nn

import distopt
from distopt.gossip.introduction import facts


def told(features, **options):
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_buffer("statistics", torch.zeros(features))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return facts(distopt.Gossip(**options), model, optimizer, has_scaler=False, taken=set(), num_ranks=2)["model"]


def test_buffers_that_are_averaged_must_be_of_one_shape():
    assert told(3) == told(3)
    assert told(3) != told(5)
    assert told(3, buffers="keep") == told(5, buffers="keep")

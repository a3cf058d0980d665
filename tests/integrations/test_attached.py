"""What the adapters share gives everything back, also where the end of a run fails."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt.integrations.attached import Attached


def end_badly():
    model = DistributedDataParallel(nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    attached = Attached(distopt.DGC(density=0.5), model, optimizer)
    taken = optimizer.param_groups[0]["momentum"]
    attached.at_end(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attached.detach()
    distopt.DGC(density=0.5).attach(model, optimizer).detach()  # the place is free
    return taken, optimizer.param_groups[0]["momentum"]


def test_an_end_that_fails_gives_the_optimizer_back(ranks):
    assert ranks(2)(end_badly) == [(0.0, 0.9)] * 2

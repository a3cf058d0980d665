"""What ranks run for the tests of local steps."""

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from distopt.config import Algorithm
from distopt.gossip import NodeBatches

_rng = np.random.default_rng(0)
INPUTS = torch.from_numpy(_rng.standard_normal((240, 6)).astype("float32"))
LABELS = (INPUTS[:, 0] > 0).long() + (INPUTS[:, 1] > 0).long()


def make_model():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def make_plain():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(nodes):
    return NodeBatches((INPUTS, LABELS), np.array_split(np.arange(240), nodes), 10, seed=3)


def flat(tensors):
    return torch.cat([each.detach().reshape(-1) for each in tensors])


def step(model, optimizer, batch):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def theta_of(attached):
    return torch.cat([each.fragment.theta for each in attached._pieces]).clone()


def residual_of(attached):
    residuals = [each.fragment.residual for each in attached._pieces]
    return torch.cat([torch.zeros_like(p.fragment.theta) if r is None else r.clone()
                      for p, r in zip(attached._pieces, residuals, strict=True)])  # fmt: skip


def trained(described, steps, *, make=make_model, lr=0.05, momentum=0.9, observer=None):
    """This rank's model, theta, residual and numbers after the steps; the ranks' models differ before."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    given = batches(size)
    with Algorithm.from_dict(described).attach(model, optimizer) as attached:
        heard = None if observer is None else observer()
        if heard is not None:
            attached.observe_gradients(heard)
        for number in range(steps):
            step(model, optimizer, given.of(rank, number))
        attached.flush()
        return {
            "model": flat(model.parameters()),
            "buffers": [each.clone() for each in model.buffers()],
            "theta": theta_of(attached),
            "residual": residual_of(attached),
            "stats": attached.stats(),
            "heard": None if heard is None else heard.heard,
        }


def counted(described, steps):
    """What the numbers say this rank has put on the link, and what its sends were given."""
    from distopt.comm.crew.point_to_point import Messages

    passed, original = [], Messages._begin

    def begin(self, place, operation, tensor):
        if operation.__name__ == "send":
            passed.append(tensor.nbytes)
        original(self, place, operation, tensor)

    Messages._begin = begin
    try:
        found = trained(described, steps)
    finally:
        Messages._begin = original
    return found["stats"], sum(passed)


class Sum:
    """Adds up the pseudo-gradients of this rank."""

    def __init__(self):
        self.heard = {"begun": 0, "ended": 0, "local": 0.0, "mean": 0.0}

    def begin(self):
        self.heard["begun"] += 1
        return True

    def local(self, parameters, gradients):
        assert [p.shape for p in parameters] == [g.shape for g in gradients]
        self.heard["local"] = self.heard["local"] + flat(gradients).clone()

    def mean(self, parameters, gradients):
        self.heard["mean"] = self.heard["mean"] + flat(gradients).clone()

    def end(self):
        self.heard["ended"] += 1


def deltas(described, steps):
    torch.manual_seed(0)
    start = flat(make_model().parameters())
    found = trained(described, steps, observer=Sum)
    return {"deltas": found["heard"]["local"], "start": start, **found}

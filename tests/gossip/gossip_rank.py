"""What ranks run for the gossip tests."""

import copy
import os

import numpy as np
import torch
from torch import nn

from distopt.gossip import Gossip, NodeBatches

_rng = np.random.default_rng(0)
INPUTS = torch.from_numpy(_rng.standard_normal((240, 6)))
LABELS = (INPUTS[:, 0] > 0).long() + (INPUTS[:, 1] > 0).long()


def make_model():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches(nodes):
    return NodeBatches((INPUTS, LABELS), np.array_split(np.arange(240), nodes), 10, seed=3)


def make_optimizer(parameters, momentum=0.0, lr=0.1):
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum)


def flat(model):
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def step(model, optimizer, batch):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def trained(described, steps, momentum=0.0, seed=0):
    """The rank's parameters after the steps, and its numbers."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(seed + rank)
    model = make_model()
    optimizer = make_optimizer(model.parameters(), momentum)
    given = batches(size)
    with Gossip.from_dict(described).attach(model, optimizer) as attached:
        for number in range(steps):
            step(model, optimizer, given.of(rank, number))
        attached.flush()
        stats = attached.stats()
    return flat(model), stats


def resumed(described, steps, path):
    """Like `trained`, but the second half by another attachment that takes the state of the first."""
    import distopt

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(rank)
    model = make_model()
    optimizer = make_optimizer(model.parameters(), 0.5)
    given, gossip = batches(size), Gossip.from_dict(described)
    attached = gossip.attach(model, optimizer)
    for number in range(steps // 2):
        step(model, optimizer, given.of(rank, number))
    distopt.checkpoint.save(attached, path)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    torch.distributed.barrier()
    attached.detach()
    model = make_model()
    optimizer = make_optimizer(model.parameters(), 0.5)
    model.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    attached = gossip.attach(model, optimizer)
    distopt.checkpoint.load(attached, path)
    for number in range(steps // 2, steps):
        step(model, optimizer, given.of(rank, number))
    attached.flush()
    attached.detach()
    return flat(model)


# -- models and loops that users have ----------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Mixed(nn.Module):
    """Two dtypes, a frozen parameter and one that no loss reaches."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6).double()
        self.last = nn.Linear(6, 3)
        self.frozen = nn.Parameter(torch.full((3,), float(torch.distributed.get_rank())), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)).float()).double()


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 2)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Linear(8, 3)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        x = x.view(-1, 2, 1, 3).expand(-1, 2, 2, 3).contiguous(memory_format=torch.channels_last)
        return self.last(torch.relu(self.norm(self.first(x))).flatten(1))


class Overlapping(nn.Module):
    """Two parameters in one piece of memory."""

    def __init__(self):
        super().__init__()
        whole = torch.randn(9, 6, dtype=torch.float64)
        self.first = nn.Parameter(whole[:6])
        self.second = nn.Parameter(whole[6:])

    def forward(self, x):
        return torch.tanh(x @ self.first.T) @ self.second.T


MODELS = {
    "tied": lambda: Tied().double(),
    "mixed": Mixed,
    "convolutions": lambda: Convolutions().double(),
    "overlapping": Overlapping,
}


def of_model(name, described, steps):
    """What gossip makes of a model on all ranks, against a plain average after each step; what detach leaves behind."""
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    model = MODELS[name]()
    expected = copy.deepcopy(model)
    given = batches(size)
    optimizers = [make_optimizer(each.parameters(), 0.5) for each in (model, expected)]
    strides = [p.stride() for p in model.parameters()]
    attached = Gossip.from_dict(described).attach(model, optimizers[0])
    for number in range(steps):
        step(model, optimizers[0], given.of(rank, number))
        step(expected, optimizers[1], given.of(rank, number))
        with torch.no_grad():
            for tensor in [*expected.parameters(), *expected.buffers()]:
                if tensor.is_floating_point() and (tensor.requires_grad or not isinstance(tensor, nn.Parameter)):
                    dist.all_reduce(tensor)
                    tensor.div_(size)
    views = attached.stats()["views"]
    attached.detach()
    for (key, found), wanted in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    assert [p.stride() for p in model.parameters()] == strides
    pointers = {p.untyped_storage().data_ptr() for p in model.parameters()}
    step(model, optimizers[0], given.of(rank, steps))  # goes on alone
    return views, len(pointers), len(list(model.parameters()))


class FakeScaler:
    """Skips the steps that it is told to, as a GradScaler does after an overflow on one rank."""

    def __init__(self, skips):
        self.skips, self.calls = skips, 0

    def step(self, optimizer):
        self.calls += 1
        return None if self.calls in self.skips else optimizer.step()


def with_skipped_steps(described, steps):
    """Each rank skips another step; nobody waits for ever."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(rank)
    model = make_model()
    optimizer, scaler = make_optimizer(model.parameters()), FakeScaler({rank + 1})
    given = batches(size)
    with Gossip.from_dict(described).attach(model, optimizer, scaler=scaler) as attached:
        for number in range(steps):
            optimizer.zero_grad()
            batch = given.of(rank, number)
            nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
            scaler.step(optimizer)
        stats = attached.stats()
    assert "step" not in vars(scaler)
    return flat(model), stats["steps"], stats["exchanges"]


def consensus(described):
    rank = torch.distributed.get_rank()
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float(rank))
    with Gossip.from_dict(described).attach(model, make_optimizer(model.parameters())) as attached:
        return attached.consensus_distance(), sum(p.numel() for p in model.parameters())


def refused(case):
    """What is said to a user who gives something that cannot work."""
    from distopt.errors import DistoptError

    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    gossip = Gossip()
    try:
        if case == "ddp":
            gossip.attach(nn.parallel.DistributedDataParallel(model), optimizer)
        elif case == "a part in ddp":
            wrapped = nn.Sequential(nn.parallel.DistributedDataParallel(model))
            gossip.attach(wrapped, optimizer)
        elif case == "another optimizer":
            gossip.attach(model, make_optimizer(make_model().parameters()))
        elif case == "momentum":
            gossip = Gossip(topology="ring", mixing="quasi-global-momentum")
            gossip.attach(model, make_optimizer(model.parameters(), 0.9))
        elif case == "another model on rank 1":
            if rank == 1:
                model = nn.Linear(3, 3)
                optimizer = make_optimizer(model.parameters())
            gossip.attach(model, optimizer)
        elif case == "another configuration on rank 1":
            Gossip(every=1 + rank).attach(model, optimizer)
        elif case == "wrong number of ranks":
            from distopt.gossip import EdgeList

            Gossip(topology=EdgeList(edges=((0, 1), (1, 2)))).attach(model, optimizer)
        elif case == "another secret on rank 1":
            os.environ["DISTOPT_JOB_SECRET"] = "rank 1 has this secret" if rank else "and rank 0 another"
            gossip.attach(model, optimizer)
        elif case == "no address of rank 1":
            gossip.attach(model, optimizer, interface="192.0.2.1" if rank else None)
        elif case == "complex":
            model = nn.Linear(2, 2, dtype=torch.complex64)
            gossip.attach(model, make_optimizer(model.parameters()))
    except DistoptError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        os.environ.pop("DISTOPT_JOB_SECRET", None)
    return "nothing"

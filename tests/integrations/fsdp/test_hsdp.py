"""HSDP on 2 x 2 gloo ranks: equal to FSDP2's own at density 1, replicas equal below, resumed to the bit, refusals."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import distopt
from distopt.integrations import fsdp

STEPS = 6


def mesh_of(*sizes):
    return init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[: len(sizes)])


def make_model(mesh, **options):
    """Shards of unequal size, and a bias of one element that the second rank has nothing of."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def make_optimizer(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, **options})


def train(model, optimizer, steps=STEPS, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        model(torch.randn(4, 9, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(model):
    """All parameters, of all shards of this replica."""
    return [p.full_tensor().detach().clone() for p in model.parameters()]


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def far(ours, theirs):
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def hsdp(**options):
    """What FSDP2's own HSDP makes of the same steps."""
    model = make_model(mesh_of(2, 2))
    optimizer = make_optimizer(model, **options)
    train(model, optimizer)
    return whole(model)


def against_hsdp(algorithm, **options):
    """How far from FSDP2's own, for the momentum given."""
    own = hsdp(**options)
    mesh = mesh_of(2, 2)
    model = make_model(mesh["shard"])
    optimizer = make_optimizer(model, **options)
    with fsdp.attach(model, optimizer, algorithm, mesh=mesh) as attachment:
        train(model, optimizer)
        return far(whole(model), own), attachment.stats()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.0, "weight_decay": 0.0}, {"nesterov": True}])
@pytest.mark.parametrize("algorithm", [distopt.Dense(), distopt.TopK(density=1.0), distopt.DGC(density=1.0)])
def test_density_1_is_dense_hsdp(ranks, algorithm, options):
    for distance, stats in ranks(4)(against_hsdp, algorithm, **options):
        if isinstance(algorithm, distopt.DGC) and options.get("momentum", 0.9):
            assert distance <= 1e-6  # momentum of gradient and of decay are kept apart, and added
        else:
            assert distance == 0.0
        assert stats["steps"] == STEPS
        assert stats["world_size"] == 2


def handed_over():
    """Attached after a dense half, whose momentum is in the optimizer; then detached, and dense again."""
    own = hsdp()
    mesh = mesh_of(2, 2)
    model = make_model(mesh["shard"])
    optimizer = make_optimizer(model)
    with fsdp.attach(model, optimizer, distopt.Dense(), mesh=mesh):
        train(model, optimizer, 2)
    with fsdp.attach(model, optimizer, distopt.DGC(density=1.0), mesh=mesh):
        train(model, optimizer, 2, start=2)
    train(model, optimizer, STEPS - 4, start=4)
    return far(whole(model), own)


def test_momentum_is_taken_over_and_given_back(ranks):
    assert max(ranks(4)(handed_over)) <= 1e-6


def replicas(algorithm):
    mesh = mesh_of(2, 2)
    model = make_model(mesh["shard"])
    optimizer = make_optimizer(model)
    with fsdp.attach(model, optimizer, algorithm, mesh=mesh) as attachment:
        train(model, optimizer)
        stats = attachment.stats()
        inside = whole(model)
    momenta = [type(optimizer.state[p].get("momentum_buffer")).__name__ for p in model.parameters()]
    train(model, optimizer)  # dense from here on
    return inside, whole(model), stats, [g["momentum"] for g in optimizer.param_groups], momenta


@pytest.mark.parametrize("algorithm", [distopt.DGC(density=0.01), distopt.TopK(density=0.01)])
def test_replicas_stay_equal_also_after_detach(ranks, algorithm):
    told = ranks(4)(replicas, algorithm)
    for inside, after, stats, momentum, momenta in told:
        assert equal(inside, told[0][0])
        assert equal(after, told[0][1])
        assert not equal(inside, after)
        assert momentum == [0.9]
        assert momenta.count("DTensor") >= 4  # a rank with nothing of the last layer has no momentum of it
        # A gradient of this shard's elements in fp32, in each step; a sparse one is smaller.
        assert stats["bytes_dense"] == 4 * STEPS * (stats["entries_compressed"] + stats["entries_sent_whole"])
        assert 0 < stats["last"]["entries_sent"] < stats["entries_compressed"]
    shards = [stats["entries_compressed"] + stats["entries_sent_whole"] for _, _, stats, _, _ in told]
    assert shards[0] == shards[2] > shards[1] == shards[3]
    assert shards[0] + shards[1] == sum(p.numel() for p in told[0][0])


def resumed(algorithm):
    mesh = mesh_of(2, 2)
    model = make_model(mesh["shard"])
    optimizer = make_optimizer(model)
    with fsdp.attach(model, optimizer, algorithm, mesh=mesh) as attachment:
        train(model, optimizer)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), attachment.state_dict()))
        train(model, optimizer, start=STEPS)
        uninterrupted = whole(model)
    model = make_model(mesh["shard"])
    model.load_state_dict(saved[0])
    optimizer = make_optimizer(model)
    with fsdp.attach(model, optimizer, algorithm, mesh=mesh) as attachment:
        optimizer.load_state_dict(saved[1])
        attachment.load_state_dict(saved[2])
        train(model, optimizer, start=STEPS)
        again = whole(model)
        other = {**saved[2], "shard": "7 of 8"}
        with pytest.raises(distopt.StateMismatchError, match=r"must be of shard . of 2, got 7 of 8; give each rank"):
            attachment.load_state_dict(other)
    return equal(uninterrupted, again)


@pytest.mark.parametrize("algorithm", [distopt.DGC(density=0.05), distopt.TopK(density=0.05)])
def test_resumed_is_uninterrupted(ranks, algorithm):
    assert ranks(4)(resumed, algorithm) == [True] * 4


def accumulated():
    """Two halves of a batch without a reduction between them are the batch."""
    found = []
    for halves in (False, True):
        mesh = mesh_of(2, 2)
        model = make_model(mesh["shard"])
        optimizer = make_optimizer(model)
        with fsdp.attach(model, optimizer, distopt.DGC(density=0.05), mesh=mesh) as attachment:
            batch = torch.randn(4, 9, generator=torch.Generator().manual_seed(dist.get_rank()))
            parts = batch.chunk(2) if halves else [batch]
            for number, part in enumerate(parts):
                model.set_requires_gradient_sync(number == len(parts) - 1)
                (model(part).square().mean() / len(parts)).backward()
            optimizer.step()
            found.append((whole(model), attachment.stats()["steps"]))
    (ours, ours_steps), (theirs, theirs_steps) = found
    return far(ours, theirs), ours_steps, theirs_steps


def test_accumulation(ranks):
    for distance, *steps in ranks(4)(accumulated):
        assert distance <= 1e-6
        assert steps == [1, 1]


def refusals():
    mesh = mesh_of(2, 2)
    told = {}

    def refused(name, make, algorithm=None, mesh=mesh):
        try:
            model = make()
            fsdp.attach(model, make_optimizer(model), algorithm or distopt.TopK(density=0.5), mesh=mesh).detach()
        except distopt.DistoptError as error:
            told[name] = f"{type(error).__name__}: {error}"

    def sharded(**options):
        return make_model(mesh["shard"], **options)

    def with_hook():
        model = sharded()
        model[0].set_all_reduce_hook(print)
        return model

    def divided():
        model = sharded()
        model.set_gradient_divide_factor(3.0)
        return model

    def unlike():
        model = sharded()
        with torch.no_grad():
            next(model.parameters()).to_local().add_(mesh.get_local_rank(0))
        return model

    refused("one dimension", sharded, mesh=mesh["shard"])
    refused("no mesh", sharded, mesh=None)
    refused("both dimensions", lambda: make_model(mesh))
    refused("other dimension", lambda: make_model(mesh["replicate"]))
    refused("not sharded", lambda: nn.Linear(2, 2))
    refused("hook", with_hook)
    refused("divided", divided)
    refused("bf16", lambda: sharded(mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)))
    refused("replicas", unlike)
    refused("clip", sharded, distopt.DGC(density=0.5, clip=1.0))
    refused("family", sharded, distopt.Gossip())
    refused("checkpoint", sharded, {"algorithm": "topk", "density": 0.5, "checkpoint": {}})
    model = sharded()
    optimizer = make_optimizer(model)
    with fsdp.attach(model, optimizer, distopt.TopK(density=0.5), mesh=mesh):
        try:
            fsdp.attach(model, optimizer, distopt.TopK(density=0.5), mesh=mesh)
        except distopt.DistoptError as error:
            told["twice"] = str(error)
        train(model, optimizer, 1)
        try:
            model[0](torch.ones(1, 9)).sum().backward()
            model[0](torch.ones(1, 9)).sum().backward()
        except distopt.DistoptError as error:
            told["a part of the model"] = str(error)
    return told


def test_refusals_say_what_to_change(ranks):
    for told in ranks(4)(refusals):
        for name, words in {
            "one dimension": "mesh must have two dimensions, replicas and shards, got 1 dimensions; use",
            "no mesh": "got NoneType; use",
            "both dimensions": 'use fully_shard(module, mesh=mesh["shard"])',
            "other dimension": "must be sharded over the second dimension of the mesh, ranks",
            "not sharded": "got Linear without; call fully_shard",
            "hook": "the all-reduce hook of FSDP must be free, got <built-in function print> on '0'",
            "divided": "got set_gradient_divide_factor on 'the model'",
            "bf16": "got torch.float32 and torch.bfloat16",
            "replicas": "seed all replicas alike, or load one checkpoint on all",
            "clip": "leave out clip",
            "family": "got 'gossip'; use one of these",
            "checkpoint": "got a table checkpoint; leave it out",
            "twice": "call detach() on the first",
            "a part of the model": "once, got '0' again before",
        }.items():
            assert words in told.get(name, "nothing was refused"), name

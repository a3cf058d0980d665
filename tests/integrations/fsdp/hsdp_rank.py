"""What the ranks of the HSDP tests do; importing FSDP takes long, so only they do."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

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


def resumed(algorithm, folder):
    mesh = mesh_of(2, 2)
    model = make_model(mesh["shard"])
    optimizer = make_optimizer(model)
    with fsdp.attach(model, optimizer, algorithm, mesh=mesh) as attachment:
        train(model, optimizer)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), attachment.state_dict()))
        distopt.checkpoint.save(attachment, folder)
        dist.barrier()
        train(model, optimizer, start=STEPS)
        uninterrupted = whole(model)
    model = make_model(mesh["shard"])
    model.load_state_dict(saved[0])
    optimizer = make_optimizer(model)
    with fsdp.attach(model, optimizer, algorithm, mesh=mesh) as attachment:
        optimizer.load_state_dict(saved[1])
        distopt.checkpoint.load(attachment, folder)
        train(model, optimizer, start=STEPS)
        again = whole(model)
        other = {**saved[2], "shard": "7 of 8"}
        with pytest.raises(distopt.StateMismatchError, match=r"must be of shard . of 2, got 7 of 8; give each rank"):
            attachment.load_state_dict(other)
    return equal(uninterrupted, again)


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

    def summed():
        model = sharded()
        model.set_force_sum_reduction_for_comms(True)
        return model

    def attached_before():
        model = sharded()
        fsdp.attach(model, make_optimizer(model), distopt.TopK(density=0.5), mesh=mesh).detach()
        model.set_gradient_divide_factor(3.0)
        return model

    refused("summed", summed)
    refused("attached before", attached_before)
    refused("offload", lambda: sharded(offload_policy=CPUOffloadPolicy(pin_memory=False)))
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
    model = sharded()
    with fsdp.attach(model, make_optimizer(model), distopt.DGC(density=0.5), mesh=mesh):
        try:
            for _ in range(2):
                model(torch.ones(1, 9)).sum().backward()
        except distopt.DistoptError as error:
            told["two backward passes"] = str(error)
    return told


def one_rank_differs(what, folder):
    """What each rank hears, and whether the optimizer is as it was."""
    mesh = mesh_of(2, 2)
    model = make_model(mesh["shard"])
    optimizer = make_optimizer(model)
    job = {"algorithm": "dgc", "density": 0.5, "log": {"folder": str(folder / "log")}}
    if dist.get_rank() == 3:
        if what == "weights":
            with torch.no_grad():
                next(model.parameters()).to_local().add_(1)
        elif what == "model":
            model.set_gradient_divide_factor(3.0)
        else:
            (folder / "file").touch()
            job["log"]["folder"] = str(folder / "file")
    try:
        fsdp.attach(model, optimizer, job, mesh=mesh)
    except distopt.DistoptError as error:
        return str(error), [group["momentum"] for group in optimizer.param_groups]
    return "attached", []

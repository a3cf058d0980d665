"""The hook fed by hand, as a host other than DDP does: the same updates as behind DDP."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training import DTYPES, SHAPES, Chosen, chosen_gradients, dgc

from distopt.ddp.bucket import FlatBucket
from distopt.ddp.hook import CommHook
from distopt.ddp.parameters import Hyperparameters, TrackedParameter
from distopt.ddp.routing import open_routes

NUM_STEPS = 6


def behind_ddp(algorithm) -> list[dict[str, torch.Tensor]]:
    model = DistributedDataParallel(Chosen())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    algorithm.attach(model, optimizer)
    updates = []
    for step in range(NUM_STEPS):
        model(chosen_gradients(step, 0, dist.get_rank(), DTYPES["fp32"])).backward()
        updates.append({name: p.grad.clone() for name, p in model.module.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    return updates


def by_hand(algorithm) -> list[dict[str, torch.Tensor]]:
    model = Chosen()
    named = dict(model.named_parameters())
    hyper = Hyperparameters(momentum=0.9)
    densities = algorithm.densities_for(named)
    tracked = [
        TrackedParameter(
            name=name,
            parameter=p,
            memory=algorithm.memory_for(p, densities[name] is None, hyper),
            density=densities[name],
            hyperparameters=hyper,
        )
        for name, p in named.items()
    ]
    policy = algorithm.step_policy(tracks_usage=False)
    routing, channels = open_routes(policy.wire, dist.group.WORLD, torch.device("cpu"))
    hook = CommHook(tracked, policy, channels, routing)
    names = list(SHAPES)
    updates = []
    for step in range(NUM_STEPS):
        gradients = chosen_gradients(step, 0, dist.get_rank(), DTYPES["fp32"])
        buckets = [
            FlatBucket([named[n] for n in part], [gradients[n] for n in part], index=i, last=i == 1)
            for i, part in enumerate((names[:5], names[5:]))
        ]
        futures = [hook(bucket) for bucket in buckets]
        found = {}
        for bucket, future, part in zip(buckets, futures, (names[:5], names[5:]), strict=True):
            assert torch.equal(future.wait(), bucket.buffer())
            found |= dict(zip(part, (g.clone() for g in bucket.gradients()), strict=True))
        updates.append(found)
    assert hook.step == NUM_STEPS
    return updates


def compare(algorithm) -> None:
    for step, (expected, found) in enumerate(zip(behind_ddp(algorithm), by_hand(algorithm), strict=True)):
        for name, update in expected.items():
            assert torch.equal(update, found[name]), (step, name)


def test_a_hook_fed_by_hand_does_what_it_does_behind_ddp(ranks):
    ranks(2)(compare, dgc())
    ranks(2)(compare, dgc(nonfinite="skip", values="fp16"))

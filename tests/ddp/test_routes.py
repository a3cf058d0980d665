"""The laws of the routes, on real ranks: mass is conserved, density 1 is dense, all ranks agree, faults are survived.

Gradients are small integers and momentum a power of two, so that what is summed in another order keeps its bits.
"""

import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import (
    Chosen,
    assert_same_on_all_ranks,
    chosen_gradients,
    error_of,
    memories_of,
    momentum_sgd,
    values_of,
)

import distopt
from distopt.compress import Header
from distopt.ddp import FlatBucket

SPARSE = ("allgather", "balanced", "hierarchical")


def attached(algorithm, *, momentum=0.0, nesterov=False, **options):
    model = DistributedDataParallel(Chosen(), **options)
    optimizer = momentum_sgd(model.parameters(), lr=2.0**-6, momentum=momentum, nesterov=nesterov)
    return model, optimizer, algorithm.attach(model, optimizer)


def total(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sums over the ranks, in float64."""
    sums = {name: tensor.double().clone() for name, tensor in tensors.items()}
    for tensor in sums.values():
        dist.all_reduce(tensor)
    return sums


def mass(algorithm, steps, momentum, nesterov, options):
    """Put in, sent and held, summed over all ranks and steps."""
    model, optimizer, attachment = attached(algorithm, momentum=momentum, nesterov=nesterov, **options)
    size = dist.get_world_size()
    put_in = {name: torch.zeros(p.shape) for name, p in model.module.named_parameters() if p.dim() > 1}
    updates = {name: torch.zeros(p.shape) for name, p in model.module.named_parameters() if p.dim() > 1}
    velocity = {name: torch.zeros_like(p) for name, p in put_in.items()}
    for step in range(steps):
        gradients = chosen_gradients(step, 0, dist.get_rank(), torch.float32)
        model(gradients).backward()
        for name in put_in:
            velocity[name] = momentum * velocity[name] + gradients[name]
            put_in[name] += momentum * velocity[name] + gradients[name] if nesterov else velocity[name]
            updates[name] += size * dict(model.module.named_parameters())[name].grad
        optimizer.step()
        optimizer.zero_grad()
    assert_same_on_all_ranks(values_of(model.module))
    held = {name: memory["v"] for name, memory in memories_of(attachment).items() if "v" in memory}
    taken = set(attachment.stats()["routes"])
    attachment.detach()
    return total(put_in), updates, total(held), taken


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize(("num_ranks", "route"), [(2, "allgather"), (2, "balanced"), *((4, route) for route in SPARSE)])
def test_mass_is_conserved(ranks, num_ranks, route, momentum):
    """Without masking: `sum of what was put in == N * sum of updates + sum of v`, exactly."""
    fields = {"masking": False, "density": 0.05, "exchange": route}
    if route == "hierarchical":
        fields["ranks_per_node"] = num_ranks // 2
    for nesterov in (False, True) if momentum else (False,):
        results = ranks(num_ranks)(mass, distopt.DGC(**fields), 12, momentum, nesterov, {"bucket_cap_mb": 0.0015})
        for put_in, updates, held, taken in results:
            assert taken == {route}
            for name in put_in:
                assert torch.equal(put_in[name], updates[name].double() + held[name]), name


@pytest.mark.parametrize("values", ["fp16", "bf16"])
@pytest.mark.parametrize("route", SPARSE)
def test_rounding_loses_nothing(ranks, route, values):
    """What 16 bits cut off, at the sender and at the owner, is in some rank's v."""
    algorithm = distopt.TopK(density=0.05, exchange=route, values=values, ranks_per_node=2, indices="block16")
    for put_in, updates, held, _ in ranks(4)(mass_of_reals, algorithm, 8):
        for name in put_in:
            torch.testing.assert_close(put_in[name], updates[name].double() + held[name], rtol=0, atol=2e-5)


def mass_of_reals(algorithm, steps):
    model, _, attachment = attached(algorithm)
    named = {name: p for name, p in model.module.named_parameters() if p.dim() > 1}
    put_in = {name: torch.zeros(p.shape) for name, p in named.items()}
    updates = {name: torch.zeros(p.shape) for name, p in named.items()}
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(steps):
        gradients = {name: torch.randn(p.shape, generator=generator) for name, p in model.module.named_parameters()}
        model(gradients).backward()
        for name, p in named.items():
            put_in[name] += gradients[name]
            updates[name] += dist.get_world_size() * p.grad
        model.zero_grad()
    held = {name: memory["v"] for name, memory in memories_of(attachment).items() if "v" in memory}
    attachment.detach()
    return total(put_in), updates, total(held), None


def trajectory(algorithm, steps, pause_at=None):
    model, optimizer, attachment = attached(algorithm, momentum=0.5)
    for step in range(steps):
        if step == pause_at:
            attachment.pause()
        model(chosen_gradients(step, 0, dist.get_rank(), torch.float32)).backward()
        optimizer.step()
        optimizer.zero_grad()
    parameters = values_of(model.module)
    attachment.detach()
    buffers = {name: optimizer.state[p]["momentum_buffer"].clone() for name, p in model.module.named_parameters()}
    return parameters, buffers, memories_of(attachment)


def of_a_share(algorithm, share, num_dense, total_ranks):
    """Training with the sum of `share` ranks' gradients, dense at first; updates are those of `total_ranks` ranks."""
    model = DistributedDataParallel(Chosen())
    lr = 2.0**-6 * dist.get_world_size() / total_ranks  # the average is over fewer ranks
    optimizer = momentum_sgd(model.parameters(), lr=lr, momentum=0.5)
    attachment = algorithm.attach(model, optimizer)
    attachment.pause()
    for step in range(num_dense + 5):
        if step == num_dense:
            attachment.resume()
        ranks = range(share * dist.get_rank(), share * (dist.get_rank() + 1))
        parts = [chosen_gradients(step, 0, rank, torch.float32) for rank in ranks]
        model({name: sum(part[name] for part in parts) for name in parts[0]}).backward()
        optimizer.step()
        optimizer.zero_grad()
    memories = memories_of(attachment)
    attachment.detach()
    return values_of(model.module), memories


@pytest.mark.parametrize("num_dense", [0, 3])
def test_a_node_is_as_one_rank_with_its_sum(ranks, num_dense):
    """Hierarchical on 2 nodes of 2 ranks is the all-gather on 2 ranks, also after steps that were dense."""
    algorithm = distopt.DGC(density=0.2, exchange="hierarchical", ranks_per_node=2)
    nodes = ranks(4)(of_a_share, algorithm, 1, num_dense, 4)
    alone = ranks(2)(of_a_share, distopt.DGC(density=0.2, exchange="allgather"), 2, num_dense, 4)
    for rank, (parameters, memories) in enumerate(nodes):
        expected, expected_memories = alone[rank // 2]
        for name, value in parameters.items():
            assert torch.equal(value, expected[name]), name
        for name, memory in expected_memories.items():
            if "v" in memory:  # sent sparse: the leader's is the node's
                for key, tensor in memory.items():
                    assert torch.equal(memories[name][key], torch.zeros_like(tensor) if rank % 2 else tensor), name


def changing_to_hierarchical(state_of):
    """Sums over the ranks before and after a step without gradient, and what this rank holds then."""
    model, optimizer, attachment = attached(state_of, momentum=0.0)
    for step in range(3):
        model(chosen_gradients(step, 0, dist.get_rank(), torch.float32)).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = attachment.state_dict()
    attachment.detach()
    model, _, attachment = attached(distopt.TopK(density=0.2, exchange="hierarchical", ranks_per_node=2), momentum=0.0)
    attachment.load_state_dict(state)
    before = total({name: memory["v"] for name, memory in memories_of(attachment).items() if "v" in memory})
    model({name: torch.zeros_like(p) for name, p in model.module.named_parameters()}).backward()
    own = {name: memory["v"] for name, memory in memories_of(attachment).items() if "v" in memory}
    updates = {name: dist.get_world_size() * p.grad for name, p in model.module.named_parameters() if name in own}
    after = total(own)
    attachment.detach()
    return before, updates, after, own


@pytest.mark.parametrize("route", ["allgather", "balanced", "dense"])
def test_what_other_routes_held_back_goes_to_the_leader(ranks, route):
    results = ranks(4)(changing_to_hierarchical, distopt.TopK(density=0.2, exchange=route))
    for rank, (before, updates, after, own) in enumerate(results):
        for name in before:
            assert before[name].any()
            assert torch.equal(before[name], updates[name].double() + after[name]), name
            assert own[name].any() != rank % 2, name


def one_entry_per_owner(values):
    model = DistributedDataParallel(nn.Linear(30, 10, bias=False))
    attachment = distopt.DGC(density=0.001, exchange="balanced", values=values).attach(
        model, momentum_sgd(model.parameters())
    )
    model(torch.ones(2, 30)).sum().backward()
    assert attachment.stats()["routes"].keys() == {"balanced"}
    attachment.detach()
    return {"weight": model.module.weight.grad.clone()}


@pytest.mark.parametrize("values", ["fp32", "fp16"])
def test_balanced_with_one_entry_per_owner(ranks, values):
    """Every rank has the same gradient, so each of the four owners passes its largest entry on."""
    results = ranks(4)(one_entry_per_owner, values)
    for result in results:
        assert torch.equal(result["weight"], results[0]["weight"])
        assert result["weight"].count_nonzero() == 4


@pytest.mark.parametrize("route", SPARSE)
def test_pausing_sends_everything_and_goes_on_as_momentum_sgd(ranks, route):
    """After a flush the parameters are those of momentum SGD from the start: without masking nothing is lost."""
    common = {"masking": False, "ranks_per_node": 2}
    flushed = ranks(4)(trajectory, distopt.DGC(density=0.1, exchange=route, **common), 8, 5)
    dense = ranks(4)(trajectory, distopt.DGC(density=1.0, exchange=route, **common), 8)
    for (parameters, buffers, _), (expected, momenta, _) in zip(flushed, dense, strict=True):
        for name in parameters:
            torch.testing.assert_close(buffers[name], momenta[name], rtol=0, atol=1e-5)
            assert (parameters[name] - expected[name]).abs().max() < 1e-4, name


def one_bad_step(algorithm):
    model, optimizer, attachment = attached(algorithm, momentum=0.5)
    messages = []
    for step in range(4):
        gradients = chosen_gradients(step, 0, dist.get_rank(), torch.float32)
        if step == 1 and dist.get_rank() == 1:
            gradients["block3.weight"][2, 2] = torch.nan
        model(gradients).backward()
        messages.append(error_of(optimizer.step) if step == 1 else optimizer.step())
        optimizer.zero_grad()
    assert_same_on_all_ranks(values_of(model.module))
    attachment.detach()
    return messages[1], attachment.stats()["steps"]


@pytest.mark.parametrize("route", SPARSE)
def test_a_gradient_that_is_not_finite_is_named_on_every_rank(ranks, route):
    results = ranks(4)(one_bad_step, distopt.DGC(density=0.1, exchange=route, ranks_per_node=2))
    assert {message for message, _ in results} == {results[0][0]}
    assert "'block3.weight' on rank 1" in results[0][0]
    assert {steps for _, steps in results} == {3}


def with_unused(algorithm):
    """Block 2 takes part on nobody in odd steps, block 5 on rank 0 only."""
    model, _, attachment = attached(algorithm, find_unused_parameters=True)
    named = {name: p for name, p in model.module.named_parameters() if p.dim() > 1}
    put_in = {name: torch.zeros(p.shape) for name, p in named.items()}
    updates = {name: torch.zeros(p.shape) for name, p in named.items()}
    for step in range(8):
        gradients = chosen_gradients(step, 0, dist.get_rank(), torch.float32)
        if step % 2:
            gradients |= {"block2.weight": None, "block2.bias": None}
        if dist.get_rank():
            gradients |= {"block5.weight": None, "block5.bias": None}
        before = {name: memory["v"] for name, memory in memories_of(attachment).items() if "v" in memory}
        model(gradients).backward()
        for name, p in named.items():
            if gradients[name] is not None:
                put_in[name] += gradients[name]
            if p.grad is not None:
                updates[name] += dist.get_world_size() * p.grad
        after = {name: memory["v"] for name, memory in memories_of(attachment).items() if "v" in memory}
        if step % 2:
            assert torch.equal(before["block2.weight"], after["block2.weight"])
        model.zero_grad()
    held = {name: memory["v"] for name, memory in memories_of(attachment).items() if "v" in memory}
    attachment.detach()
    return total(put_in), updates, total(held)


@pytest.mark.parametrize("route", SPARSE)
def test_parameters_without_a_part_lose_nothing(ranks, route):
    algorithm = distopt.TopK(density=0.05, exchange=route, ranks_per_node=2)
    for put_in, updates, held in ranks(4)(with_unused, algorithm):
        for name in put_in:
            assert torch.equal(put_in[name], updates[name].double() + held[name]), name


def two_groups(algorithm):
    """Two kinds of memory in one bucket, in turn."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(*(nn.Linear(20, 20) for _ in range(6))))
    halves = [[p for i, p in enumerate(model.parameters()) if i // 2 % 2 == half] for half in range(2)]
    optimizer = torch.optim.SGD([{"params": halves[0]}, {"params": halves[1], "momentum": 0.5}], lr=0.1, momentum=0.9)
    attachment = algorithm.attach(model, optimizer)
    for step in range(5):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        model(torch.randn(8, 20, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_on_all_ranks(values_of(model.module))
    found = values_of(model.module)
    attachment.detach()
    return found


@pytest.mark.parametrize("route", SPARSE)
def test_parameter_groups_with_settings_of_their_own(ranks, route):
    algorithm = distopt.DGC(density=0.3, exchange=route, indices="block16", ranks_per_node=2)
    found = ranks(4)(two_groups, algorithm)[0]
    assert all(value.isfinite().all() for value in found.values())


def refused(**fields):
    model = DistributedDataParallel(nn.Linear(20, 10))
    return error_of(lambda: distopt.DGC(**fields).attach(model, momentum_sgd(model.parameters())))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ranks_per_node": 3}, "ranks_per_node must divide the number of ranks, 2, got 3; leave it out"),
        ({"ranks_per_node": 1}, "several ranks on one of them, got 2 ranks on 2 nodes; set ranks_per_node"),
        ({"ranks_per_node": 2}, "needs several nodes .* got 2 ranks on 1 nodes"),
        ({}, "needs several nodes .* got 2 ranks on 1 nodes"),
    ],
)
def test_no_hierarchy_without_nodes(ranks, fields, message):
    for found in ranks(2)(refused, exchange="hierarchical", **fields):
        assert re.search(message, found), found


def a_bucket_behind_an_abort():
    model, _, attachment = attached(distopt.TopK(density=0.1, exchange="allgather"))
    model(chosen_gradients(0, 0, 0, torch.float32)).backward()
    parameters = list(model.module.parameters())
    bucket = FlatBucket(parameters, [torch.ones_like(p) for p in parameters])
    hook = attachment._hook
    plan = hook._plan(bucket)
    hook._exchange.abort(distopt.PeerLostError("lost rank 1"))
    future = hook._exchange.start(bucket, plan, Header(step=1))
    return future.done(), bool(bucket.buffer().any()), str(hook._exchange.failure)


def test_a_bucket_that_comes_while_the_exchange_is_aborted_is_completed_too(ranks):
    assert ranks(1)(a_bucket_behind_an_abort) == [(True, False, "lost rank 1")]

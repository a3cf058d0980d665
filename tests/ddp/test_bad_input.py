"""What a user can get wrong at attach: each message has the value, the rule and the remedy, and nothing was changed."""

import contextlib
import logging
import types

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt.comm import Channels, Place
from distopt.ddp.attachment import announce_device
from distopt.ddp.bucket import FlatBucket
from distopt.ddp.hook import CommHook
from distopt.ddp.policy import Routing
from distopt.errors import CompatibilityError, DistoptError
from distopt.ops import native

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}


def wrapped(module=None):
    torch.manual_seed(0)
    return DistributedDataParallel(module or nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), **{**SGD, **settings})


def bare_module():
    model = nn.Linear(3, 3)
    return distopt.DGC(), model, sgd(model)


def data_parallel():
    model = nn.DataParallel(nn.Linear(3, 3))
    return distopt.TopK(), model, sgd(model)


def twice():
    model = wrapped()
    distopt.TopK().attach(model, torch.optim.AdamW(model.parameters()))
    return distopt.DGC(), model, sgd(model)


def after_a_python_hook():
    model = wrapped()
    model.register_comm_hook(None, fp16_compress_hook)
    return distopt.DGC(), model, sgd(model)


def after_a_builtin_hook():
    model = wrapped()
    model._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
    return distopt.DGC(), model, sgd(model)


def adam_for_dgc():
    model = wrapped()
    return distopt.DGC(), model, torch.optim.Adam(model.parameters())


def no_optimizer():
    return distopt.TopK(), wrapped(), None


def optimizer_of_another_model():
    return distopt.TopK(), wrapped(), torch.optim.AdamW(nn.Linear(8, 8).parameters())


def dampening():
    model = wrapped()
    return distopt.DGC(), model, sgd(model, dampening=0.5)


def maximize():
    model = wrapped()
    return distopt.DGC(), model, sgd(model, maximize=True)


def mixed_group():
    model, other = wrapped(), nn.Linear(5, 7)
    return distopt.DGC(), model, torch.optim.SGD([*model.parameters(), *other.parameters()], **SGD)


def sparse_embedding():
    model = wrapped(nn.Sequential(nn.Linear(4, 4), nn.Embedding(10, 4, sparse=True)))
    return distopt.TopK(), model, sgd(model)


def sparse_embedding_bag():
    model = wrapped(nn.Sequential(nn.EmbeddingBag(10, 4, sparse=True)))
    return distopt.TopK(), model, sgd(model)


def complex_parameter():
    module = nn.Linear(4, 4)
    module.phase = nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))
    model = wrapped(module)
    return distopt.TopK(), model, sgd(model)


def unmatched_skip():
    model = wrapped()
    return distopt.TopK(skip=("encoder.*",)), model, sgd(model)


def unmatched_density():
    model = wrapped()
    return distopt.DGC(densities={"0.weight": 0.1, "head*": 0.5}), model, sgd(model)


@contextlib.contextmanager
def reducer(kind):
    before = torch._dynamo.config.optimize_ddp
    torch._dynamo.config.optimize_ddp = kind
    yield
    torch._dynamo.config.optimize_ddp = before


def python_reducer():
    with reducer("python_reducer"):
        model = wrapped()
    return distopt.TopK(), model, sgd(model)


def only_rank_1():
    model = wrapped()
    optimizer = torch.optim.Adam(model.parameters()) if dist.get_rank() == 1 else sgd(model)
    return distopt.DGC(), model, optimizer


def other_density_on_rank_1():
    model = wrapped()
    return distopt.DGC(density=(0.001, 0.01)[dist.get_rank()]), model, sgd(model)


def patterns_in_another_order():
    model = wrapped()
    patterns = [("0.*", 0.1), ("*", 0.2)]
    return distopt.DGC(densities=dict(patterns[:: (1, -1)[dist.get_rank()]])), model, sgd(model)


def other_momentum_on_rank_1():
    model = wrapped()
    return distopt.DGC(), model, sgd(model, momentum=(0.9, 0.5)[dist.get_rank()])


CASES = {
    bare_module: (
        "CompatibilityError",
        "a DistributedDataParallel model, got Linear",
        "DistributedDataParallel(model)",
    ),
    data_parallel: ("CompatibilityError", "a DistributedDataParallel model, got DataParallel", "wrap it first"),
    twice: ("CompatibilityError", "one attachment at a time, got a second attach", "call detach() on the first"),
    after_a_python_hook: (
        "CompatibilityError",
        "one communication hook, and fp16_compress_hook is registered already",
        "leave that registration out, or wrap the model in DDP anew",
    ),
    after_a_builtin_hook: (
        "CompatibilityError",
        "one communication hook, and a built-in one is registered already",
        "leave that registration out, or wrap the model in DDP anew",
    ),
    adam_for_dgc: (
        "CompatibilityError",
        "torch.optim.SGD, got Adam",
        "use distopt.TopK(density=...)",
        "every optimizer",
    ),
    no_optimizer: ("CompatibilityError", "got NoneType"),
    optimizer_of_another_model: (
        "CompatibilityError",
        "the optimizer must hold parameters of the DDP model",
        "got none",
    ),
    dampening: ("CompatibilityError", "no dampening, got dampening=0.5 in parameter group 0", "set it to 0"),
    maximize: ("CompatibilityError", "got maximize=True in parameter group 0", "negate the loss"),
    mixed_group: (
        "CompatibilityError",
        "parameter group 0 must hold only parameters of the DDP model, got 2 others (the first of shape (7, 5))",
        "a parameter group of their own",
    ),
    sparse_embedding: ("CompatibilityError", "got sparse=True in the embedding '1'", "set sparse=False"),
    sparse_embedding_bag: ("CompatibilityError", "got sparse=True in the embedding '0'", "set sparse=False"),
    complex_parameter: (
        "CompatibilityError",
        "must be floating point, got torch.complex64 for 'phase'",
        "freeze it or keep real and imaginary parts apart",
    ),
    unmatched_skip: (
        "CompatibilityError",
        "the pattern 'encoder.*' must match a parameter, got none among 0.weight, 0.bias, 1.weight, 1.bias",
        "see dict(model.named_parameters())",
    ),
    unmatched_density: ("CompatibilityError", "the pattern 'head*' must match a parameter", "0.weight, 0.bias"),
    python_reducer: ("CompatibilityError", '"python_reducer", which ignores what hooks return', "set it to True"),
    other_density_on_rank_1: (
        "DesyncError",
        "the same configuration, got {'density': 0.001} on rank 0 and {'density': 0.01} on rank 1",
        "start all ranks from the same code and settings",
    ),
    patterns_in_another_order: (
        "DesyncError",
        "the same configuration, got {'densities': {'0.*': 0.1, '*': 0.2}} on rank 0",
        "{'densities': {'*': 0.2, '0.*': 0.1}} on rank 1",
    ),
    other_momentum_on_rank_1: (
        "DesyncError",
        "the same optimizer settings",
        "momentum 0.9",
        "momentum 0.5",
        "on rank 1",
    ),
}


def attempt(case):
    """The error of this rank, and whether the optimizer and DDP are as they were."""
    algorithm, model, optimizer = case()
    groups = [{**group, "params": None} for group in optimizer.param_groups] if optimizer else []
    try:
        algorithm.attach(model, optimizer)
    except DistoptError as error:
        now = [{**group, "params": None} for group in optimizer.param_groups] if optimizer else []
        assert groups == now, "the optimizer was changed"
        return type(error).__name__, str(error)
    return "no error", ""


def attaches_after_a_refusal():
    """The same DDP object takes a good attach after a bad one."""
    model = wrapped()
    with contextlib.suppress(CompatibilityError):
        distopt.DGC().attach(model, torch.optim.Adam(model.parameters()))
    optimizer = sgd(model)
    attachment = distopt.DGC(density=0.1).attach(model, optimizer)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    return attachment.stats()["steps"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_refused_on_every_rank_with_value_rule_and_remedy(ranks, case):
    kind, *parts = CASES[case]
    for got, message in ranks(2)(attempt, case):
        assert got == kind, message
        for part in parts:
            assert part in message


def test_the_problem_of_one_rank_is_told_to_the_others(ranks):
    (kind, message), (own_kind, own) = ranks(2)(attempt, only_rank_1)
    assert (kind, own_kind) == ("CompatibilityError", "CompatibilityError")
    assert message == f"rank 1 cannot attach: {own}"
    assert "got Adam" in own


def test_a_refusal_leaves_the_model_ready(ranks):
    assert ranks(2)(attaches_after_a_refusal) == [1, 1]


WITHOUT_A_GROUP = """
import torch, distopt, tempfile
from torch.nn.parallel import DistributedDataParallel
def attempt(model):
    try:
        distopt.DGC().attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    except distopt.CompatibilityError as error:
        print(error)
attempt(torch.nn.Linear(2, 2))
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
model = DistributedDataParallel(torch.nn.Linear(2, 2))
torch.distributed.destroy_process_group()
attempt(model)
"""


def test_without_a_process_group(warm_python):
    ran = warm_python.run(WITHOUT_A_GROUP)
    assert ran.returncode == 0, ran.stderr
    before, after = (line for line in ran.stdout.splitlines() if not line.startswith("[Gloo]"))  # torch < 2.13
    assert "got Linear; call torch.distributed.init_process_group and wrap it first" in before
    assert "attach needs a process group, got none; call torch.distributed.init_process_group first" in after


@pytest.mark.parametrize("bucket", [(torch.zeros(3), torch.zeros(3)), torch.zeros(3), None])
def test_what_is_no_bucket(bucket):
    channels = Channels(world=types.SimpleNamespace(size=lambda: 2), worker=None)
    routing = Routing(place=Place(num_ranks=2), routes=("allgather",))
    hook = CommHook([], distopt.TopK().step_policy(tracks_usage=False), channels, routing)
    with pytest.raises(CompatibilityError) as caught:
        hook(bucket)
    message = str(caught.value)
    assert f"must be given a gradient bucket, got {type(bucket).__name__}" in message
    assert 'optimize_ddp = "python_reducer" does not give one: set it to True' in message


def test_a_parameter_that_was_not_there_at_attach():
    channels = Channels(world=types.SimpleNamespace(size=lambda: 2), worker=None)
    routing = Routing(place=Place(num_ranks=2), routes=("allgather",))
    hook = CommHook([], distopt.TopK().step_policy(tracks_usage=False), channels, routing)
    with pytest.raises(CompatibilityError, match=r"did not have at attach; detach and attach again"):
        hook(FlatBucket([torch.zeros(3)], [torch.zeros(3)]))


@pytest.mark.parametrize(
    ("device", "has_kernels", "warns"), [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)]
)
def test_a_model_on_a_device_without_kernels_is_told_what_is_used(caplog, monkeypatch, device, has_kernels, warns):
    """The edge of it: what attach says, without the device."""
    monkeypatch.setattr(native, "has_cuda_kernels", lambda: has_kernels)
    with caplog.at_level(logging.INFO, logger="distopt"):
        announce_device(torch.device(device))
    messages = [record.getMessage() for record in caplog.records]
    assert bool(messages) == warns
    if warns:
        assert "the model is on cuda and distopt has no kernels for it: selection uses torch's own" in messages[0]

"""What differs between the ranks, or is wrong on one of them, is an error at attach on every rank."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from training import (
    Chosen,
    assert_equal,
    assert_same_on_all_ranks,
    dgc,
    error_of,
    mlp,
    momentum_sgd,
    step_on_samples,
    topk,
    values_of,
)

import distopt
from distopt.ddp import compatibility


def renamed_model():
    return Chosen(shapes={"blocky.weight": (4, 3), "block2.bias": (3,)})


def original_model():
    return Chosen(shapes={"block1.weight": (4, 3), "block2.bias": (3,)})


def on_difference(what: str) -> str:
    """Rank 1 attaches otherwise than rank 0."""
    other = dist.get_rank() == 1
    algorithm, module, options, settings = dgc(), mlp(), {}, {"weight_decay": 0.1}
    scaler = None
    version = compatibility.__version__
    if what == "density" and other:
        algorithm = dgc(density=0.25)
    elif what == "algorithm" and other:
        algorithm = topk()
    elif what == "warm-up" and other:
        algorithm = dgc(warmup=distopt.ddp.PaperWarmup(stage=7))
    elif what == "model":
        module = renamed_model() if other else original_model()
    elif what == "momentum" and other:
        settings = {"momentum": 0.8, "weight_decay": 0.1}
    elif what == "version" and other:
        compatibility.__version__ = "0.0.other"
    elif what == "scaler" and other:
        scaler = torch.amp.GradScaler("cpu")
    elif what == "find_unused_parameters":
        options = {"find_unused_parameters": other}
    model = DistributedDataParallel(module, **options)
    parameters = list(model.parameters())
    if what == "group assignment":  # as many of each kind, and not the same ones
        first = parameters[2:4] if other else parameters[:2]
        rest = [p for p in parameters if all(p is not q for q in first)]
        optimizer = momentum_sgd([{"params": first, "momentum": 0.5}, {"params": rest}])
    elif what == "optimized parameters":
        algorithm = topk()
        optimizer = momentum_sgd(parameters[2:] if other else parameters[:-2])
    else:
        optimizer = momentum_sgd(parameters, **settings)
    before = [dict(group, params=None) for group in optimizer.param_groups]
    try:
        message = error_of(lambda: algorithm.attach(model, optimizer, scaler=scaler), distopt.DistoptError)
    finally:
        compatibility.__version__ = version
    assert [dict(group, params=None) for group in optimizer.param_groups] == before
    return message


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("density", ("same configuration", "'density': 0.1", "'density': 0.25")),
        ("algorithm", ("same configuration", "'dgc'", "'topk'")),
        ("warm-up", ("same configuration", "'warmup': None", "'stage': 7")),
        ("model", ("same model", "2 parameters, digest")),
        ("momentum", ("same optimizer settings", "momentum 0.9", "momentum 0.8")),
        ("version", ("same distopt version", f"'{distopt.__version__}' on rank 0", "'0.0.other' on rank 1")),
        ("scaler", ("same training options", "'GradScaler': False", "'GradScaler': True")),
        ("find_unused_parameters", ("same training options", "unused parameters': False", "unused parameters': True")),
        ("group assignment", ("same optimizer settings", "6 optimized, digest")),
        ("optimized parameters", ("same optimizer settings", "4 optimized, digest")),
    ],
)
def test_a_difference_is_an_error_that_names_both(ranks, what, parts):
    first, second = ranks(2)(on_difference, what)
    assert first == second
    assert first.startswith("DesyncError: every rank must attach with the same ")
    for part in (*parts, "on rank 0", "on rank 1", "start all ranks from the same code and settings"):
        assert part in first


def on_local_problem(what: str) -> str:
    other = dist.get_rank() == 1
    model = DistributedDataParallel(mlp())
    optimizer = momentum_sgd(model.parameters())
    attached = None
    if other:
        if what == "another hook":
            model.register_comm_hook(None, fp16_compress_hook)
        elif what == "a built-in hook":
            model._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
        elif what == "dampening":
            optimizer = momentum_sgd(model.parameters(), dampening=0.1)
        elif what == "momentum":
            optimizer = momentum_sgd(model.parameters(), momentum=1.5)
        elif what == "maximize":
            optimizer = momentum_sgd(model.parameters(), maximize=True)
        elif what == "optimizer":
            optimizer = torch.optim.AdamW(model.parameters())
    if what == "twice":  # on both ranks
        attached = dgc().attach(model, optimizer)
    algorithm = dgc(densities={"nothing.*": 0.1}) if other and what == "pattern" else dgc()
    message = error_of(lambda: algorithm.attach(model, optimizer), distopt.DistoptError)
    if what == "twice":
        attached.detach()
    if "hook" not in what:  # a refused attach changes nothing: the right one works
        optimizer = momentum_sgd(model.parameters())
        attachment = dgc().attach(model, optimizer)
        step_on_samples(model, optimizer, 0, dist.get_rank())
        assert attachment.stats()["steps"] == 1
        assert_same_on_all_ranks(values_of(model.module))
    return message


@pytest.mark.parametrize(
    ("what", "part"),
    [
        ("another hook", "fp16_compress_hook is registered already"),
        ("a built-in hook", "a built-in one is registered already"),
        ("dampening", "dampening=0.1"),
        ("maximize", "maximize=True"),
        ("momentum", "needs a momentum in [0, 1), got momentum=1.5 in parameter group 0; use 0.9"),
        ("optimizer", "distopt.TopK"),
        ("pattern", "'nothing.*' must match a parameter"),
        ("twice", "call detach() on the first"),
    ],
)
def test_a_problem_of_one_rank_is_told_to_all(ranks, what, part):
    first, second = ranks(2)(on_local_problem, what)
    assert part in first
    assert part in second
    if what != "twice":
        assert first.startswith("CompatibilityError: rank 1 cannot attach: ")
        assert first.endswith(second.removeprefix("CompatibilityError: "))


def on_different_starts(algorithm, changed: dict) -> str:
    """One rank loads a checkpoint and the other does not: noticed in the first step, on both."""
    model = DistributedDataParallel(mlp())
    optimizer = momentum_sgd(model.parameters())
    attachment = algorithm.attach(model, optimizer)
    if dist.get_rank() == 1:
        attachment.load_state_dict({**attachment.state_dict(), **changed})
    before = values_of(model.module)
    message = error_of(lambda: step_on_samples(model, optimizer, 0, dist.get_rank()), distopt.DesyncError)
    assert_equal(values_of(model.module), before)
    # the remedy works in this very process
    attachment.load_state_dict({**attachment.state_dict(), "step": 3, "paused": False})
    step_on_samples(model, optimizer, 3, dist.get_rank())
    assert_same_on_all_ranks(values_of(model.module))
    assert (attachment.stats()["steps"], attachment.stats()["skipped_steps"]) == (1, 1)
    return message


@pytest.mark.parametrize(
    "algorithm",
    [dgc(), dgc(warmup=distopt.ddp.ListWarmup(densities=(0.5, 0.2), stage=4)), dgc(nonfinite="skip")],
    ids=["same sizes", "warm-up", "deferred"],  # in a warm-up the payloads would not even be of one size
)
def test_ranks_that_begin_at_different_steps(ranks, algorithm):
    for message in ranks(2)(on_different_starts, algorithm, {"step": 7}):
        assert "rank 0 at 0, rank 1 at 7" in message
        assert "load the same checkpoint on every rank" in message


def test_ranks_of_which_one_begins_paused(ranks):
    for message in ranks(2)(on_different_starts, dgc(), {"paused": True}):
        assert "all ranks must be paused or none, got both; call pause() on every rank" in message


def on_different_steps_later() -> str:
    """One rank's count is off in mid-run: the headers tell."""
    model = DistributedDataParallel(mlp())
    optimizer = momentum_sgd(model.parameters())
    attachment = dgc().attach(model, optimizer)
    step_on_samples(model, optimizer, 0, dist.get_rank())
    attachment._hook.step += dist.get_rank()
    return error_of(lambda: step_on_samples(model, optimizer, 1, dist.get_rank()), distopt.DesyncError)


def test_ranks_that_drift_apart(ranks):
    for message in ranks(2)(on_different_steps_later):
        assert "rank 0 at 1, rank 1 at 2" in message

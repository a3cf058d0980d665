"""What the user is told without asking: on the logger "distopt", by rank 0, once."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training import dgc, mlp, momentum_sgd, step_on_samples, topk

import distopt
from distopt.ddp import attachment as attachment_module
from listening import heard


def on_attach(algorithm, settings: dict, *, part: bool = False) -> list[tuple[str, str]]:
    model = DistributedDataParallel(mlp())
    parameters = list(model.parameters())
    optimizer = momentum_sgd(parameters[:-2] if part else parameters, **settings)
    with heard() as said:
        algorithm.attach(model, optimizer)
    return said


def test_attach_says_what_it_took_over(ranks):
    first, second = ranks(2)(on_attach, dgc(), {"nesterov": True, "weight_decay": 0.01})
    warnings = [message for level, message in first if level == "WARNING"]
    assert warnings == [
        "took over from the optimizer, where it is now 0: momentum 0.9 (Nesterov) and weight decay 0.01 of 6 parameters"
    ]
    assert any("attached {'algorithm': 'dgc', 'density': 0.1" in message for _, message in first)
    assert second == []


@pytest.mark.parametrize(("algorithm", "settings"), [(dgc(), {"momentum": 0.0}), (topk(), {}), (distopt.Dense(), {})])
def test_attach_warns_of_nothing_where_nothing_is_taken(ranks, algorithm, settings):
    (said,) = ranks(1)(on_attach, algorithm, settings)
    assert [level for level, _ in said] == ["INFO"]


def test_attach_says_that_another_optimizers_parameters_are_sent_whole(ranks):
    (said,) = ranks(1)(on_attach, topk(), {}, part=True)
    assert ("WARNING", "2 parameters of the model are not in this optimizer: they are sent whole") in said


def on_device() -> list[torch.device]:
    asked = []
    original = attachment_module.announce_device
    attachment_module.announce_device = asked.append
    try:
        on_attach(topk(), {})
    finally:
        attachment_module.announce_device = original
    return asked


def test_attach_says_what_runs_on_the_models_device(ranks):
    assert ranks(1)(on_device) == [[torch.device("cpu")]]


def on_flush(how: str, algorithm, momentum: float) -> list[tuple[str, str]]:
    warmup = distopt.ddp.ListWarmup(densities=(0.1, 1.0), stage=3) if how == "schedule" else None
    model = DistributedDataParallel(mlp(), bucket_cap_mb=0.002)
    optimizer = momentum_sgd(model.parameters(), momentum=momentum)
    attachment = algorithm(warmup=warmup).attach(model, optimizer)
    with heard() as said:
        for step in range(6):
            if step == 3 and how == "pause":
                attachment.pause()
            step_on_samples(model, optimizer, step, dist.get_rank())
    return [line for line in said if "held back" in line[1]]


@pytest.mark.parametrize(("algorithm", "momentum"), [(dgc, 0.9), (dgc, 0.0), (topk, 0.9)], ids=["dgc", "sgd", "topk"])
@pytest.mark.parametrize("how", ["schedule", "pause"])
def test_going_back_to_dense_says_that_what_was_held_back_goes_out(ranks, how, algorithm, momentum):
    first, second = ranks(2)(on_flush, how, algorithm, momentum)
    assert first == [("WARNING", "step 3 sends gradients whole again, and with them all that was held back")]
    assert second == []

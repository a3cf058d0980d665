"""NaN and Inf on one rank: all ranks agree, name parameter and rank, and nobody hangs."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training import (
    Chosen,
    assert_equal,
    assert_same_on_all_ranks,
    chosen_gradients,
    dgc,
    error_of,
    memories_of,
    momentum_sgd,
    topk,
    values_of,
)

import distopt


def backward(model, step: int, bad: dict[int, dict[str, float]], accumulate: int = 1) -> None:
    """One step's backward passes; `bad` is, by rank, which value to put into which gradient (of the first pass)."""
    rank = dist.get_rank()
    for micro in range(accumulate):
        gradients = chosen_gradients(step, micro, rank, torch.float32)
        for name, value in bad.get(rank, {}).items() if micro == 0 else ():
            gradients[name].view(-1)[-1] = value
        with contextlib.nullcontext() if micro == accumulate - 1 else model.no_sync():
            model(gradients).backward()


def make(algorithm, optimizer_class=None, **options):
    model = DistributedDataParallel(Chosen(), bucket_cap_mb=0.0005, **options)
    if optimizer_class is None:
        optimizer = momentum_sgd(model.parameters(), weight_decay=0.01)
    else:
        optimizer = optimizer_class(model.parameters(), lr=0.01)
    return model, optimizer, algorithm.attach(model, optimizer)


BAD = {
    "NaN in a compressed tensor": {1: {"block3.weight": float("nan")}},
    "Inf in a dense tensor": {0: {"block5.bias": float("-inf")}},
    "both, on both ranks": {0: {"block5.bias": float("inf")}, 1: {"block3.weight": float("nan")}},
}
MODES = {
    "streaming": (dgc(), {}, 1),
    "dense wire": (topk(exchange="dense"), {}, 1),
    "momentum of the average": (dgc(density=1.0), {}, 1),
    "accumulated": (dgc(), {"gradient_as_bucket_view": True}, 3),
    "deferred": (dgc(clip=1.0), {}, 1),
    "find_unused_parameters": (dgc(), {"find_unused_parameters": True}, 1),
}


def on_error(mode: str) -> dict[str, str]:
    messages = {}
    for what, bad in BAD.items():
        algorithm, options, accumulate = MODES[mode]
        model, optimizer, attachment = make(algorithm, **options)
        for step in range(6):
            before = values_of(model.module)
            backward(model, step, bad if step in (2, 4) else {}, accumulate)
            if step in (2, 4):
                messages[what] = error_of(optimizer.step, distopt.DistoptError)
                assert_equal(values_of(model.module), before)
            else:  # whoever catches the error and goes on has ranks that agree
                optimizer.step()
                assert_same_on_all_ranks(values_of(model.module))
                assert all(bool(torch.isfinite(t).all()) for m in memories_of(attachment).values() for t in m.values())
            optimizer.zero_grad()
        assert attachment.stats()["skipped_steps"] == 2
        assert attachment.stats()["steps"] == 4
    return messages


@pytest.mark.parametrize("mode", MODES)
def test_error_names_parameter_and_rank_on_every_rank(ranks, mode):
    first, second = ranks(2)(on_error, mode)
    assert first == second
    for what, message in first.items():
        assert message.startswith("NonFiniteGradientError: gradients must be finite, got NaN or Inf in ")
        places = {rank: list(names) for rank, names in BAD[what].items()}
        for rank, names in places.items():
            assert f"{names[0]!r} on rank {rank}" in message
        assert "no parameter was changed" in message
        assert 'nonfinite="skip"' in message


def on_error_before_the_switch_to_dense() -> None:
    """The first sparse step is the bad one: the ranks still agree on what the next dense step must send."""
    model, optimizer, attachment = make(dgc())
    backward(model, 0, {1: dict.fromkeys(("block0.weight", "block1.weight", "block7.bias"), float("nan"))})
    error_of(optimizer.step, distopt.NonFiniteGradientError)
    attachment.pause()
    for step in range(1, 4):
        optimizer.zero_grad()
        backward(model, step, {})
        optimizer.step()
        assert_same_on_all_ranks(values_of(model.module))


def test_pause_after_an_error_in_the_first_step(ranks):
    ranks(2)(on_error_before_the_switch_to_dense)


def on_skip() -> None:
    """A step left out never happened: the run goes on as one that did not see that step."""
    cases = [
        (dgc(nonfinite="skip"), None, {}),
        (dgc(nonfinite="skip", clip=2.0), None, {"find_unused_parameters": True}),
        (dgc(nonfinite="skip", density=1.0), None, {"gradient_as_bucket_view": True}),
        (topk(nonfinite="skip", values="fp16"), torch.optim.AdamW, {}),
        (topk(nonfinite="skip"), torch.optim.AdamW, {"gradient_as_bucket_view": True}),
    ]
    for algorithm, optimizer_class, options in cases:
        model, optimizer, attachment = make(algorithm, optimizer_class, **options)
        clean, clean_optimizer, clean_attachment = make(algorithm, optimizer_class, **options)
        for bad in BAD.values():
            for step in range(2):
                for m, o in ((model, optimizer), (clean, clean_optimizer)):
                    o.zero_grad()
                    backward(m, step, {})
                    o.step()
            before = [values_of(model.module), memories_of(attachment)]
            optimizer_before = str(optimizer.state_dict())
            optimizer.zero_grad()
            backward(model, 2, bad)
            optimizer.step()
            assert_equal(values_of(model.module), before[0])
            assert_equal(memories_of(attachment), before[1])
            assert str(optimizer.state_dict()) == optimizer_before
        assert_equal(values_of(model.module), values_of(clean.module), str(algorithm))
        assert_equal(memories_of(attachment), memories_of(clean_attachment), str(algorithm))
        assert_same_on_all_ranks(values_of(model.module))
        stats = attachment.stats()
        assert (stats["steps"], stats["skipped_steps"], stats["overlap"]) == (6, 3, False)


def test_skip_leaves_the_step_out_everywhere(ranks):
    ranks(2)(on_skip)

"""attach, pause, resume, detach, and again: what is taken over, what is given back, and what training goes on as."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import (
    Chosen,
    assert_close,
    assert_equal,
    assert_same_on_all_ranks,
    chosen_gradients,
    dgc,
    error_of,
    memories_of,
    mlp,
    momentum_sgd,
    samples,
    step_on_samples,
    topk,
    values_of,
)

import distopt

SETTINGS = {
    "heavy-ball": {},
    "nesterov": {"nesterov": True},
    "decay": {"weight_decay": 0.05},
    "nesterov and decay": {"nesterov": True, "weight_decay": 0.05},
    "no momentum": {"momentum": 0.0, "weight_decay": 0.05},
}


def wrapped(**options) -> DistributedDataParallel:
    return DistributedDataParallel(mlp(), bucket_cap_mb=0.002, **options)


def steps(model, optimizer, numbers) -> None:
    for step in numbers:
        step_on_samples(model, optimizer, step, dist.get_rank())


def buffers_of(model, optimizer) -> dict:
    names = {id(p): name for name, p in model.module.named_parameters()}
    return {names[id(p)]: state["momentum_buffer"].clone() for p, state in optimizer.state.items() if state}


def plain_run(settings: dict, num_steps: int):
    model = wrapped()
    optimizer = momentum_sgd(model.parameters(), **settings)
    steps(model, optimizer, range(num_steps))
    return model, optimizer


# --- density 1, taking over, giving back


def on_density_1() -> None:
    for name, settings in SETTINGS.items():
        for fields in ({}, {"weight_decay": "local"}, {"exchange": "allgather"}):
            # heavy-ball without decay: the same operations in the same order
            check = assert_equal if name == "heavy-ball" else assert_close
            expected, expected_optimizer = plain_run(settings, 10)

            model = wrapped()
            optimizer = momentum_sgd(model.parameters(), **settings)
            steps(model, optimizer, range(3))  # plain, so that there are momentum buffers to take over
            attachment = dgc(density=1.0, **fields).attach(model, optimizer)
            for key in ("momentum", "weight_decay", "nesterov"):
                assert not optimizer.param_groups[0][key]
            steps(model, optimizer, range(3, 7))
            attachment.detach()
            for key in ("momentum", "weight_decay", "nesterov"):
                assert optimizer.param_groups[0][key] == expected_optimizer.param_groups[0][key]
            steps(model, optimizer, range(7, 10))  # plain again, with the momentum that was given back
            check(values_of(model.module), values_of(expected.module))
            check(buffers_of(model, optimizer), buffers_of(expected, expected_optimizer))


def test_density_1_is_momentum_sgd_also_across_attach_and_detach(ranks):
    ranks(2)(on_density_1)


def on_detach() -> None:
    """The momentum buffer that comes back is the rank average of u, with the decay momentum, in torch's units."""
    for name, settings in SETTINGS.items():
        if name == "no momentum":
            continue
        model = wrapped()
        optimizer = momentum_sgd(model.parameters(), **settings)
        attachment = dgc().attach(model, optimizer)
        steps(model, optimizer, range(5))
        expected = {key: memory["u"] for key, memory in memories_of(attachment).items()}
        decay = attachment.state_dict()["replicated"]["decay"]
        attachment.detach()
        for key, buffer in expected.items():
            dist.all_reduce(buffer)
            buffer.div_(2).add_(decay.get(key, 0))
            if "nesterov" in name:
                buffer.div_(0.9)
        assert_close(buffers_of(model, optimizer), expected)
        attachment.detach()  # again: nothing happens

        plain = wrapped()
        plain.load_state_dict(model.state_dict())
        plain_optimizer = momentum_sgd(plain.parameters(), **settings)
        plain_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it would share the buffers
        for ddp, sgd in ((model, optimizer), (plain, plain_optimizer)):
            steps(ddp, sgd, range(5, 9))
        assert_equal(values_of(model.module), values_of(plain.module))  # bit for bit plain DDP

        again = topk().attach(model, optimizer)  # another algorithm in the same slot
        steps(model, optimizer, range(9, 11))
        assert again.stats()["steps"] == 2
        assert_same_on_all_ranks(values_of(model.module))
        again.detach()


def test_detach_gives_back_the_average_momentum_and_plain_ddp(ranks):
    ranks(2)(on_detach)


def on_context_manager() -> None:
    model = wrapped()
    optimizer = momentum_sgd(model.parameters(), weight_decay=0.1)
    original = model._sync_final_model
    with dgc().attach(model, optimizer):
        assert optimizer.param_groups[0]["momentum"] == 0.0
        steps(model, optimizer, range(2))
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert buffers_of(model, optimizer).keys() == dict(model.module.named_parameters()).keys()
    assert model._sync_final_model == original
    assert not optimizer._optimizer_step_pre_hooks

    # An exception on one rank only: no collective on the way out, or the other rank would have to be there too.
    attachment = dgc().attach(model, optimizer)
    if dist.get_rank() == 0:
        message = error_of(lambda: _fail_within(attachment), ZeroDivisionError)
        assert "ZeroDivisionError" in message
        assert optimizer.param_groups[0]["momentum"] == 0.9
        assert not buffers_of(model, optimizer)  # not known without the other ranks
        assert not optimizer._optimizer_step_pre_hooks
    dist.barrier()


def _fail_within(attachment) -> None:
    with attachment:
        _ = 1 / 0


def test_context_manager(ranks):
    ranks(2)(on_context_manager)


# --- pause and resume


def on_pause_mass(algorithm, momentum: float) -> None:
    """After the first paused step everything that was put in has moved the parameters: u_1 + ... + u_T exactly."""
    rank, rate = dist.get_rank(), 2.0**-4
    model = DistributedDataParallel(Chosen(), bucket_cap_mb=0.0005)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    before = values_of(model.module)
    attachment = algorithm.attach(model, optimizer)
    velocity = {name: torch.zeros_like(value) for name, value in before.items()}
    total = {name: torch.zeros_like(value) for name, value in before.items()}
    for step in range(5):
        if step == 4:
            attachment.pause()
        gradients = chosen_gradients(step, 0, rank, torch.float32)
        for name, gradient in gradients.items():
            velocity[name] = momentum * velocity[name] + gradient
            total[name] += velocity[name]
        model(gradients).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in values_of(model.module).items():
        dist.all_reduce(total[name])
        torch.testing.assert_close((before[name] - value) / rate * 2, total[name], rtol=1e-5, atol=1e-4)
        memory = memories_of(attachment)[name]
        assert not memory["v"].any() if "v" in memory else True
        if "u" in memory:
            assert_same_on_all_ranks({name: memory["u"]})


@pytest.mark.parametrize(
    ("algorithm", "momentum"),
    [(topk(), 0.0), (topk(values="fp16"), 0.0), (dgc(masking=False), 0.5), (dgc(masking=False, clip=1e6), 0.5)],
    ids=["topk", "topk-fp16", "dgc", "dgc-deferred"],
)
def test_the_first_paused_step_sends_all_that_was_held_back(ranks, algorithm, momentum):
    ranks(2)(on_pause_mass, algorithm, momentum)


def on_pause_trajectory() -> None:
    for name, settings in SETTINGS.items():
        model = wrapped()
        optimizer = momentum_sgd(model.parameters(), **settings)
        attachment = dgc().attach(model, optimizer)
        steps(model, optimizer, range(4))
        attachment.pause()
        steps(model, optimizer, range(4, 5))
        assert attachment.stats()["paused"]

        plain = wrapped()
        plain.load_state_dict(model.state_dict())
        plain_optimizer = momentum_sgd(plain.parameters(), **settings)
        if settings.get("momentum", 0.9):
            decay = attachment.state_dict()["replicated"]["decay"]
            for key, p in plain.module.named_parameters():
                buffer = memories_of(attachment)[key]["u"] + decay.get(key, 0)
                plain_optimizer.state[p]["momentum_buffer"] = buffer / 0.9 if "nesterov" in name else buffer
        for ddp, sgd in ((model, optimizer), (plain, plain_optimizer)):
            steps(ddp, sgd, range(5, 10))
        assert_close(values_of(model.module), values_of(plain.module))

        dense_bytes = attachment.stats()["last"]["bytes_sent"]
        attachment.resume()
        steps(model, optimizer, range(10, 14))
        assert attachment.stats()["last"]["bytes_sent"] < dense_bytes / 2
        assert not attachment.stats()["paused"]
        assert_same_on_all_ranks(values_of(model.module))


def test_paused_training_is_momentum_sgd_and_resume_compresses_again(ranks):
    ranks(2)(on_pause_trajectory)


# --- options


def on_bf16_residuals() -> None:
    rank = dist.get_rank()
    for algorithm in (dgc(residuals="bf16", density=0.2), topk(residuals="bf16", density=0.2)):
        model = wrapped()
        optimizer = momentum_sgd(model.parameters(), lr=0.1)
        attachment = algorithm.attach(model, optimizer)
        losses = torch.tensor([step_on_samples(model, optimizer, 0, rank) for _ in range(40)])
        dist.all_reduce(losses)
        assert losses[-1] < 0.7 * losses[0]
        assert_same_on_all_ranks(values_of(model.module))
        memories = memories_of(attachment)
        assert {t.dtype for memory in memories.values() for t in memory.values()} == {torch.bfloat16}


def test_bf16_residuals_train(ranks):
    ranks(2)(on_bf16_residuals)


class WithPenalty(nn.Module):
    """The same decay as a term of the loss: then it is in the local gradient whatever the hook does."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.body, self.rate = mlp(), rate

    def forward(self, x):
        return self.body(x), 0.5 * self.rate * sum(p.square().sum() for p in self.body.parameters())


def on_local_decay() -> None:
    for algorithm in (dgc(weight_decay="local"), dgc(weight_decay="local", masking=False, exchange="dense")):
        model = wrapped()
        optimizer = momentum_sgd(model.parameters(), weight_decay=0.05)
        attachment = algorithm.attach(model, optimizer)
        assert not attachment.state_dict()["replicated"]["decay"]
        steps(model, optimizer, range(6))
        other = DistributedDataParallel(WithPenalty(0.05))
        other_optimizer = momentum_sgd(other.parameters())
        algorithm.attach(other, other_optimizer)
        for step in range(6):
            x, y = samples(step, dist.get_rank())
            output, penalty = other(x)
            other_optimizer.zero_grad()
            (nn.functional.mse_loss(output, y) + penalty).backward()
            other_optimizer.step()
        assert_close(values_of(model.module), values_of(other.module.body))
        assert_same_on_all_ranks(values_of(model.module))
        attachment.detach()
        assert optimizer.param_groups[0]["weight_decay"] == 0.05


def test_local_weight_decay_is_a_term_of_the_local_loss(ranks):
    ranks(2)(on_local_decay)


def on_two_wrappers() -> str:
    module = mlp()
    first = DistributedDataParallel(module)
    optimizer = momentum_sgd(module.parameters(), weight_decay=0.1)
    attachment = dgc().attach(first, optimizer)
    second = DistributedDataParallel(module)  # a cell of a notebook that is run again
    message = error_of(lambda: dgc().attach(second, optimizer), distopt.CompatibilityError)
    attachment.detach()
    again = dgc().attach(second, optimizer)
    assert again.stats()["taken_over"] == "momentum 0.9 and weight decay 0.1 of 6 parameters"
    again.detach()
    assert (optimizer.param_groups[0]["momentum"], optimizer.param_groups[0]["weight_decay"]) == (0.9, 0.1)
    return message


def test_momentum_is_not_taken_twice_through_another_wrapper(ranks):
    for message in ranks(2)(on_two_wrappers):
        assert "got 6 parameters of which another attachment has them" in message
        assert "call detach() on the first" in message


def on_momentum_returns(how: str) -> str:
    model = wrapped()
    optimizer = momentum_sgd(model.parameters(), weight_decay=0.1 if how == "load_state_dict" else 0.0)
    saved = optimizer.state_dict()
    attachment = dgc().attach(model, optimizer)
    steps(model, optimizer, range(2))
    before = values_of(model.module)
    if how == "OneCycleLR":
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)  # it cycles momentum by default
    elif how == "scheduler from before attach":
        attachment.detach()
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
        attachment = dgc().attach(model, optimizer)
        scheduler.step()
    else:
        optimizer.load_state_dict(saved)
    message = error_of(lambda: steps(model, optimizer, range(3, 4)), distopt.DistoptError)
    assert_equal(values_of(model.module), before)
    return message


@pytest.mark.parametrize("how", ["OneCycleLR", "scheduler from before attach", "load_state_dict"])
def test_momentum_that_comes_back_is_an_error(ranks, how):
    for message in ranks(2)(on_momentum_returns, how):
        assert message.startswith(
            "CompatibilityError: while distopt.DGC is attached the optimizer's momentum must stay 0"
        )
        for part in ("parameter group 0", "cycle_momentum=False", "load the optimizer before attach"):
            assert part in message

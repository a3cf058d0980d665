"""The drivers, where the laws of the algorithms do not reach: rounds of `Server`, local steps of `Client`."""

from collections import Counter

import numpy as np
import pytest
import torch
from least_squares import LR, NUM_CLIENTS, NUM_VALUES, START, Job, batches_of, gradient, linear, mean_squared_error
from torch import nn

from distopt.errors import ConfigError
from distopt.federated import (
    Client,
    FedAU,
    FedAvg,
    FederatedAlgorithm,
    FedProx,
    FedSpeed,
    Layout,
    Reply,
    Scaffold,
    Server,
)


class TakesAnyVersion(FedAvg):
    """FedAvg whose late replies count, as those of asynchronous algorithms do; not registered."""

    def accepts(self, answered, version):
        return answered <= version


def reply(client, version, value, *, d=3, **changes):
    fields = {"num_samples": 1, "num_steps": 1, "tensors": {"delta": torch.full((d,), float(value))}}
    return Reply(client=client, version=version, **{**fields, **changes})


def begun(algorithm=None, num_clients=4, d=3):
    server = Server(algorithm or FedAvg(), d)
    return server, server.begin(torch.zeros(d), num_clients)


def test_round_by_hand():
    server, state = begun()
    state, sent = server.step(state, [reply(2, 0, 3.0, num_samples=3), reply(0, 0, -1.0)])
    assert torch.equal(state.model, torch.full((3,), 2.0))
    assert (state.version, sent.version) == (1, 1)
    assert torch.equal(sent.model, state.model)
    assert sent.num_bytes == 12
    assert reply(0, 0, 1.0).num_bytes == 12


def test_refused_replies_add_up_over_rounds():
    server, state = begun()
    for _ in range(3):
        state, _ = server.step(state, [reply(9, state.version, 1.0), reply(0, state.version + 1, 1.0)])
    assert state.refused == Counter({"unknown client": 3, "another version": 3})
    assert torch.equal(state.model, torch.zeros(3))


def test_a_refused_reply_makes_room_for_a_good_one_of_the_same_client():
    server, state = begun()
    state, _ = server.step(state, [reply(1, 0, float("nan")), reply(1, 0, 2.0), reply(1, 0, 5.0)])
    assert torch.equal(state.model, torch.full((3,), 2.0))
    assert state.refused == {"not finite": 1, "duplicate": 1}


def test_of_two_versions_of_a_client_the_newer_counts_whatever_came_first():
    for order in ((0, 1), (1, 0)):
        server, state = begun(TakesAnyVersion())
        state, _ = server.step(state, [])
        replies = [reply(1, 0, 7.0), reply(1, 1, 2.0)]
        state, _ = server.step(state, [replies[i] for i in order])
        assert torch.equal(state.model, torch.full((3,), 2.0))
        assert state.refused == {"duplicate": 1}


def test_models_of_16_bit_are_averaged():
    server = Server(FedAvg(), 2)
    state = server.begin(torch.ones(3, dtype=torch.bfloat16), 2)
    values = [torch.full((2,), 0.5 + i, dtype=torch.bfloat16) for i in range(2)]
    replies = [reply(i, 0, 0, tensors={"delta": value, "rest": value[:1]}) for i, value in enumerate(values)]
    state, _ = server.step(state, replies)
    assert state.model.dtype == torch.bfloat16
    assert state.model.tolist() == [2.0, 2.0, 1.0]


def test_models_that_are_all_head_or_have_a_tail():
    server, state = begun(FedAU())
    doubled = FedAvg(server_lr=2.0)
    with_tail = Server(doubled, 2).begin(torch.zeros(3), 4)
    replies = [
        reply(i, 0, 0, num_samples=1 + 2 * i, tensors={"delta": torch.full((2,), value), "rest": torch.tensor([value])})
        for i, value in enumerate((1.0, 3.0))
    ]
    ended, _ = Server(doubled, 2).step(with_tail, replies)
    assert ended.model.tolist() == [5.0, 5.0, 2.5]  # the tail is the mean, whatever the step
    state, _ = server.step(state, [reply(0, 0, 1.0)])
    assert state.model.tolist() == [0.25] * 3


def test_registering_clients_is_checked():
    server = Server(FedAvg(), 3)
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(ConfigError, match=r"num_clients must be an integer of at least 1, got .*; "):
            server.begin(torch.zeros(3), wrong)
    _, state = begun()
    with pytest.raises(ConfigError, match="count must be an integer of at least 0, got -1; "):
        server.add_clients(state, -1)
    with pytest.raises(ConfigError, match="model must be a flat vector of at least 4 elements"):
        Server(FedAvg(), 4).begin(torch.zeros(3), 2)


def test_the_servers_model_is_its_own():
    model = torch.zeros(3)
    state = Server(FedAvg(), 3).begin(model, 2)
    model.fill_(9.0)
    assert torch.equal(state.model, torch.zeros(3))


# -- client ------------------------------------------------------------------------------------------------------------


def step(algorithm, *, optimizer=None, batches=None, kept=None, model=None, loss=mean_squared_error, **changed):
    model = model or linear()
    layout = Layout(model)
    server = Server(algorithm, layout.num_trained)
    sent = server.broadcast(server.begin(layout.read(model), NUM_CLIENTS))
    optimizer = optimizer or (lambda p: torch.optim.SGD(p, lr=LR))
    client = Client(algorithm=algorithm, loss=loss, optimizer=optimizer, **changed)
    batches = batches_of(1, (0, 3)) if batches is None else batches
    return client.step(model, layout, kept or {}, sent, batches, client=1, num_samples=30)


def test_reply_says_what_the_client_has_done():
    kept, sent = step(FedAvg())
    assert (sent.client, sent.version, sent.num_samples, sent.num_steps) == (1, 0, 30, 3)
    assert kept == {}
    y = START.copy()
    for k in range(3):
        y = y - LR * gradient(1, k, y)
    np.testing.assert_allclose(sent.delta.numpy(), y - START, rtol=1e-12, atol=1e-12)


def test_any_torch_optimizer_takes_the_local_steps_anew_in_each_round():
    made = []

    def momentum(parameters):
        made.append(torch.optim.SGD(parameters, lr=LR, momentum=0.9, weight_decay=0.1))
        return made[-1]

    first, again = step(FedAvg(), optimizer=momentum)[1], step(FedAvg(), optimizer=momentum)[1]
    y, velocity = START.copy(), np.zeros(NUM_VALUES)
    for k in range(3):
        velocity = 0.9 * velocity + gradient(1, k, y) + 0.1 * y
        y = y - LR * velocity
    np.testing.assert_allclose(first.delta.numpy(), y - START, rtol=1e-12, atol=1e-12)
    assert torch.equal(first.delta, again.delta)
    assert len(made) == 2


def test_clipping_is_of_the_gradient_and_its_correction_together():
    algorithm, own = Scaffold(), torch.tensor([30.0, 0.0, 0.0, -40.0], dtype=torch.float64)
    _, sent = step(algorithm, max_norm=0.5, kept={"control": own})
    y = START.copy()
    for k in range(3):
        total = gradient(1, k, y) - own.numpy()
        y = y - LR * total * min(1.0, 0.5 / np.linalg.norm(total))
    np.testing.assert_allclose(sent.delta.numpy(), y - START, rtol=1e-12, atol=1e-12)
    unclipped = step(FedProx(), max_norm=1e9)[1]
    assert torch.equal(unclipped.delta, step(FedProx())[1].delta)


def test_the_learning_rate_is_the_mean_of_those_used():
    class Falling(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.param_groups[0]["lr"] /= 2

    kept, sent = step(Scaffold(), optimizer=lambda p: Falling(p, lr=LR))
    mean = LR * (1 + 0.5 + 0.25) / 3
    torch.testing.assert_close(kept["control"], -sent.delta / (3 * mean), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fedspeed", "feddyn"])
def test_without_batches_a_client_says_so_and_keeps_what_it_has(name):
    algorithm = FederatedAlgorithm.from_dict({"algorithm": name})
    before = {name: torch.ones(NUM_VALUES, dtype=torch.float64) for name in algorithm.kept}
    kept, sent = step(algorithm, batches=[], kept=before)
    assert (sent.num_samples, sent.num_steps) == (0, 0)
    assert all(not tensor.any() for tensor in sent.tensors.values())
    assert set(sent.tensors) == {"delta", *algorithm.sends}
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("name", ["scaffold", "fedspeed", "feddyn"])
def test_a_round_that_is_not_finite_is_refused_and_forgotten(name):
    algorithm = FederatedAlgorithm.from_dict({"algorithm": name})
    job = Job(algorithm)
    job.round((0, 1))
    before = {name: tensor.clone() for name, tensor in job.kept[1].items()}
    inputs, targets = batches_of(1, (0, 1))[0]
    job.kept[1], broken = job.client.step(
        job.model, job.layout, job.kept[1], job.broadcast, [(inputs, targets * torch.inf)], client=1, num_samples=1
    )
    assert not broken.delta.isfinite().all()
    assert all(torch.equal(job.kept[1][name], tensor) for name, tensor in before.items())
    model = job.state.model
    job.state, job.broadcast = job.server.step(job.state, [broken])
    assert job.state.refused == {"not finite": 1}
    assert torch.equal(job.state.model, model)
    assert np.isfinite(job.round((1,))).all()


@pytest.mark.parametrize("algorithm", [FedAvg(), FedSpeed(rho=0.4, alpha=0.7)])
def test_weight_decay_is_of_the_objective(algorithm):
    def decayed(model, batch):
        return mean_squared_error(model, batch) + 0.05 * sum(p.square().sum() for p in model.parameters())

    batches = batches_of(1, (0, 3))
    found = step(algorithm, batches=batches, weight_decay=0.1)[1]
    expected = step(algorithm, batches=batches, loss=decayed)[1]
    torch.testing.assert_close(found.delta, expected.delta, rtol=1e-12, atol=1e-12)
    assert not torch.equal(found.delta, step(algorithm, batches=batches)[1].delta)


class WithSpare(nn.Module):
    """One layer that the loss does not use, and one that is frozen."""

    def __init__(self):
        super().__init__()
        self.used = linear()
        self.spare = nn.Linear(2, 2).double()
        self.frozen = nn.Linear(2, 2).double().requires_grad_(False)

    def forward(self, x):
        return self.used(x)


def test_unused_and_frozen_parameters_stay():
    model = WithSpare()
    layout = Layout(model)
    before = model.frozen.weight.clone()
    _, sent = step(FedSpeed(), model=model)
    assert set(sent.tensors) == {"delta"}
    assert torch.equal(model.frozen.weight, before)
    moved = layout.split(sent.delta)
    assert moved["used.weight"].all()
    assert not any(moved[name].any() for name in moved if name != "used.weight")
    assert model.frozen.weight.grad is None


def test_the_ascent_step_is_taken_back():
    seen = []

    def watched(model, batch):
        seen.append(model.weight.detach().clone())
        return mean_squared_error(model, batch)

    step(FedSpeed(rho=0.5), loss=watched, batches=batches_of(1, (0, 2)))
    here, uphill, _, _ = seen
    torch.testing.assert_close((uphill - here).norm().item(), 0.5, rtol=1e-12, atol=1e-12)
    model = linear()
    step(FedSpeed(rho=0.5), model=model, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), batches=batches_of(1, (0, 2)))
    assert torch.equal(model.weight, here)

"""Clipped sums of per-sample gradients: right, bounded in what one sample can do, and in what they need of memory."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distopt.errors import CompatibilityError, ConfigError
from distopt.federated import DPGD, ClientData, FedAvg, Simulation
from distopt.federated.privacy import clipped_sum

FEATURES = 4


def linear(scale=1.0):
    model = nn.Linear(FEATURES, 1).double()
    with torch.no_grad():
        model.weight.copy_(scale * torch.arange(1.0, FEATURES + 1))
        model.bias.fill_(0.5 * scale)
    return model


def square(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def of_one(model, sample):
    """(d,) by plain autograd."""
    loss = square(model, tuple(part[None] for part in sample))
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])


def clip(vector, bound):
    return vector * min(1.0, bound / float(vector.norm()))


def samples(count, seed=0):
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, FEATURES, generator=random, dtype=torch.float64)
    return inputs, torch.randn(count, 1, generator=random, dtype=torch.float64)


def summed(model, batch, bound, **options):
    return clipped_sum(model, list(model.parameters()), square, batch, bound, **options)


@pytest.mark.parametrize("bound", [0.01, 1.0, 1e6])
def test_it_is_the_sum_of_each_sample_s_clipped_gradient(bound):
    model, batch = linear(), samples(23)
    expected = sum(clip(of_one(model, sample), bound) for sample in zip(*batch, strict=True))
    torch.testing.assert_close(summed(model, batch, bound), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bound", [0.01, 1.0, 1e6])
def test_of_differences_it_is_the_difference_that_is_clipped(bound):
    here, there, batch = linear(), linear(0.7), samples(23)
    previous = torch.cat([p.detach().reshape(-1) for p in there.parameters()])
    pairs = zip(*batch, strict=True)
    expected = sum(clip(of_one(here, sample) - of_one(there, sample), bound) for sample in pairs)
    torch.testing.assert_close(summed(here, batch, bound, previous=previous), expected, rtol=1e-12, atol=1e-12)


def test_memory_is_bounded_and_changes_nothing(monkeypatch):
    model, batch, seen = linear(), samples(23), []

    def counting(model, batch):
        seen.append(len(batch[0]))
        return square(model, batch)

    whole = summed(model, batch, 0.5)
    import distopt.federated.privacy.per_sample as module

    split, sizes = module._chunks, []
    monkeypatch.setattr(module, "_chunks", lambda batch, size: sizes.append(size) or split(batch, size))
    for limit, size in ((1, 1), (3 * 5 * 8 * 7, 7), (1 << 20, (1 << 20) // (3 * 5 * 8))):
        torch.testing.assert_close(summed(model, batch, 0.5, limit_bytes=limit), whole, rtol=1e-12, atol=1e-12)
        assert sizes[-1] == size
    clipped_sum(model, list(model.parameters()), counting, batch, 0.5)
    assert seen == [1]  # what the loss is given is a batch of one


def test_no_samples_are_zeros_and_a_bound_of_zero_is_too():
    model = linear()
    assert torch.equal(summed(model, samples(0), 1.0), torch.zeros(5, dtype=torch.float64))
    assert torch.equal(summed(model, samples(3), 0.0), torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_a_sample_whose_gradient_is_not_finite_counts_as_zero(value):
    model, (inputs, targets) = linear(), samples(5)
    expected = summed(model, (inputs[1:], targets[1:]), 1.0)
    inputs[0] = value
    found = summed(model, (inputs, targets), 1.0)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_frozen_parameters_are_left_out():
    model = linear()
    model.bias.requires_grad_(False)
    found = clipped_sum(model, [model.weight], square, samples(9), 1e9)
    torch.testing.assert_close(found, summed(model, samples(9), 1e9)[:FEATURES], rtol=1e-12, atol=1e-12)


def test_float32_models_have_their_norms_in_float64():
    model = linear().float()
    inputs, targets = (part.float() for part in samples(3))
    inputs[0] = 1e18  # the gradient is finite, its square is not in float32
    found = clipped_sum(model, list(model.parameters()), square, (inputs, targets), 1.0)
    alone = clipped_sum(model, list(model.parameters()), square, (inputs[:1], targets[:1]), 1.0)
    assert found.isfinite().all()
    assert float(alone.norm()) == pytest.approx(1.0)


# -- sensitivity: what one sample can do -------------------------------------------------------------------------------

ADVERSARIES = st.sampled_from(["zero", "huge", "opposite", "duplicate", "nan", "random"])


def adversarial(kind, inputs, targets, place, seed):
    inputs, targets = inputs.clone(), targets.clone()
    random = torch.Generator().manual_seed(seed)
    if kind == "zero":
        inputs[place] = 0.0
        targets[place] = 0.5  # the bias: no residual
    if kind == "huge":
        inputs[place] = 1e6 * torch.randn(FEATURES, generator=random, dtype=torch.float64)
    if kind == "opposite":
        targets[place] = (
            2 * (inputs[place] @ torch.arange(1.0, FEATURES + 1, dtype=torch.float64) + 0.5) - targets[place]
        )
    if kind == "duplicate":
        inputs[place], targets[place] = inputs[0], targets[0]
    if kind == "nan":
        inputs[place] = float("nan")
    if kind == "random":
        inputs[place] = torch.randn(FEATURES, generator=random, dtype=torch.float64)
    return inputs, targets


def mean_over_clients(parts, inputs, targets, bound, previous, limit_bytes):
    model, total = linear(), torch.zeros(FEATURES + 1, dtype=torch.float64)
    for part in parts:
        batch = inputs[part], targets[part]
        total += summed(model, batch, bound, previous=previous, limit_bytes=limit_bytes) / len(part)
    return total / len(parts)


@settings(max_examples=25)
@given(
    size=st.integers(1, 12),
    place=st.integers(0, 10**6),
    kind=ADVERSARIES,
    seed=st.integers(0, 2**31),
    bound=st.sampled_from([1e-3, 0.7, 50.0]),
    differences=st.booleans(),
    chunk=st.integers(1, 6),
)
def test_replacing_one_sample_moves_the_mean_by_at_most_2c_over_np(size, place, kind, seed, bound, differences, chunk):
    """Two clients, 13 samples and fewer, in chunks that leave a short last one: any place, any adversary."""
    inputs, targets = samples(13 + size, seed % 100)
    parts = [torch.arange(13), torch.arange(13, 13 + size)]
    other = adversarial(kind, inputs, targets, place % (13 + size), seed)
    previous = torch.randn(FEATURES + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options = (bound, previous if differences else None, chunk * 3 * 5 * 8)
    moved = mean_over_clients(parts, inputs, targets, *options) - mean_over_clients(parts, *other, *options)
    assert float(moved.norm()) <= 2 * bound / (min(13, size) * 2) * (1 + 1e-9)


@pytest.mark.parametrize("place", [0, 7, 12])
def test_the_bound_is_reached_wherever_the_sample_is(place):
    """A sample against its opposite: a mean of batch means (10 and 3 samples) would move by 2C/(2*3) at the last."""
    inputs, targets = samples(13)
    part, bound = [torch.arange(13)], 0.01
    other = adversarial("opposite", inputs, targets, place, 0)
    found = mean_over_clients(part, inputs, targets, bound, None, 10 * 3 * 5 * 8)
    moved = found - mean_over_clients(part, *other, bound, None, 10 * 3 * 5 * 8)
    assert float(moved.norm()) == pytest.approx(2 * bound / 13, rel=1e-9)


def test_the_same_holds_for_what_a_client_of_a_whole_job_sends():
    """End to end: two jobs that differ in one sample, in the last short batch of the default batch size."""
    inputs, targets = samples(70)
    parts = [np.arange(35), np.arange(35, 70)]
    other = adversarial("opposite", inputs, targets, 34, 0)  # of batches of 32 the first client's last has 3
    models = []
    for data in ((inputs, targets), other):
        model = linear()
        algorithm = DPGD(lr=1.0, clip=0.01, epsilon=1e8, num_clients=2, fewest_samples=35, rounds=1, noise_seed=0)
        Simulation(model=model, clients=ClientData(data, parts), algorithm=algorithm, loss=square).run(1)
        models.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    moved = float((models[0] - models[1]).norm())
    assert moved == pytest.approx(2 * 0.01 / (35 * 2), rel=1e-2)  # but for noise of 1e-4 of it


# -- models that will not do -------------------------------------------------------------------------------------------


def job(model, loss=square, algorithm=None):
    inputs, targets = samples(8)
    data = ClientData((inputs, targets), [np.arange(4), np.arange(4, 8)])
    algorithm = algorithm or DPGD(num_clients=2, fewest_samples=4)
    return Simulation(model=model.double(), clients=data, algorithm=algorithm, loss=loss)


def test_batch_norm_and_dropout_are_refused_by_name():
    for layer, said in (
        (nn.BatchNorm1d(FEATURES), "got the BatchNorm1d '0', whose output for a sample depends on the others"),
        (nn.BatchNorm1d(FEATURES, track_running_stats=False), "BatchNorm1d '0'"),
        (nn.Dropout(0.1), r"draws nothing, got the Dropout '0' with p=0\.1"),
    ):
        model = nn.Sequential(layer, nn.Linear(FEATURES, 1))
        with pytest.raises(CompatibilityError, match=said):
            job(model)
        job(model, algorithm=FedAvg())
    job(nn.Sequential(nn.LayerNorm(FEATURES), nn.Dropout(0.0), nn.Linear(FEATURES, 1))).run(1)


def test_a_loss_that_vmap_cannot_compute_is_refused_before_the_first_round():
    def drawing(model, batch):
        return square(model, (batch[0] + torch.randn_like(batch[0]), batch[1]))

    def branching(model, batch):
        return square(model, batch) * (2.0 if float(batch[1].sum()) > 0 else 1.0)

    for loss in (drawing, branching):
        with pytest.raises(
            ConfigError, match=r"torch.func.vmap must be able to compute loss\(model, batch\) for 'dp-gd'"
        ):
            job(nn.Linear(FEATURES, 1), loss=loss)

"""Fisher-weighted averages against numpy; the diagonal Fisher information against logistic regression's closed form."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distopt.errors import ConfigError
from distopt.federated import diagonal_fisher, fisher_average, uniform_weights
from distopt.federated.rows import _CPU_BLOCK_NUMEL as BLOCK
from distopt.federated.rows import weighted_rows


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 8),
    d=st.integers(0, 40),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    floor=st.sampled_from([1e-6, 0.5]),
    random=st.randoms(use_true_random=False),
)
def test_average_is_numpy_s_in_any_order_of_arrival(m, d, seed, dtype, floor, random):
    thetas, fishers = drawn(m, d, seed=seed, dtype=dtype), drawn(m, d, seed=seed + 1, dtype=dtype).square()
    weights = np.random.default_rng(seed).uniform(0.1, 2.0, m)
    precisions = weights[:, None] * np.maximum(fishers.double().numpy(), floor)
    expected = torch.from_numpy((precisions * thetas.double().numpy()).sum(0) / precisions.sum(0)).to(dtype)
    found = fisher_average(thetas, fishers, torch.from_numpy(weights), floor)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
    ids, arrival = sorted(random.sample(range(50), m)), random.sample(range(m), m)
    replies = [thetas[i] for i in arrival], [fishers[i] for i in arrival], weights[arrival].tolist()
    assert torch.equal(fisher_average(*replies, floor, ids=[ids[i] for i in arrival]), found)


@pytest.mark.parametrize("length", [BLOCK - 1, BLOCK, BLOCK + 3])
def test_equal_information_gives_the_weighted_average(length):
    thetas = drawn(3, length)
    fishers = drawn(length, seed=1).square().expand(3, -1)
    found = fisher_average(thetas, fishers, [0.5, 0.25, 0.25])
    torch.testing.assert_close(found, weighted_rows(list(thetas), [0.5, 0.25, 0.25]), rtol=1e-12, atol=1e-12)


def test_where_nobody_knows_it_is_the_average_and_where_one_does_it_is_that_one():
    thetas = torch.tensor([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    fishers = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1e6]])
    assert fisher_average(thetas, fishers, uniform_weights(2)).tolist() == pytest.approx([2.0, 1.0, 3.0], abs=1e-5)


def test_a_client_of_weight_zero_is_not_read_and_nothing_to_average_is_said():
    thetas, fishers = drawn(2, 3), torch.ones(2, 3)
    thetas[0], fishers[0] = torch.nan, -1.0
    torch.testing.assert_close(fisher_average(thetas, fishers, [0, 2]), thetas[1])
    assert fisher_average(thetas, fishers, [0, 0]) is None
    assert fisher_average([], [], []) is None


def test_the_replies_are_not_changed():
    thetas, fishers = drawn(2, 3), torch.zeros(2, 3, dtype=torch.float64)
    kept = thetas.clone()
    fisher_average(thetas, fishers, [1, 2])
    assert torch.equal(thetas, kept)
    assert torch.equal(fishers, torch.zeros(2, 3, dtype=torch.float64))


class Logistic(nn.Module):
    """Two classes, logits (0, w x + b): d log p(1) / dw = (1 - p) x, d log p(0) / dw = -p x."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1, dtype=torch.float64)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        z = self.linear(x)
        return torch.cat([torch.zeros_like(z), z], dim=1)


def logistic(n=50):
    torch.manual_seed(0)
    model = Logistic().eval()
    inputs = drawn(n, 3, seed=3)
    with torch.no_grad():
        p = torch.sigmoid(model.linear(inputs)).squeeze(1)
    return model, inputs, p


@pytest.mark.parametrize("batch_size", [1, 7, 50, 64])
def test_exact_information_of_logistic_regression(batch_size):
    model, inputs, p = logistic()
    found = diagonal_fisher(model, inputs, labels="exact", batch_size=batch_size)
    variance = p * (1 - p)
    expected = {"linear.weight": (variance[:, None] * inputs**2).mean(0)[None], "linear.bias": variance.mean()[None]}
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("batch_size", [7, 50])
def test_empirical_information_of_logistic_regression(batch_size):
    model, inputs, p = logistic()
    targets = (drawn(50, seed=4) > 0).long()
    found = diagonal_fisher(model, inputs, targets, labels="empirical", batch_size=batch_size)
    residual = (targets - p) ** 2
    expected = {"linear.weight": (residual[:, None] * inputs**2).mean(0)[None], "linear.bias": residual.mean()[None]}
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)


def test_sampled_information_is_the_exact_one_on_average_and_repeatable():
    model, inputs, p = logistic(20)
    often = inputs.repeat(2000, 1)
    found = diagonal_fisher(model, often, batch_size=8192, generator=torch.Generator().manual_seed(0))
    exact = diagonal_fisher(model, inputs, labels="exact")
    variance = p * (1 - p) ** 4 + (1 - p) * p**4 - (p * (1 - p)) ** 2  # of one sample's squared residual
    deviation = (variance[:, None] * inputs**4).sum(0).sqrt() / 20 / 2000**0.5
    assert ((found["linear.weight"] - exact["linear.weight"]).abs() < 4 * deviation).all()
    assert (deviation < exact["linear.weight"] / 20).all()
    assert (found["linear.bias"] - exact["linear.bias"]).abs() < 4 * variance.sum().sqrt() / 20 / 2000**0.5
    one, other = (diagonal_fisher(model, inputs, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    again = diagonal_fisher(model, inputs, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(one, again, rtol=0.0, atol=0.0)
    assert not torch.equal(one["linear.bias"], other["linear.bias"])


def test_any_likelihood_of_observed_targets():
    """A Gaussian with variance 1: d log p / dw = (y - w x) x."""
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64).eval()
    inputs, targets = drawn(10, 2), drawn(10, 1, seed=1)
    found = diagonal_fisher(
        model, inputs, targets, labels="empirical", log_likelihood=lambda output, y: -((output - y) ** 2).sum() / 2
    )
    expected = (((targets - model(inputs)) * inputs) ** 2).mean(0, keepdim=True).detach()
    torch.testing.assert_close(found, {"weight": expected})


def test_frozen_parameters_have_none_and_tied_ones_one():
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
    second.weight = first.weight
    second.bias.requires_grad_(False)
    model = nn.Sequential(first, nn.Tanh(), second, nn.BatchNorm1d(3, affine=False)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs, targets = drawn(5, 3, dtype=torch.float32), torch.tensor([0, 1, 2, 0, 1])
    found = diagonal_fisher(model, inputs, targets, labels="empirical")
    expected = torch.zeros(3, 3)
    for sample, target in zip(inputs, targets, strict=True):
        model.zero_grad()
        model(sample[None]).log_softmax(1)[0, target].backward()
        expected += first.weight.grad**2 / 5
    torch.testing.assert_close(found, {"0.weight": expected})
    torch.testing.assert_close(model.state_dict(), before, rtol=0.0, atol=0.0)


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda: fisher_average(ONES, -ONES, [1, 1]), "finite and at least 0, got another value at 0"),
        (lambda: fisher_average(ONES, ONES * torch.nan, [1, 1]), "finite and at least 0"),
        (lambda: fisher_average(ONES, ONES * torch.inf, [1, 1]), "finite and at least 0"),
        (lambda: fisher_average(ONES, ONES[:1], [1, 1]), "got 1 and 2 for 2"),
        (lambda: fisher_average(ONES, ONES, [1]), "got 2 and 1 for 2"),
        (lambda: fisher_average(ONES, ONES[:, :2], [1, 1]), "as long as the models, got 2 for 3"),
        (lambda: fisher_average(ONES, ONES, [1, -1]), "weights must be at least 0, got -1.0"),
        (lambda: fisher_average(ONES, ONES, [1, 1], 0.0), "floor must be a number above 0"),
        (lambda: fisher_average(ONES, ONES, [1, 1], ids=[3, 3]), "got 3 twice"),
        (lambda: diagonal_fisher(nn.Linear(3, 2), ONES), "eval mode"),
        (lambda: diagonal_fisher(nn.Linear(3, 2).eval(), ONES, labels="true"), "labels must be one of 'sampled'"),
        (lambda: diagonal_fisher(nn.Linear(3, 2).eval(), ONES, labels="empirical"), "got none with 'empirical'"),
        (lambda: diagonal_fisher(nn.Linear(3, 2).eval(), ONES, ONES), "got some with 'sampled'"),
        (lambda: diagonal_fisher(nn.Linear(3, 2).eval(), ONES, log_likelihood=torch.dot), "must be left out"),
        (lambda: diagonal_fisher(nn.Linear(3, 2).eval(), ONES[:0]), "at least one sample"),
        (lambda: diagonal_fisher(nn.Linear(3, 2).eval(), ONES, batch_size=0), "batch_size must be"),
        (
            lambda: diagonal_fisher(nn.Linear(3, 2).eval(), ONES, torch.zeros(3).long(), labels="empirical"),
            "got 2 inputs and 3 targets",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, rule):
    with pytest.raises(ConfigError, match=rule):
        call()

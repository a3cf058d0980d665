"""AdaGrad-Norm against Ward et al.'s recurrence in numpy, and what users expect of an optimizer of torch."""

import io
import math

import numpy as np
import pytest
import torch
from torch import nn

from distopt.batch import AdaGradNorm
from distopt.errors import CompatibilityError, ConfigError, StateMismatchError

SHAPES = [(3, 2), (4,), ()]


def parameters(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)) for shape in SHAPES]


def give_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, dtype=torch.float64, generator=generator).to(parameter.dtype)


def vector(tensors):
    return np.concatenate([tensor.detach().double().numpy().reshape(-1) for tensor in tensors])


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_is_the_recurrence_of_the_paper(maximize, weight_decay):
    params = parameters()
    optimizer = AdaGradNorm(
        params, lr=0.5, initial_accumulator_value=0.25, weight_decay=weight_decay, maximize=maximize
    )
    x, b_squared = vector(params), 0.25
    for step in range(5):
        give_gradients(params, step)
        gradient = vector(parameter.grad for parameter in params) * (-1 if maximize else 1) + weight_decay * x
        b_squared += gradient @ gradient
        x = x - 0.5 / math.sqrt(b_squared) * gradient
        optimizer.step()
        np.testing.assert_allclose(vector(params), x, rtol=1e-12)
    assert optimizer.param_groups[0]["sum_of_squares"].item() == pytest.approx(b_squared, rel=1e-12)


def test_the_norm_is_over_a_group_and_each_group_has_its_own():
    one, other = parameters(), parameters(seed=1)
    optimizer = AdaGradNorm([{"params": one}, {"params": other, "lr": 0.1}])
    before = vector(one), vector(other)
    for params in (one, other):
        give_gradients(params, 0)
    other[1].grad = None  # has no part in the step
    optimizer.step()
    assert np.linalg.norm(vector(one) - before[0]) == pytest.approx(1.0)  # the first step: lr long
    assert np.linalg.norm(vector(other) - before[1]) == pytest.approx(0.1)
    np.testing.assert_array_equal(vector(other)[6:10], before[1][6:10])


def test_nothing_moves_and_nothing_is_nan_where_every_gradient_is_zero():
    params = parameters()
    before = vector(params)
    for parameter in params:
        parameter.grad = torch.zeros_like(parameter)
    AdaGradNorm(params).step()
    np.testing.assert_array_equal(vector(params), before)


def test_stopped_saved_and_resumed_is_uninterrupted():
    straight, resumed = parameters(), parameters()
    whole, first = AdaGradNorm(straight, lr=0.3), AdaGradNorm(resumed, lr=0.3)
    for step in range(6):
        if step == 3:
            file = io.BytesIO()
            torch.save(first.state_dict(), file)
            file.seek(0)
            first = AdaGradNorm(resumed, lr=7.0)
            first.load_state_dict(torch.load(file, weights_only=True))
        for params, optimizer in ((straight, whole), (resumed, first)):
            give_gradients(params, step)
            optimizer.step()
    np.testing.assert_array_equal(vector(straight), vector(resumed))
    with pytest.raises(StateMismatchError, match="sum_of_squares"):
        first.load_state_dict(torch.optim.SGD(parameters(), 0.1).state_dict())


def test_16_bit_parameters_keep_a_sum_in_32_bits():
    params = parameters(torch.bfloat16)
    optimizer = AdaGradNorm(params, initial_accumulator_value=1e4)
    give_gradients(params, 0)
    squares = sum(float(parameter.grad.double().square().sum()) for parameter in params)
    optimizer.step()
    assert params[0].dtype == torch.bfloat16
    assert optimizer.param_groups[0]["sum_of_squares"].item() == pytest.approx(1e4 + squares, rel=1e-6)


def test_a_closure_and_any_rate_bring_it_down():
    target = torch.tensor([3.0, -1.0])
    for lr in (0.05, 1.0, 100.0):  # what Ward et al. promise: converges whatever the rate is
        x = nn.Parameter(torch.zeros(2))
        optimizer = AdaGradNorm([x], lr=lr)

        def closure(x=x, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (x - target).square().sum()
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(300)]
        assert losses[-1] < losses[0] / 2


def test_complex_parameters_move_as_pairs_of_real_ones():
    real = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    pair = nn.Parameter(torch.view_as_complex(real.detach().clone()))
    gradient = torch.tensor([[0.5, -1.0], [0.0, 2.0]])
    real.grad, pair.grad = gradient, torch.view_as_complex(gradient.clone())
    AdaGradNorm([real]).step()
    AdaGradNorm([pair]).step()
    torch.testing.assert_close(torch.view_as_real(pair.detach()), real.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["lr", "weight_decay", "initial_accumulator_value"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_bad_settings(name, value):
    with pytest.raises(ConfigError, match=rf"{name} must be a finite number of at least 0, got {value!r}"):
        AdaGradNorm(parameters(), **{name: value})


def test_a_sparse_gradient_is_refused():
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = AdaGradNorm(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(CompatibilityError, match="got a sparse one"):
        optimizer.step()

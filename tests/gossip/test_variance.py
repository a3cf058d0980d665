"""Variance-corrected averaging: what it restores, and the faults of other implementations as negative controls."""

import math

import pytest
import torch

from distopt.errors import ConfigError
from distopt.gossip import variance_corrected
from distopt.gossip.variance import respread_factors, row_variances


def drawn(count, *shape, seed=0, dtype=torch.float64, scale=1.0, shift=0.0):
    random = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=random, dtype=torch.float64) + shift).to(dtype) for _ in range(count)]


def var(tensor):
    return float(tensor.double().var(correction=0))


@pytest.mark.parametrize("count", [2, 4, 16])
@pytest.mark.parametrize("width", [512, 4096])
def test_the_spread_of_uncorrelated_tensors_comes_back_whole(count, width):
    tensors = drawn(count, width, scale=width**-0.5, shift=0.01)  # small as initial weights are
    out = variance_corrected(tensors)
    average = sum(tensors) / count
    target = sum(var(t) for t in tensors) / count
    assert out.mean().item() == pytest.approx(average.mean().item(), abs=1e-15)
    factor = min(math.sqrt(target / var(average)), math.sqrt(count))
    assert math.sqrt(var(out) / var(average)) == pytest.approx(factor, rel=1e-12)
    assert factor == pytest.approx(math.sqrt(count), rel=0.05)
    torch.testing.assert_close(out, (average - average.mean()) * factor + average.mean(), rtol=1e-9, atol=1e-15)


def test_an_absolute_epsilon_would_correct_too_little():
    """The fault of eps=1e-4 inside the root: 3.04 instead of 4 at width 512, 1.73 at 4096."""
    for width, faulty in ((512, 3.04), (4096, 1.73)):
        tensors = drawn(16, width * width // 64, scale=width**-0.5)
        average = sum(tensors) / 16
        assert math.sqrt((1 / width + 1e-4) / (var(average) + 1e-4)) == pytest.approx(faulty, rel=0.05)
        assert math.sqrt(var(variance_corrected(tensors)) / var(average)) == pytest.approx(4.0, rel=0.01)


def test_the_inputs_stay_as_they_are_also_where_the_output_replaces_one():
    """The fault of mixing in place first and taking the variances afterwards: 1.0 becomes 0.695."""
    tensors = drawn(2, 10_000)
    before = [t.clone() for t in tensors]
    tensors[0].copy_(variance_corrected(tensors))
    assert var(tensors[0]) == pytest.approx(1.0, rel=0.05)
    assert torch.equal(tensors[1], before[1])
    assert not torch.equal(tensors[0], before[0])


def test_equal_tensors_are_left_alone():
    (tensor,) = drawn(1, 100)
    torch.testing.assert_close(variance_corrected([tensor, tensor, tensor]), tensor, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("tensor", [torch.zeros(8), torch.ones(8), torch.full((8,), 3e4), torch.ones(1), torch.ones(0)])
def test_tensors_without_spread_are_averaged(tensor):
    out = variance_corrected([tensor, tensor])
    assert torch.equal(out, tensor)
    factors, ratio = respread_factors(tensor.view(1, -1), row_variances(tensor.view(1, -1)), 0.5)
    assert (float(factors), float(ratio)) == (1.0, 1.0)  # and not 0/0


def test_opposite_tensors_do_not_blow_rounding_up():
    (tensor,) = drawn(1, 100)
    out = variance_corrected([tensor, -tensor])
    assert torch.equal(out, torch.zeros_like(out))
    noisy = variance_corrected([tensor, -tensor * (1 + 1e-9)])
    assert noisy.abs().max() < 1e-8


def test_the_factor_is_bounded_by_the_weights():
    tensors = drawn(3, 1000)
    weights = [0.5, 0.3, 0.2]
    correlated = [tensors[0], -tensors[0] + 0.01 * tensors[1], tensors[2]]  # cancels more than independence would
    average = sum(w * t for w, t in zip(weights, correlated, strict=True))
    out = variance_corrected(correlated, weights)
    assert math.sqrt(var(out) / var(average)) <= 1 / math.sqrt(sum(w * w for w in weights)) + 1e-12


def test_a_thousand_rounds_do_not_inflate():
    tensors = drawn(4, 500, dtype=torch.float32)
    for _ in range(1000):
        mixed = [variance_corrected([tensors[i], tensors[(i + 1) % 4]]) for i in range(4)]
        tensors = mixed
    assert 0.5 < var(tensors[0]) < 1.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_computed_in_32(dtype):
    tensors = drawn(4, 4096, dtype=dtype, shift=5.0)
    expected = variance_corrected([t.float() for t in tensors])
    out = variance_corrected(tensors)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("tensors", "weights", "message"),
    [
        ([], None, "one or more, of one shape and dtype"),
        ([torch.ones(2), torch.ones(3)], None, "of one shape and dtype"),
        ([torch.ones(2, dtype=torch.int64)], None, "of a floating dtype, got torch.int64; leave counters"),
        ([torch.ones(2)] * 2, [0.5, 0.6], "add up to 1"),
        ([torch.ones(2)] * 2, [1.5, -0.5], "at least 0"),
        ([torch.ones(2)] * 2, [1.0], "must be 2 numbers"),
    ],
)
def test_bad_input(tensors, weights, message):
    with pytest.raises(ConfigError, match=message):
        variance_corrected(tensors, weights)

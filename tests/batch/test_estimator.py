"""The estimators are unbiased for any number of gradients, by Monte Carlo; others are wrong by as much as is said."""

import math

import numpy as np
import pytest
import torch

from distopt.batch import estimator
from distopt.batch.sums import Sums

DIM, SAMPLES, TRIALS = 64, 4, 6000
DEVIATIONS = np.linspace(0.2, 1.8, DIM)
TRACE = float((DEVIATIONS**2).sum())
SIGNAL = np.full(DIM, 0.4)
SQUARE = float(SIGNAL @ SIGNAL)


def mean_gradients(num_gradients, trials=TRIALS, samples=SAMPLES, seed=0):
    """Gradients that are each the mean over so many samples, shape (trials, J, DIM)."""
    generator = np.random.default_rng((seed, num_gradients))
    return SIGNAL + DEVIATIONS / samples**0.5 * generator.standard_normal((trials, num_gradients, DIM))


def sums_of(gradients, samples=SAMPLES):
    """Of the gradients of one trial, shape (J, DIM)."""
    mean = gradients.mean(0)
    return Sums(
        num_gradients=len(gradients),
        samples=samples,
        squares=float((gradients**2).sum()),
        square_of_mean=float(mean @ mean),
        projections=float(((gradients @ mean) ** 2).sum()),
        coordinate_ratio=0.0,
    )


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_trace_and_square_are_unbiased(ranks):
    num_gradients = max(ranks, 2)  # one rank takes two consecutive gradients
    rows = mean_gradients(num_gradients, seed=ranks)
    found = [sums_of(row).quantities("norm") for row in rows]
    traces, squares = (np.array([each[name] for each in found]) for name in ("trace", "square"))
    for values, expected in ((traces, TRACE), (squares, SQUARE)):
        error = values.std() / math.sqrt(TRIALS)
        assert error < 0.006 * expected  # so that 1/J in place of 1/(J - 1), 12.5% at J = 8, is many deviations off
        assert abs(values.mean() - expected) < 4 * error
    if ranks <= 2:
        assert (squares < 0).any()  # why single tests are averaged before they are cut at 0


def test_one_over_j_is_wrong_by_two_for_two_gradients():
    rows = mean_gradients(2)
    wrong = SAMPLES / 2 * ((rows**2).sum((1, 2)) - 2 * (rows.mean(1) ** 2).sum(1))
    assert wrong.mean() == pytest.approx(TRACE / 2, rel=0.02)


def test_the_published_sum_of_variances_counts_too_much():
    """Within a rank with 1/(m - 1), plus between ranks with 1/J: too much by (J - 1)/(J m), 23.4% at 16 x 4."""
    ranks = 16
    generator = np.random.default_rng(0)
    samples = SIGNAL + DEVIATIONS * generator.standard_normal((1000, ranks, SAMPLES, DIM))
    means = samples.mean(2)
    published = samples.var(2, ddof=1).sum(-1).mean(-1) + means.var(1).sum(-1)
    assert published.mean() / TRACE == pytest.approx(1 + (ranks - 1) / (ranks * SAMPLES), rel=0.01)
    ours = np.array([sums_of(row).quantities("norm")["trace"] for row in means])
    assert ours.mean() / TRACE == pytest.approx(1.0, rel=0.01)


def test_variances_of_the_augmented_test():
    """Along gbar and across it: together the trace, and along it the variance of the inner product over |gbar|^2."""
    rows = mean_gradients(8, trials=3000, samples=500)  # little noise: gbar is G
    found = [sums_of(row, samples=500).quantities("augmented") for row in rows]
    along = np.array([each["inner_product"] for each in found])
    across = np.array([each["orthogonal"] for each in found])
    expected = float((DEVIATIONS**2 * SIGNAL**2).sum())  # Var <g_i, G>
    assert along.mean() == pytest.approx(expected, rel=0.04)
    assert across.mean() == pytest.approx(TRACE - expected / SQUARE, rel=0.01)


def test_coordinate_ratio_is_the_least_over_coordinates():
    rows = torch.tensor([[1.0, 2.0, 0.0, 5.0], [3.0, 2.0, 0.0, -4.0]])
    mean = rows.mean(0)
    ratio = estimator.coordinate_ratio(mean, rows.square().sum(0), num_gradients=2, samples=10)
    variances = 10 * rows.var(0)
    assert ratio == pytest.approx(float(mean[3] ** 2 / variances[3]))  # the others have 4/20 and no noise
    assert estimator.coordinate_test(ratio, eta=0.5) == pytest.approx(1 / (0.25 * ratio))
    agreed = torch.ones(3)
    assert estimator.coordinate_ratio(agreed, 2 * agreed, num_gradients=2, samples=10) == math.inf
    assert estimator.coordinate_test(math.inf, eta=0.5) == 0.0


def test_batches_that_just_pass():
    trace, square, batch = 12.0, 0.5, 37.0
    needed = estimator.norm_test(trace, square, eta=0.3)
    assert trace / needed == pytest.approx(0.3**2 * square)
    needed = estimator.inner_product_test(batch, square, theta=0.2)
    assert batch / needed == pytest.approx(0.2**2 * square**2)
    needed = estimator.orthogonality_test(batch, square, nu=2.0)
    assert batch / needed == pytest.approx(2.0**2 * square)
    assert estimator.noise_scale(trace, square) == 24.0
    assert estimator.noise_scale(trace, -square) == math.inf
    assert estimator.noise_scale(0.0, -square) == 0.0


@pytest.mark.parametrize(
    ("needed", "expected"),
    [(0.0, 96), (90.0, 96), (96.5, 100), (133.0, 136), (1e9, 192), (math.inf, 192)],
)
def test_a_batch_never_shrinks_and_grows_by_no_more_than_the_factor(needed, expected):
    assert estimator.grown(96, needed, growth=2.0, largest=1000, multiple=4) == expected


def test_a_batch_ends_at_the_largest():
    assert estimator.grown(96, math.inf, growth=1e9, largest=120, multiple=4) == 120
    assert estimator.grown(120, math.inf, growth=1e9, largest=120, multiple=4) == 120


def test_averages_are_the_plain_mean_until_the_window_is_full():
    averages = estimator.Averages(4)
    for value in (1.0, 2.0, 6.0):
        averages.add({"a": value})
    assert averages.values["a"] == pytest.approx(3.0)
    assert not averages.is_settled
    averages.add({"a": 7.0})
    averages.add({"a": 0.0})
    assert averages.is_settled
    assert averages.values["a"] == pytest.approx(3.0)  # 4 - 4/4

"""Linear decay and its refinement, against the formulas of 2310.07831 written out, and in a real run."""

import dataclasses
import io
import json
import math
import statistics

import numpy as np
import pytest
import torch
from torch import nn

from distopt.batch import GradientNorms, LinearDecay, RefinedDecay, refined_decay
from distopt.errors import ConfigError


def sgd(lr=0.5):
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(2))]}, {"params": [nn.Parameter(torch.ones(1))]}], lr)


def rates_of(scheduler, amounts=None, *, steps=0):
    """The rates of steps of so many samples, or of so many steps."""
    rates = []
    for amount in amounts or [None] * steps:
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        if amount is None:
            scheduler.step()
        else:
            scheduler.advance_to(scheduler.last_epoch + amount)
    return rates


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("smoothing", [0, 0.1, 1])
def test_equal_norms_are_linear_decay(order, smoothing):
    expected = [(9 - t) / 9 for t in range(10)]
    assert refined_decay([3.0] * 10, order=order, smoothing=smoothing) == pytest.approx(expected, abs=1e-15)
    recorded = RefinedDecay(at=tuple(t / 10 for t in range(10)), factors=tuple(expected))
    optimizer = sgd()
    scheduler = LinearDecay(optimizer, 10, refined=recorded)
    assert rates_of(scheduler, steps=10) == pytest.approx([0.5 * f for f in expected])


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("steps", "smoothing"), [(40, 0), (40, 0.1), (41, 0.25), (40, 1.0), (2, 0.1)])
def test_the_formula_written_out(order, steps, smoothing):
    norms = np.random.default_rng(0).lognormal(size=steps).tolist()
    half = int(smoothing * steps) // 2
    around = [
        [
            norms[0] if i < 0 else norms[i] if i < steps else norms[2 * (steps - 1) - i]
            for i in range(t - half, t + half + 1)
        ]
        for t in range(steps)
    ]
    weights = [1 / statistics.median(window) ** order for window in around]
    eta = [weights[t] * sum(weights[t + 1 :]) for t in range(steps)]
    refined = refined_decay(norms, order=order, smoothing=smoothing)
    assert refined == pytest.approx([value / max(eta) for value in eta], rel=1e-9, abs=1e-15)
    assert max(refined) == 1.0
    assert refined[-1] == 0.0


def test_the_filter_is_scipy_s_as_the_authors_use_it():
    ndimage = pytest.importorskip("scipy.ndimage")
    norms = np.random.default_rng(1).lognormal(size=103)
    width = 2 * (int(0.2 * len(norms)) // 2) + 1
    padded = np.pad(norms, (0, 2 * width), mode="reflect")
    smooth = ndimage.median_filter(padded, size=width, mode="nearest")[: len(norms)]
    assert refined_decay(norms, smoothing=0.2) == pytest.approx(refined_decay(smooth, smoothing=0), rel=1e-12)


def test_norms_that_fall_and_then_stay_give_a_warm_up():
    factors = refined_decay([10.0] * 5 + [1.0] * 45, smoothing=0)
    assert max(factors[:5]) < 0.02
    assert factors[5] == 1.0
    assert list(factors[5:]) == sorted(factors[5:], reverse=True)


def test_a_straight_line_by_steps_and_by_samples():
    scheduler = LinearDecay(sgd(), 10)
    assert rates_of(scheduler, steps=10) == pytest.approx([0.05 * (10 - t) for t in range(10)])
    assert scheduler.get_last_lr() == [0.0, 0.0]
    by_samples = LinearDecay(sgd(), 1000)
    amounts = [100, 100, 200, 400, 200]  # the batch grows
    assert rates_of(by_samples, amounts) == pytest.approx([0.5, 0.45, 0.4, 0.3, 0.1])
    assert by_samples.get_last_lr() == [0.0, 0.0]
    with pytest.warns(UserWarning, match="the learning rate has been 0 since 1000 steps or samples"):
        by_samples.advance_to(1100)
    with pytest.raises(ConfigError, match="done must not fall, got 100 after 1100"):
        by_samples.advance_to(100)


def test_warm_up_then_the_line():
    scheduler = LinearDecay(sgd(1.0), 12, warmup=4)
    expected = [0.2, 0.4, 0.6, 0.8, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert rates_of(scheduler, steps=12) == pytest.approx(expected)


def test_a_refined_schedule_is_stretched_and_follows_samples():
    refined = RefinedDecay(at=(0, 0.1, 0.6), factors=(0.5, 1.0, 0.0))  # steps of 1, 5 and 4 tenths of the samples
    scheduler = LinearDecay(sgd(1.0), 1000, refined=refined)
    assert rates_of(scheduler, [50, 50, 250, 250]) == pytest.approx([0.5, 0.75, 1.0, 0.5])
    assert scheduler.get_last_lr() == [0.0, 0.0]
    assert RefinedDecay(**json.loads(json.dumps(dataclasses.asdict(refined)))) == refined


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("refined", [None, RefinedDecay(at=(0, 0.3), factors=(1.0, 0.25))], ids=["line", "refined"])
def test_stopped_and_resumed_is_uninterrupted(refined):
    straight = LinearDecay(sgd(), 100, refined=refined)
    expected = rates_of(straight, [10, 20, 30, 40])
    first = LinearDecay(sgd(), 100, refined=refined)
    rates = rates_of(first, [10, 20])
    optimizer = sgd()
    second = LinearDecay(optimizer, 100)
    optimizer.load_state_dict(through_a_file(first.optimizer.state_dict()))
    second.load_state_dict(through_a_file(first.state_dict()))
    assert rates + rates_of(second, [30, 40]) == expected


def test_the_recorder_has_the_norms_of_all_gradients_and_the_samples():
    optimizer = sgd()
    (a, b) = (group["params"][0] for group in optimizer.param_groups)
    counts = iter([10, 40])
    two, one = GradientNorms(optimizer, samples=lambda: next(counts)), GradientNorms(optimizer, order=1)
    for scale in (1.0, 2.0):
        a.grad, b.grad = scale * torch.tensor([2.0, -3.0]), scale * torch.tensor([6.0])
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()  # no gradients: nothing to record
    assert two.norms == pytest.approx((7.0, 14.0))
    assert one.norms == pytest.approx((11.0, 22.0))
    assert (two.done, one.done) == ((10, 40), (1, 2))
    assert two.refined(smoothing=0).at == (0.0, 0.25)
    assert one.refined().factors == refined_decay((11.0, 22.0), order=1)
    other = GradientNorms(optimizer, samples=lambda: 100)
    other.load_state_dict(through_a_file(two.state_dict()))
    two.remove()
    a.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert other.norms == pytest.approx((7.0, 14.0, 5.0))
    assert other.done == (10, 40, 100)
    assert len(two.norms) == 2
    with pytest.raises(ConfigError, match="order must be that of the saved norms, 2, got 1"):
        one.load_state_dict(other.state_dict())


def loss_after(schedule_of):
    """Logistic regression on noisy data by small batches; the norms of the run beside its loss."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 10, generator=generator)
    labels = (inputs[:, :1] + 0.5 * torch.randn(512, 1, generator=generator) > 0).float()
    model = nn.Linear(10, 1)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), 2.0)
    norms, scheduler = GradientNorms(optimizer), schedule_of(optimizer)
    loss_of = nn.functional.binary_cross_entropy_with_logits
    for _ in range(200):
        chosen = torch.randint(512, (8,), generator=generator)
        optimizer.zero_grad()
        loss_of(model(inputs[chosen]), labels[chosen]).backward()
        optimizer.step()
        scheduler.step()
    return loss_of(model(inputs), labels).item(), norms


def test_a_recorded_run_refines_the_next_one():
    constant, _ = loss_after(lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))
    line, norms = loss_after(lambda optimizer: LinearDecay(optimizer, 200))
    refined, _ = loss_after(lambda optimizer: LinearDecay(optimizer, 200, refined=norms.refined()))
    assert line < constant
    assert refined < constant


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LinearDecay(sgd(), 0), "total must be an integer of at least 1, got 0"),
        (lambda: LinearDecay(sgd(), 10, warmup=-1), "warmup must be an integer of at least 0, got -1"),
        (lambda: LinearDecay(sgd(), 10, warmup=10), "warmup must be below total=10, got 10; use a twentieth"),
        (
            lambda: LinearDecay(sgd(), 10, warmup=2, refined=RefinedDecay(at=(0,), factors=(1,))),
            "warmup must be 0 beside a refined schedule, got 2",
        ),
        (lambda: LinearDecay(sgd(), 10).advance_to(2.5), "done must be an integer of at least 0, got 2.5"),
        (lambda: RefinedDecay(at=(0, 0.5), factors=(1,)), "got 2 places for 1 factors"),
        (lambda: RefinedDecay(at=(0, 0.5, 0.5), factors=(1, 1, 1)), "at must rise from 0 to below 1"),
        (lambda: RefinedDecay(at=(0,), factors=(1.5,)), r"factors must be in \[0, 1\], got \(1.5,\)"),
        (lambda: refined_decay([1.0]), "norms must be those of at least 2 steps"),
        (lambda: refined_decay([1.0, math.nan]), "norms must be finite, got nan at step 1"),
        (lambda: refined_decay([1.0, 0.0]), "norms must be above 0, got 0 at step 1"),
        (lambda: refined_decay([1.0, 1.0], smoothing=1.5), r"smoothing must be a number in \[0, 1\], got 1.5"),
        (lambda: refined_decay([1.0, 1.0], order=3), "order must be 1 or 2, got 3; use 2 for SGD and 1 for Adam"),
        (lambda: GradientNorms(sgd(), order=0), "order must be 1 or 2, got 0"),
    ],
)
def test_bad_input(make, said):
    with pytest.raises(ConfigError, match=said):
        make()

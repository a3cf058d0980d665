"""A probe stands for a gradient: coordinates are equally likely, all ranks draw the same, and it errs little."""

import numpy as np
import pytest
import torch
from torch import nn

from distopt.batch.probe import Probe
from distopt.batch.sums import ProbeSums, Sums, from_probe, is_finite

CPU = torch.device("cpu")


def test_every_coordinate_is_as_likely_as_any_other():
    parameters = [torch.zeros(7, 3), torch.zeros(10), torch.zeros(0), torch.zeros(2, 3)]
    probe = Probe(parameters, size=5, seed=1)
    flat = torch.arange(37.0)
    gradients = list(flat.split([21, 10, 0, 6]))
    gradients = [g.view(p.shape) for g, p in zip(gradients, parameters, strict=True)]
    counts = torch.zeros(37)
    for number in range(1500):
        probe.draw(number, CPU)
        row = torch.zeros(5)
        probe.gather_(row, parameters, gradients)
        counts[row.long()] += 1
    assert probe.numel == 37
    assert torch.allclose(counts / 1500, torch.full((37,), 5 / 37), atol=0.03)
    again = Probe(parameters, size=5, seed=1)
    again.draw(1499, CPU)
    other = torch.zeros(5)
    for p, g in zip(reversed(parameters), reversed(gradients), strict=True):  # in parts, in any order
        again.gather_(other, [p], [g])
    assert other.equal(row)


def test_a_small_gradient_is_taken_whole_in_the_order_of_memory():
    weight = torch.zeros(2, 3, 2, 2).to(memory_format=torch.channels_last)
    gradient = torch.arange(24.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last)
    probe = Probe([weight], size=100, seed=0)
    probe.draw(1, CPU)
    row = torch.zeros(probe.size)
    probe.gather_(row, [weight], [gradient])
    assert row.equal(gradient.permute(0, 2, 3, 1).flatten())


def real_gradients(num_ranks, samples):
    """Of a small convolutional network on noisy pictures, one row for each rank; most entries in one layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 49, 200), nn.ReLU(), nn.Linear(200, 10),
    )  # fmt: skip
    prototypes = torch.randn(10, 1, 14, 14)
    rows = []
    for _ in range(num_ranks):
        targets = torch.randint(10, (samples,))
        inputs = prototypes[targets] + 2 * torch.randn(samples, 1, 14, 14)
        grads = torch.autograd.grad(nn.functional.cross_entropy(model(inputs), targets), list(model.parameters()))
        rows.append(grads)
    return list(model.parameters()), rows


def test_a_probe_errs_about_as_little_as_is_said():
    """Plain scaling errs as the sheet says (trS 17%, |G|^2 39%); the ratio to the exact squared norms errs less."""
    parameters, rows = real_gradients(num_ranks=4, samples=32)
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()
    squares = float(flat.square().sum())
    exact = sums_of(flat, squares=squares, scale=1.0).quantities("norm")
    probe = Probe(parameters, size=4096, seed=3)  # of 320,610: an eightieth, as 65,536 of 5.2 million
    ours, plain = [], []
    for number in range(60):
        sums = [ProbeSums(probe, device=CPU) for _ in rows]
        for each, row in zip(sums, rows, strict=True):
            each.clear(number)
            each.local(parameters, row)
        assert float(sum(each.square for each in sums)) == pytest.approx(squares, rel=1e-5)
        drawn = torch.stack([each.row for each in sums]).double()
        found = from_probe(
            drawn.mean(0), num_gradients=4, samples=32, squares=squares, probe_squares=float(drawn.square().sum())
        )
        ours.append(found.quantities("norm"))
        scale = probe.numel / probe.size
        plain.append(sums_of(drawn, squares=scale * float(drawn.square().sum()), scale=scale).quantities("norm"))
    error = {
        name: [np.std([each[name] for each in them]) / exact[name] for them in (ours, plain)]
        for name in ("trace", "square")
    }
    assert 0.08 < error["trace"][1] < 0.25
    assert error["trace"][0] < 0.06
    assert error["square"][0] < error["square"][1] < 0.5
    for name in error:
        assert np.mean([each[name] for each in ours]) == pytest.approx(exact[name], rel=0.1)


def test_a_probe_that_misses_the_whole_gradient_does_not_count():
    """As of a large embedding of which few rows have taken part: it must not pass for noise alone."""
    missed = from_probe(torch.zeros(4), num_gradients=2, samples=8, squares=3.0, probe_squares=0.0)
    assert not is_finite(missed.quantities("norm"))
    nothing = from_probe(torch.zeros(4), num_gradients=2, samples=8, squares=0.0, probe_squares=0.0)
    assert set(nothing.quantities("norm").values()) == {0.0}


def sums_of(rows, *, squares, scale):
    mean = rows.mean(0)
    return Sums(num_gradients=len(rows), samples=32, squares=squares, square_of_mean=scale * float(mean @ mean))

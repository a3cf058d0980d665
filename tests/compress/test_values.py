"""Formats of values: sizes, errors as published, and hard cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.compress import VALUE_FORMATS, ValueFormat
from distopt.compress.values import Int8, Plain, TwoBit, TwoBitBins
from distopt.errors import DecodeError

NAMES = sorted(VALUE_FORMATS)
LARGEST = torch.finfo(torch.float32).max


def passed(name, values, runs=None):
    form, runs = VALUE_FORMATS[name], runs or [len(values)]
    code = form.encode(values, runs)
    assert code.dtype == torch.uint8
    assert code.shape == (form.nbytes(runs, values.shape[1]),)
    arrived = form.decode(code, runs, values.shape[1])
    assert arrived.dtype == torch.float32
    assert arrived.shape == values.shape
    assert torch.isfinite(arrived).all()
    return arrived


def error(name, values):
    arrived = passed(name, values)
    return float((arrived - values).double().square().sum() / values.double().square().sum())


def test_every_format_can_be_chosen_by_name():
    assert {type(form) for form in VALUE_FORMATS.values()} == {Plain, Int8, TwoBit, TwoBitBins}
    assert set(ValueFormat.__subclasses__()) == {Plain, Int8, TwoBit, TwoBitBins}


def top_64_of_4096(law, rows=200):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4096, generator=generator)
    if law == "laplace":
        uniform = torch.rand(rows, 4096, generator=generator) - 0.5
        x = -uniform.sign() * torch.log1p(-2 * uniform.abs())
    if law == "student-t3":
        x = x / (torch.randn(rows, 4096, 3, generator=generator).square().sum(-1) / 3).sqrt()
    return x.gather(1, x.abs().topk(64).indices)


@pytest.mark.parametrize(
    ("law", "bins", "two_levels"),
    [("normal", 0.0126, 0.0043), ("laplace", 0.036, 0.013), ("student-t3", 0.37, 0.12)],
)
def test_relative_errors_are_the_known_ones(law, bins, two_levels):
    """Known: one table for a whole tensor. Two levels for each chunk lose less than that where chunks differ."""
    values = top_64_of_4096(law)
    assert error("2bit-bins", values) == pytest.approx(bins, rel=0.1)
    assert two_levels / 3 < error("2bit", values) <= 1.05 * two_levels
    assert error("int8", values) < 1e-4
    assert error("fp16", values) < 1e-6
    assert error("fp32", values) == 0


def test_two_levels_are_the_best_two_but_for_their_own_rounding():
    values = top_64_of_4096("laplace", rows=20)
    best = 0.0
    for row in values.double().abs():
        parts = [row.sort().values.split([low, 64 - low]) for low in range(1, 64)]
        best += min(sum(float((part - part.mean()).square().sum()) for part in both) for both in parts)
    relative = best / float(values.double().square().sum())
    assert relative <= error("2bit", values) < 1.08 * relative


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-38, 1.0, 1e38])
def test_zeros_denormals_and_the_largest_numbers(name, scale):
    values = torch.tensor([[1.0, -1.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [0.25, 0.25, -0.25, 0.25]]) * scale
    arrived = passed(name, values)
    if scale >= 1.0 and name not in ("2bit-bins", "fp16"):
        torch.testing.assert_close(arrived[0], values[0], rtol=0, atol=0.51 * scale)
        assert not arrived[1].any() or name == "2bit"
        torch.testing.assert_close(arrived[2], values[2], rtol=0.03, atol=0)
    assert bool((arrived.abs() <= max(1.0, 1.03 * scale)).all())


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_number_saturates(name):
    values = torch.tensor([[LARGEST, -LARGEST, LARGEST / 2, 1e-30]])
    arrived = passed(name, values)
    assert bool((arrived.abs() <= LARGEST).all())
    assert float(arrived[0, 0]) > 0 > float(arrived[0, 1])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=3, max_size=3),
        min_size=1,
        max_size=6,
    )
)
def test_what_arrives_is_finite_and_no_larger_than_the_largest(name, rows):
    values = torch.tensor(rows, dtype=torch.float32)
    arrived = passed(name, values, [1] * (len(rows) // 2) + [len(rows) - len(rows) // 2])
    last_place = 2.0**-24 if name == "fp16" else 0.0  # of its denormals
    assert bool((arrived.abs() <= values.abs().max() * 1.001 + last_place).all())


def test_rows_of_very_different_size_are_told_apart():
    values = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [1e-3], [1e-5]])
    for name in ("int8", "2bit"):
        arrived = passed(name, values)
        for row in range(3):
            assert float((arrived[row] - values[row]).norm() / values[row].norm()) < 0.4


@pytest.mark.parametrize("name", NAMES)
def test_several_codes_are_decoded_at_once(name):
    form, generator = VALUE_FORMATS[name], torch.Generator().manual_seed(0)
    values = torch.randn(4, 5, 7, generator=generator)
    codes = torch.stack([form.encode(each, [2, 3]) for each in values])
    together = form.decode(codes, [2, 3], 7)
    assert together.shape == values.shape
    for code, arrived in zip(codes, together, strict=True):
        assert torch.equal(form.decode(code, [2, 3], 7), arrived)


@pytest.mark.parametrize("name", ["int8", "2bit"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_magnitude_that_cannot_be_is_refused(name, bad):
    form = VALUE_FORMATS[name]
    code = form.encode(torch.ones(2, 4), [2])
    code[:4] = torch.tensor([bad]).view(torch.uint8)
    with pytest.raises(DecodeError, match=r"largest magnitude must be a finite number of at least 0, got \["):
        form.decode(code, [2], 4)

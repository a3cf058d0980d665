"""Rounding for the wire loses nothing (value == sent + error, exactly) and never makes an infinity of a number."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.compress import WIRE_DTYPES, round_to_wire

SOURCES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
WIRES = sorted(WIRE_DTYPES)


def finite(dtype):
    largest = torch.finfo(dtype).max
    return st.lists(st.floats(-largest, largest, width=64), min_size=1, max_size=50).map(
        lambda numbers: torch.tensor(numbers, dtype=torch.float64).clamp(-largest, largest).to(dtype)
    )


@pytest.mark.parametrize("source", SOURCES, ids=str)
@pytest.mark.parametrize("wire", WIRES)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_value_is_sent_plus_error(wire, source, data):
    values = data.draw(finite(source))
    sent, error = round_to_wire(values, WIRE_DTYPES[wire])
    assert sent.dtype == WIRE_DTYPES[wire]
    assert sent.isfinite().all()
    if error is None:
        assert torch.equal(sent.double(), values.double())
    else:
        assert error.dtype == source
        total = sent.double() + error.double()
        # far beyond the wire's range the error of a float64 rounds, and so does the sum
        torch.testing.assert_close(total.to(source), values, rtol=2.0**-52 if source is torch.float64 else 0, atol=0)
        if source == torch.float32:  # what memories hold: exact, until 65504 is less than the last place of the value
            small = values.abs() < 2.0**28
            assert torch.equal(total[small], values.double()[small])


@pytest.mark.parametrize("num_ranks", [2, 3, 7, 64, 1000])
@pytest.mark.parametrize("wire", ["fp16", "bf16"])
def test_sums_of_saturated_values_stay_finite(wire, num_ranks):
    """Added one by one in the wire's dtype, each partial sum rounded, as an all-reduce does."""
    huge = torch.full((1,), torch.finfo(torch.float32).max)
    for values in (huge, -huge, huge / num_ranks):
        sent, error = round_to_wire(values, WIRE_DTYPES[wire], summands=num_ranks)
        total = torch.zeros(1, dtype=WIRE_DTYPES[wire])
        for _ in range(num_ranks):
            total += sent
        assert total.isfinite().all()
    largest = torch.tensor([torch.finfo(WIRE_DTYPES[wire]).max / num_ranks * 0.49])
    sent, error = round_to_wire(largest, WIRE_DTYPES[wire], summands=num_ranks)
    torch.testing.assert_close(sent.float(), largest, rtol=1e-2, atol=0.0)
    assert torch.equal(sent.double() + error.double(), largest.double())


@pytest.mark.parametrize("wire", WIRES)
def test_nothing_is_lost_where_the_wire_holds_every_value(wire):
    values = torch.randn(100).to(WIRE_DTYPES[wire])
    sent, error = round_to_wire(values, WIRE_DTYPES[wire])
    assert error is None
    assert torch.equal(sent, values)


@pytest.mark.parametrize(
    ("wire", "value", "sent"),
    [
        ("fp16", 65504.0, 65504.0),
        ("fp16", 65519.0, 65504.0),
        ("fp16", 65520.0, 65504.0),  # IEEE rounding would give inf here
        ("fp16", -1e30, -65504.0),
        ("fp16", 3.4028234663852886e38, 65504.0),
        ("bf16", 3.4028234663852886e38, 3.3895313892515355e38),
        ("fp16", 2.0**-26, 0.0),  # under the smallest subnormal: all of it stays behind
        ("fp16", math.inf, 65504.0),
    ],
)
def test_saturation(wire, value, sent):
    got, error = round_to_wire(torch.tensor([value]), WIRE_DTYPES[wire])
    assert got.item() == sent
    assert error is not None
    assert error.item() == torch.tensor(value).sub(sent).item()


@pytest.mark.parametrize(("source", "wire"), [(torch.bfloat16, "fp16"), (torch.float16, "bf16")], ids=str)
def test_the_16_bit_formats_do_not_hold_each_other(source, wire):
    values = torch.tensor([65280.0 if source == torch.float16 else 1e30, 1.0009765625, 1e-6]).to(source)
    sent, error = round_to_wire(values, WIRE_DTYPES[wire])
    assert sent.isfinite().all()
    assert error is not None
    assert error.any()


def test_nan_stays_nan():
    sent, error = round_to_wire(torch.tensor([math.nan, 1.0]), torch.float16)
    assert sent.isnan().tolist() == [True, False]
    assert error is not None

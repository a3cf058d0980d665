"""The combination is the sum in the order given, in the promised precision, whatever the length and the block."""

import pytest
import torch

from distopt.coding import combine
from distopt.coding.combine import _BLOCK as BLOCK
from distopt.errors import ConfigError

LENGTHS = [0, 1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5]


def messages_of(length, count=5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("length", LENGTHS)
def test_sums_in_order_bit_for_bit(length):
    messages, coefficients = messages_of(length), [1.0, -2.5, 0.0, 1.0, 1e-3]
    expected = messages[0].clone()
    for message, a in zip(messages[1:], coefficients[1:], strict=True):
        expected += message * a
    assert torch.equal(combine(messages, coefficients), expected)


def test_ones_are_a_plain_sum():
    messages = messages_of(1000)
    expected = messages[0] + messages[1] + messages[2] + messages[3] + messages[4]
    assert torch.equal(combine(messages, [1.0] * 5), expected)


def test_messages_with_a_coefficient_of_zero_are_not_read():
    messages = messages_of(100)
    messages[0].fill_(torch.nan)
    messages[3].fill_(torch.inf)
    assert torch.equal(combine(messages, [0, 1, 1, 0.0, 1]), messages[1] + messages[2] + messages[4])
    assert torch.equal(combine(messages, [0.0] * 5), torch.zeros(100))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("into_float32", [False, True])
def test_16_bit_messages_are_rounded_once(dtype, into_float32):
    count = 300  # 1 + 299/256 ends below 2.2: in 16 bits each addend would round away
    messages = [torch.full((BLOCK + 3,), 1.0 if i == 0 else 2.0**-12, dtype=dtype) for i in range(count)]
    out = torch.empty(BLOCK + 3) if into_float32 else None
    exact = torch.full((BLOCK + 3,), 1 + (count - 1) * 2.0**-12)
    total = combine(messages, [1.0] * count, out)
    assert total.dtype == (torch.float32 if into_float32 else dtype)
    assert torch.equal(total, exact.to(total.dtype))


def test_float64_keeps_its_precision():
    messages = messages_of(100, dtype=torch.float64)
    expected = torch.stack(messages).mul(0.1).sum(0)
    assert (combine(messages, [0.1] * 5) - expected).abs().max() < 1e-15


def test_out_is_written_and_returned():
    messages, out = messages_of(10), torch.full((10,), torch.nan)
    assert combine(messages, [1.0] * 5, out=out) is out
    assert torch.equal(out, combine(messages, [1.0] * 5))


def test_messages_that_need_gradients_combine_without():
    messages = [message.requires_grad_() for message in messages_of(10)]
    assert not combine(messages, [2.0] * 5).requires_grad


@pytest.mark.parametrize(
    ("messages", "coefficients", "out", "rule"),
    [
        ([], [], None, "at least one message"),
        (messages_of(3, 2), [1.0], None, "one coefficient for each"),
        ([torch.zeros(3), torch.zeros(4)], [1, 1], None, "one dtype and length"),
        ([torch.zeros(3), torch.zeros(3).double()], [1, 1], None, "one dtype and length"),
        ([torch.zeros(3, 1)], [1], None, "flat floating-point"),
        ([torch.zeros(6)[::2]], [1], None, "flat floating-point"),
        ([torch.zeros(3, dtype=torch.int32)], [1], None, "flat floating-point"),
        ([torch.zeros(3)], [1], torch.zeros(4), "out must be"),
        ([torch.zeros(3)], [1], torch.zeros(3, dtype=torch.float64), "out must be"),
    ],
)
def test_what_does_not_fit_is_refused(messages, coefficients, out, rule):
    with pytest.raises(ConfigError, match=rule):
        combine(messages, coefficients, out)


def test_out_that_is_a_message_is_refused():
    messages = messages_of(10)
    with pytest.raises(ConfigError, match="must not share memory"):
        combine(messages, [1.0] * 5, out=messages[2])

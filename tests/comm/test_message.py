import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.comm import Message, TensorSpec, frame_bytes, message
from distopt.errors import DecodeError

DTYPES = [torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]
TENSORS = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4)).map(
        lambda spec: torch.arange(torch.Size(spec[1]).numel()).to(spec[0]).reshape(spec[1])
    ),
    max_size=5,
)


@settings(deadline=None)
@given(TENSORS, st.lists(st.floats(allow_nan=False), max_size=6), st.integers(0, 65535), st.integers(-1, 2**40))
def test_what_is_decoded_is_what_was_encoded(tensors, numbers, kind, round_):
    frame = message.encode(Message(kind, round_, 3, tuple(tensors), tuple(numbers)))
    decoded = message.decode(frame)
    assert (decoded.kind, decoded.round, decoded.sender, decoded.numbers) == (kind, round_, 3, tuple(numbers))
    assert [t.dtype for t in decoded.tensors] == [t.dtype for t in tensors]
    assert all(torch.equal(got, sent) for got, sent in zip(decoded.tensors, tensors, strict=True))
    specs = [TensorSpec(tuple(t.shape), t.dtype) for t in tensors]
    assert frame.numel() == frame_bytes(specs, len(numbers))


def test_a_receivers_buffer_may_be_longer_than_the_frame():
    frame = message.encode(Message(1, 2, 3, (torch.ones(5),)))
    longer = torch.cat([frame, torch.full((100,), 255, dtype=torch.uint8)])
    assert torch.equal(message.decode(longer).tensors[0], torch.ones(5))


def test_a_shorter_one_is_refused():
    frame = message.encode(Message(1, 2, 3, (torch.ones(5),)))
    with pytest.raises(DecodeError, match="does not fit"):
        message.decode(frame[:-1])


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_no_damaged_header_is_taken_for_a_message(data):
    frame = message.encode(Message(4, 17, 1, (torch.ones(3), torch.zeros(2, 2)), (1.5, 2.5)))
    header = int.from_bytes(frame[24:28].numpy().tobytes(), "little")
    at = data.draw(st.integers(0, header - 1))
    frame[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(DecodeError):
        message.decode(frame)


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_garbage_is_refused(garbage):
    for prefix in (b"", b"DOPT\x01\x00"):
        with pytest.raises(DecodeError):
            message.decode(torch.tensor(list(prefix + garbage), dtype=torch.uint8))


def test_a_dtype_that_frames_do_not_carry_is_named():
    with pytest.raises(DecodeError, match="complex64"):
        message.encode(Message(1, 2, 3, (torch.ones(2, dtype=torch.complex64),)))

"""A payload gives back header, indices and values, is exactly as long as announced, and no bytes can crash it."""

import contextlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.compress import INDEX_FORMATS, WIRE_DTYPES, Header, PayloadLayout
from distopt.errors import DecodeError

DTYPES = [*WIRE_DTYPES.values(), torch.float64]
HEADER = Header(step=0)


def layout(numel=1000, count=10, num_flags=0, value_dtype=torch.float32, indices="int32"):
    return PayloadLayout(
        numel=numel, count=count, num_flags=num_flags, value_dtype=value_dtype, index_format=INDEX_FORMATS[indices]
    )


def contribution(chosen, seed=0):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(chosen.numel, generator=generator)[: chosen.count].sort().values.to(torch.int32)
    return indices, torch.randn(chosen.count, generator=generator).to(chosen.value_dtype)


layouts = st.builds(
    lambda numel, share, flags, dtype, indices: layout(numel, int(numel * share), flags, dtype, indices),
    st.sampled_from([0, 1, 7, 1000, 65536, 70_001]),
    st.sampled_from([0.0, 0.001, 0.3, 1.0]),
    st.sampled_from([0, 1, 31, 32, 33, 64, 65, 100]),
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(INDEX_FORMATS)),
)


@settings(max_examples=100, deadline=None)
@given(chosen=layouts, data=st.data())
def test_round_trip(chosen, data):
    header = Header(
        step=data.draw(st.integers(0, 2**31 - 1)),
        nonfinite=data.draw(st.integers(0, 2**31 - 1)),
        used=tuple(data.draw(st.lists(st.booleans(), min_size=chosen.num_flags, max_size=chosen.num_flags))),
    )
    indices, values = contribution(chosen)
    payload = chosen.pack(header, indices, values)
    assert payload.dtype == torch.uint8
    assert payload.numel() == chosen.nbytes
    # as it arrives: a row of the gathered payloads of several ranks
    gathered = torch.stack([torch.zeros_like(payload), payload, payload])
    assert chosen.unpack_header(gathered[1]) == header
    got_indices, got_values = chosen.unpack(gathered[2])
    assert torch.equal(got_indices, indices)
    assert torch.equal(got_values, values)
    assert got_values.dtype == chosen.value_dtype


@pytest.mark.parametrize("used", [(True,) * 32, (False,) * 31 + (True,), (True,) + (False,) * 63 + (True,)])
def test_used_bits_in_every_place_of_a_word(used):
    chosen = layout(count=0, num_flags=len(used))
    payload = chosen.pack(Header(step=3, used=used), torch.empty(0, dtype=torch.int32), torch.empty(0))
    assert chosen.unpack_header(payload).used == used


def test_bytes_are_header_plus_indices_plus_values_plus_less_than_one_item():
    for dtype, indices, count, flags in itertools.product(DTYPES, INDEX_FORMATS, (0, 1, 10, 999), (0, 1, 40)):
        chosen = layout(count=count, num_flags=flags, value_dtype=dtype, indices=indices)
        index_nbytes = INDEX_FORMATS[indices].nbytes(1000, count) if count else 0
        bare = 4 * (3 + -(-flags // 32)) + index_nbytes + count * dtype.itemsize
        assert bare <= chosen.nbytes < bare + 8
        assert chosen.nbytes % max(4, dtype.itemsize) == 0  # so that the next rank's payload is aligned too


@settings(max_examples=80, deadline=None)
@given(sent=layouts, expected=layouts)
def test_a_payload_of_another_layout_is_refused(sent, expected):
    if sent == expected:
        return
    payload = sent.pack(HEADER, *contribution(sent))
    with pytest.raises(DecodeError, match=r"every rank must run the same model and configuration"):
        expected.unpack_header(payload)


@pytest.mark.parametrize(
    "other",
    [
        layout(numel=1001),
        layout(numel=993, count=41),  # what a linear check sum would confuse with (1000, 10)
        layout(value_dtype=torch.float64),
        layout(indices="block16", value_dtype=torch.float64),
        layout(num_flags=1),
    ],
)
def test_the_error_says_what_was_expected(other):
    with pytest.raises(DecodeError, match=r"got|10 of 1000 entries, torch.float32"):
        layout().unpack_header(other.pack(HEADER, *contribution(other)))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (layout(value_dtype=torch.float16), layout(value_dtype=torch.bfloat16)),
        (layout(numel=993, count=17), layout(numel=1000, count=17)),
    ],
)
def test_layouts_of_equal_length_are_told_apart(one, two):
    assert one.nbytes == two.nbytes
    with pytest.raises(DecodeError, match="does not begin as one of this layout"):
        two.unpack_header(one.pack(HEADER, *contribution(one)))


@pytest.mark.parametrize("cut", [0, 1, 4, 15, 91, 93, 200])
def test_a_payload_of_another_length(cut):
    payload = torch.zeros(cut, dtype=torch.uint8)
    for unpack in (layout().unpack_header, layout().unpack):
        with pytest.raises(DecodeError, match=rf"must be 92 bytes, got {cut} of torch.uint8"):
            unpack(payload)


@settings(max_examples=300, deadline=None)
@given(chosen=layouts.filter(lambda made: made.nbytes < 10_000), seed=st.integers(0, 2**32), keep=st.booleans())
def test_random_bytes_raise_nothing_but_decode_errors(chosen, seed, keep):
    payload = torch.randint(0, 256, (chosen.nbytes,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    if keep:  # a good header in front of garbage
        good = chosen.pack(HEADER, *contribution(chosen))
        payload = torch.where(torch.rand(chosen.nbytes) < 0.5, good, payload)
    for unpack in (chosen.unpack_header, chosen.unpack):
        with contextlib.suppress(DecodeError):
            unpack(payload)

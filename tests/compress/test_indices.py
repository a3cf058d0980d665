"""Every index format gives back what it was given, takes the bytes it says, and refuses sections that disagree."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt import ops
from distopt.compress import INDEX_FORMATS, IndexFormat
from distopt.errors import DecodeError

FORMATS = sorted(INDEX_FORMATS)
BLOCK = 1 << 16
SIZES = [0, 1, 2, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, 3 * BLOCK - 1]


def positions(numel, count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(numel, generator=generator)[:count].sort().values.to(torch.int32)


def assert_round_trip(form, indices, numel):
    sections = form.encode(indices, numel)
    assert [(s.dtype, s.numel()) for s in sections] == list(form.sections(numel, indices.numel()))
    assert sum(s.nbytes for s in sections) == form.nbytes(numel, indices.numel())
    decoded = form.decode(sections, numel, indices.numel())
    assert decoded.dtype == torch.int32
    assert torch.equal(decoded, indices)


def test_every_format_can_be_chosen_by_name():
    assert {type(form) for form in INDEX_FORMATS.values()} == set(IndexFormat.__subclasses__())


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("name", FORMATS)
def test_round_trip_for_every_count(name, numel):
    for count in {0, 1, 2, numel // 1000, numel // 2, BLOCK - 1, BLOCK, BLOCK + 1, numel - 1, numel}:
        if 0 <= count <= numel:
            assert_round_trip(INDEX_FORMATS[name], positions(numel, count, seed=count), numel)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_round_trip_at_block_borders(name, data):
    numel = data.draw(st.integers(1, 5 * BLOCK))
    near = st.integers(0, 5).map(lambda b: b * BLOCK).flatmap(lambda at: st.integers(at - 2, at + 2))
    chosen = data.draw(st.sets(near.filter(lambda i: 0 <= i < numel), max_size=20))
    assert_round_trip(INDEX_FORMATS[name], torch.tensor(sorted(chosen), dtype=torch.int32), numel)


@pytest.mark.parametrize("name", FORMATS)
def test_the_largest_tensor(name):
    last = 2**31 - 2
    assert_round_trip(INDEX_FORMATS[name], torch.tensor([0, 65535, 65536, last], dtype=torch.int32), last + 1)


@pytest.mark.parametrize("first", [0, BLOCK, 2 * BLOCK])
def test_a_full_block_beside_empty_ones(first):
    indices = torch.arange(first, first + BLOCK, dtype=torch.int32)
    assert_round_trip(INDEX_FORMATS["block16"], indices, 3 * BLOCK)
    assert_round_trip(INDEX_FORMATS["block16"], indices[1:], 3 * BLOCK)  # 65,535 still fit 16 bits


@pytest.mark.parametrize(("numel", "count"), [(100, 0), (BLOCK, 66), (10 * BLOCK, 656), (25_557_032, 25_533)])
def test_block16_takes_half_the_bytes_and_two_per_block(numel, count):
    blocks = -(-numel // BLOCK)
    assert INDEX_FORMATS["int32"].nbytes(numel, count) == 4 * count
    assert INDEX_FORMATS["block16"].nbytes(numel, count) == 2 * count + 2 * blocks


@pytest.mark.parametrize("count", [5, BLOCK + 5])  # 16-bit and 32-bit counts
@pytest.mark.parametrize("change", [1, -1, 1000])
def test_block16_counts_that_do_not_add_up(count, change):
    form = INDEX_FORMATS["block16"]
    counts, offsets = form.encode(positions(4 * BLOCK, count, seed=0), 4 * BLOCK)
    counts = counts.clone()
    counts[1] += change
    with pytest.raises(DecodeError, match=rf"the blocks announce \d+ entries and {count} arrived.*damaged"):
        form.decode((counts, offsets), 4 * BLOCK, count)


def test_block16_negative_counts_that_add_up_all_the_same():
    counts = torch.tensor([-3, BLOCK + 8], dtype=torch.int32)
    with pytest.raises(DecodeError):
        INDEX_FORMATS["block16"].decode((counts, torch.zeros(BLOCK + 5, dtype=torch.int16)), 2 * BLOCK, BLOCK + 5)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_random_sections_never_write_outside_the_tensor(name, data):
    form, numel, count = INDEX_FORMATS[name], data.draw(st.sampled_from([1, 10, 70_000])), data.draw(st.integers(1, 9))
    sections = tuple(
        torch.frombuffer(
            bytearray(data.draw(st.binary(min_size=n * dtype.itemsize, max_size=n * dtype.itemsize))), dtype=dtype
        )
        for dtype, n in form.sections(numel, count)
    )
    out = torch.zeros(numel)
    try:
        indices = form.decode(sections, numel, count)
        ops.scatter_add_(out, indices, torch.ones(count))
    except DecodeError:
        assert not out.any()
    else:
        assert out.sum() == count

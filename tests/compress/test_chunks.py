"""The entries of chunks in one payload."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.compress import INDEX_FORMATS, VALUE_FORMATS, ChunkPayload, Chunks
from distopt.errors import DecodeError
from distopt.ops import ef_sparsify_segments_


def selected(chunks, seed=0):
    numel = sum(chunks.sizes)
    x = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    return ef_sparsify_segments_(x, torch.zeros(numel), chunks.segments, chunks.count)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_chunks_cover_every_tensor_once(data):
    sizes = data.draw(st.lists(st.integers(0, 50), max_size=6))
    chunk = data.draw(st.integers(1, 20))
    k = data.draw(st.integers(1, chunk))
    chunks = Chunks(sizes, chunk, k)
    expected, start = [], 0
    for size in sizes:
        for begin in range(0, size, chunk):
            numel = min(chunk, size - begin)
            expected.append([start + begin, numel, -(-k * numel // chunk)])
        start += size
    assert chunks.segments.tolist() == expected
    assert chunks.count == sum(count for _, _, count in expected)
    entries = torch.cat([group.entries.flatten() for group in chunks.groups]) if chunks.groups else torch.empty(0)
    assert sorted(entries.tolist()) == list(range(chunks.count))
    assert all(sum(group.runs) == len(group.starts) for group in chunks.groups)


@pytest.mark.parametrize("values", sorted(VALUE_FORMATS))
@pytest.mark.parametrize("indices", sorted(INDEX_FORMATS))
def test_round_trip_in_the_bytes_that_were_said(values, indices):
    chunks = Chunks((70, 0, 1, 33, 64), 16, 3)
    payload = ChunkPayload(chunks, values, indices)
    each = [selected(chunks, seed) for seed in range(3)]
    codes = []
    for chosen, positions in each:
        code, arriving = payload.encode(chosen, positions)
        assert code.nbytes == payload.nbytes
        arrived, where = payload.decode(code)
        assert torch.equal(where, positions)
        assert torch.equal(arrived, arriving)
        assert torch.equal(arrived, chosen) or values != "fp32"
        assert float((arrived - chosen).norm() / chosen.norm()) < 0.5
        codes.append(code)
    together, _ = payload.decode(torch.stack(codes))
    for code, arrived in zip(codes, together, strict=True):
        assert torch.equal(payload.decode(code)[0], arrived)


def test_200_times_less_than_fp32_counted_to_the_last_byte():
    """Two bits and Elias-Fano at 64 of 4,096: scales, header and all."""
    for sizes in ((1 << 20,), (512 * 512, 2048 * 512, 512 * 2048), (4096 * 100, 4096)):
        chunks = Chunks(sizes, 4096, 64)
        for values in ("2bit", "2bit-bins"):
            payload = ChunkPayload(chunks, values, "elias-fano")
            code, _ = payload.encode(*selected(chunks))
            assert 4 * sum(sizes) / code.nbytes >= 200
    with_biases = Chunks((512 * 512, 512, 2048 * 512, 2048, 512 * 2048, 512), 4096, 64)
    assert 4 * sum(with_biases.sizes) / ChunkPayload(with_biases, "2bit", "elias-fano").nbytes >= 199


def test_what_is_no_payload_of_these_chunks():
    chunks = Chunks((70, 33), 16, 3)
    payload = ChunkPayload(chunks, "2bit", "elias-fano")
    code, _ = payload.encode(*selected(chunks))
    swapped = Chunks((33, 70), 16, 3)
    other, _ = ChunkPayload(swapped, "2bit", "elias-fano").encode(*selected(swapped))
    with pytest.raises(
        DecodeError, match=rf"must be {payload.nbytes} bytes, got \({payload.nbytes - 1},\) of torch.ui"
    ):
        payload.decode(code[1:])
    with pytest.raises(DecodeError, match=r"does not begin as one of these chunks \(21 of 103 entries\)"):
        payload.decode(other)
    plain = ChunkPayload(chunks, "fp32", "int32")
    code, _ = plain.encode(*selected(chunks))
    damaged = code.clone()
    damaged[-4:] = torch.tensor([float("nan")]).view(torch.uint8)
    with pytest.raises(DecodeError, match=r"values must be finite"):
        plain.decode(damaged)
    damaged = code.clone()
    damaged[4:8] = torch.tensor([99], dtype=torch.int32).view(torch.uint8)
    with pytest.raises(DecodeError, match=r"positions in a chunk must be in \[0, \d+\), got others"):
        plain.decode(damaged)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    values=st.sampled_from(sorted(VALUE_FORMATS)),
    indices=st.sampled_from(sorted(INDEX_FORMATS)),
)
def test_random_bytes_raise_nothing_but_decode_errors(seed, values, indices):
    chunks = Chunks((70, 33), 16, 3)
    payload = ChunkPayload(chunks, values, indices)
    good, _ = payload.encode(*selected(chunks))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, good.shape, generator=generator, dtype=torch.uint8)
    damaged = torch.where(torch.rand(good.shape, generator=generator) < 0.9, good, noise)
    damaged[:4] = good[:4]
    try:
        arrived, positions = payload.decode(damaged)
    except DecodeError:
        return
    assert torch.isfinite(arrived).all()
    assert bool(((positions >= 0) & (positions < 103)).all())

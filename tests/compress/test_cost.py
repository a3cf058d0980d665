"""What an exchange costs, against the numbers of the papers and of hand calculations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distopt.compress import (
    allgather_bytes,
    allreduce_bytes,
    alltoall_bytes,
    balanced_shares,
    break_even_density,
    break_even_ranks,
)

M = 25_557_032
K = 25_558  # 0.1%


@pytest.mark.parametrize(
    ("density", "entry_bytes", "ranks"),
    [(0.25, 8, 4), (0.25, 6, 16 / 3), (0.25, 4, 8), (0.001, 8, 1000), (0.001, 4, 2000), (1.0, 8, 1)],
)
def test_break_even(density, entry_bytes, ranks):
    assert break_even_ranks(density, entry_bytes) == pytest.approx(ranks)
    assert break_even_density(8, 8) == 0.125
    assert break_even_density(2, 2) == 1.0


def test_a_ring_sends_almost_twice_the_tensor_and_a_gather_all_the_others():
    assert allreduce_bytes(2, 4 * M) == 4 * M
    assert allreduce_bytes(4, 4 * M) == 6 * M
    assert allreduce_bytes(1000, 4 * M) == 2 * 999 * 4 * M // 1000
    assert allgather_bytes(2, 100) == 100
    assert allgather_bytes(8, 100) == 700
    assert alltoall_bytes(8, 100) == 700


@pytest.mark.parametrize("nbytes", [0, 1, 4 * M])
def test_one_rank_sends_nothing(nbytes):
    assert allreduce_bytes(1, nbytes) == allgather_bytes(1, nbytes) == alltoall_bytes(1, nbytes) == 0


@given(
    ranks=st.integers(2, 5000),
    density=st.sampled_from([1.0, 0.25, 0.0625, 0.015625, 0.004, 0.001]),
    entry_bytes=st.sampled_from([4, 6, 8]),
)
def test_break_even_is_where_the_bytes_are_equal(ranks, density, entry_bytes):
    numel = 8_000_000  # every density sends a whole number of entries
    gathered = allgather_bytes(ranks, round(numel * density) * entry_bytes)
    reduced = 2 * (ranks - 1) / ranks * 4 * numel
    assert gathered / reduced == pytest.approx(ranks * density * entry_bytes / 8)
    assert gathered / reduced == pytest.approx(ranks / break_even_ranks(density, entry_bytes))


@pytest.mark.parametrize(
    ("ranks", "gathered_mb", "balanced_mb", "dense_mb"), [(8, 1.43, 0.89, 178.9), (256, 52.1, 1.02, 203.7)]
)
def test_published_bytes_of_resnet50(ranks, gathered_mb, balanced_mb, dense_mb):
    """At 0.1%, 8 bytes per entry, without headers."""
    sent, returned = balanced_shares(M, K, ranks)
    balanced = alltoall_bytes(ranks, 8 * sent) + allgather_bytes(ranks, 8 * returned)
    assert allgather_bytes(ranks, 8 * K) / 1e6 == pytest.approx(gathered_mb, rel=0.005)
    assert round(balanced / 1e6, 2) == balanced_mb
    assert allreduce_bytes(ranks, 4 * M) / 1e6 == pytest.approx(dense_mb, rel=0.005)


@given(numel=st.integers(1, 10**6), count=st.integers(1, 10**4), ranks=st.integers(1, 64))
def test_shares_cover_the_selection_and_fit_every_owner(numel, count, ranks):
    count = min(count, numel)
    sent, returned = balanced_shares(numel, count, ranks)
    smallest = min((numel - owner + ranks - 1) // ranks for owner in range(ranks))
    assert sent <= returned <= smallest
    assert sent * ranks >= count or sent == smallest
    assert returned * ranks >= 4 * count or returned == smallest

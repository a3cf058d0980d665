"""What an exchange costs, against the numbers of the compression sheet: break-even at N = 8 / (d b)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distopt.compress import allgather_bytes, allreduce_bytes, break_even_ranks, sparse_is_cheaper

M = 25_557_032


@pytest.mark.parametrize(
    ("density", "entry_bytes", "ranks"),
    [(0.25, 8, 4), (0.25, 6, 16 / 3), (0.25, 4, 8), (0.001, 8, 1000), (0.001, 4, 2000), (1.0, 8, 1)],
)
def test_break_even(density, entry_bytes, ranks):
    assert break_even_ranks(density, entry_bytes) == pytest.approx(ranks)


def test_a_ring_sends_almost_twice_the_tensor_and_a_gather_all_the_others():
    assert allreduce_bytes(2, 4 * M) == 4 * M
    assert allreduce_bytes(4, 4 * M) == 6 * M
    assert allreduce_bytes(1000, 4 * M) == 2 * 999 * 4 * M // 1000
    assert allgather_bytes(2, 100) == 100
    assert allgather_bytes(8, 100) == 700


@pytest.mark.parametrize("nbytes", [0, 1, 4 * M])
def test_one_rank_sends_nothing(nbytes):
    assert allreduce_bytes(1, nbytes) == allgather_bytes(1, nbytes) == 0


@given(
    ranks=st.integers(2, 5000),
    density=st.sampled_from([1.0, 0.25, 0.0625, 0.015625, 0.004, 0.001]),
    entry_bytes=st.sampled_from([4, 6, 8]),
)
def test_the_choice_is_the_formula(ranks, density, entry_bytes):
    numel = 8_000_000  # every density sends a whole number of entries
    sparse = round(numel * density) * entry_bytes
    gathered, reduced = allgather_bytes(ranks, sparse), allreduce_bytes(ranks, 4 * numel)
    assert gathered / (2 * (ranks - 1) / ranks * 4 * numel) == pytest.approx(ranks * density * entry_bytes / 8)
    if abs(ranks / break_even_ranks(density, entry_bytes) - 1) > 1e-6:
        assert sparse_is_cheaper(ranks, sparse, 4 * numel) == (ranks < break_even_ranks(density, entry_bytes))
    assert sparse_is_cheaper(ranks, sparse, 4 * numel) == (gathered <= reduced)


def test_the_25_percent_stage_is_dearer_than_dense_beyond_four_ranks():
    assert [n for n in range(2, 9) if sparse_is_cheaper(n, M // 4 * 8, 4 * M)] == [2, 3, 4]

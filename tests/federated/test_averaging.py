"""The weighted sum is numpy's float64 sum by ascending client id, to the bit, whatever order the replies came in."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.errors import ConfigError
from distopt.federated import sample_weights, uniform_weights, weighted_sum
from distopt.federated.averaging import _CPU_BLOCK_NUMEL as BLOCK

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def rows_of(num_rows, length, dtype=torch.float32, seed=0):
    """Rows of sizes so different that their sum depends on the order of the additions."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.randint(-3, 4, (num_rows, 1), generator=generator)
    return (torch.randn(num_rows, length, generator=generator) * sizes).to(dtype)


def numpy_sum(rows, weights, ids):
    total = np.zeros(rows.shape[1])
    for i in np.argsort(ids):
        total += weights[i] * rows[i].double().numpy()
    return torch.from_numpy(total).to(rows.dtype)


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 12),
    length=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
    random=st.randoms(use_true_random=False),
)
def test_any_arrival_gives_numpy_s_sum_by_client_to_the_bit(num_rows, length, dtype, seed, random):
    rows = rows_of(num_rows, length, dtype, seed)
    ids = random.sample(range(100), num_rows)
    weights = np.random.default_rng(seed).uniform(0.01, 2, num_rows).tolist()
    expected = numpy_sum(rows, weights, ids)
    arrival = random.sample(range(num_rows), num_rows)
    found = weighted_sum([rows[i] for i in arrival], [weights[i] for i in arrival], [ids[i] for i in arrival])
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    where = torch.tensor(arrival)
    as_tensors = torch.tensor(weights, dtype=torch.float64)[where], torch.tensor(ids)[where]
    assert torch.equal(weighted_sum(rows[where], *as_tensors), expected)


@pytest.mark.parametrize("length", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
def test_blocks_do_not_show(length):
    rows, weights = rows_of(3, length), [0.3, 0.5, 0.1]
    assert torch.equal(weighted_sum(rows, weights), numpy_sum(rows, weights, [0, 1, 2]))


def test_order_matters_to_these_rows_at_all():
    rows = rows_of(12, 1000, torch.float64)
    weights = uniform_weights(12)
    forward, backward = weighted_sum(rows, weights), weighted_sum(rows.flip(0), weights)
    assert not torch.equal(forward, backward)
    assert torch.equal(forward, weighted_sum(rows.flip(0), weights, list(range(11, -1, -1))))


def test_16_bit_rows_are_rounded_at_the_end():
    rows = torch.full((300, 5), 2.0**-12, dtype=torch.bfloat16)
    rows[0] = 1.0
    assert torch.equal(weighted_sum(rows, [1.0] * 300), torch.full((5,), 1 + 299 * 2.0**-12).bfloat16())


def test_a_row_of_weight_zero_is_not_read():
    rows = rows_of(3, 10)
    rows[1] = torch.nan
    weights = sample_weights([30, 0, 10])
    assert weights.tolist() == [0.75, 0.0, 0.25]
    assert torch.equal(weighted_sum(rows, weights), numpy_sum(rows[[0, 2]], [0.75, 0.25], [0, 1]))


def test_nothing_to_add_is_said_not_returned_as_zeros():
    assert weighted_sum([], []) is None
    assert weighted_sum(rows_of(2, 3), sample_weights([0, 0])) is None
    assert weighted_sum(rows_of(2, 3), sample_weights([0, 1])) is not None


def test_rows_are_neither_changed_nor_returned_and_need_no_gradient():
    rows = [torch.ones(4, requires_grad=True)]
    found = weighted_sum(rows, [1.0])
    found.zero_()
    assert not found.requires_grad
    assert torch.equal(rows[0], torch.ones(4))


def test_weights_of_clients():
    assert torch.equal(uniform_weights(4), torch.full((4,), 0.25, dtype=torch.float64))
    assert uniform_weights(0).shape == sample_weights([]).shape == (0,)
    assert sample_weights(torch.tensor([1, 2, 5])).tolist() == [1 / 8, 2 / 8, 5 / 8]
    assert sample_weights([0, 0]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("rows", "weights", "ids", "rule"),
    [
        (torch.zeros(3), [1, 1, 1], None, r"shape \(clients, values\)"),
        ([torch.zeros(3), torch.zeros(4)], [1, 1], None, "one length, dtype"),
        ([torch.zeros(3), torch.zeros(3).double()], [1, 1], None, "one length, dtype"),
        ([torch.zeros(3, 1)], [1], None, "flat floating-point"),
        ([torch.zeros(3).long()], [1], None, "integer buffers"),
        (torch.zeros(2, 3), [1.0], None, "one weight for each row, got 1 for 2"),
        (torch.zeros(2, 3), [1.0, torch.nan], None, "weights must be finite, got nan at 1"),
        (torch.zeros(2, 3), [[1.0, 1.0]], None, "weights must be a flat vector"),
        (torch.zeros(2, 3), [1.0, 1.0], [1], "one id for each row, got 1 for 2"),
        (torch.zeros(2, 3), [1.0, 1.0], [7, 7], "got 7 twice"),
    ],
)
def test_what_does_not_fit_is_refused(rows, weights, ids, rule):
    with pytest.raises(ConfigError, match=rule):
        weighted_sum(rows, weights, ids)


@pytest.mark.parametrize("counts", [[1.5], [-1, 2], [True], [[1]]])
def test_counts_that_are_none_are_refused(counts):
    with pytest.raises(ConfigError, match="num_samples must be integers"):
        sample_weights(counts)
    with pytest.raises(ConfigError, match="m must be"):
        uniform_weights(counts[0])

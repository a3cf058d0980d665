"""How much clients count, and that rows of clients come in their order, checked."""

import pytest
import torch

from distopt.errors import ConfigError
from distopt.federated import sample_weights, uniform_weights
from distopt.federated.rows import ordered, weighted_rows


def test_weights_of_clients():
    assert torch.equal(uniform_weights(4), torch.full((4,), 0.25, dtype=torch.float64))
    assert uniform_weights(0).shape == sample_weights([]).shape == (0,)
    assert sample_weights(torch.tensor([1, 2, 5])).tolist() == [1 / 8, 2 / 8, 5 / 8]
    assert sample_weights([0, 0]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("counts", [[1.5], [-1, 2], [True], [[1]]])
def test_counts_that_are_none_are_refused(counts):
    with pytest.raises(ConfigError, match="num_samples must be integers"):
        sample_weights(counts)
    with pytest.raises(ConfigError, match="m must be"):
        uniform_weights(counts[0])


def test_rows_come_by_client_and_need_no_gradient():
    rows = [torch.full((2,), float(i), requires_grad=True) for i in range(4)]
    assert [int(row[0]) for row in ordered("rows", rows, [30, 10, 20, 0])] == [3, 1, 2, 0]
    assert not any(row.requires_grad for row in ordered("rows", rows, None))


def test_16_bit_rows_are_rounded_at_the_end():
    rows = torch.full((300, 5), 2.0**-12, dtype=torch.bfloat16)
    rows[0] = 1.0
    found = weighted_rows(list(rows), [1.0] * 300)
    assert torch.equal(found, torch.full((5,), 1 + 299 * 2.0**-12).bfloat16())


@pytest.mark.parametrize(
    ("rows", "ids", "rule"),
    [
        (torch.zeros(3), None, r"shape \(clients, values\)"),
        ([torch.zeros(3), torch.zeros(4)], None, "one length, dtype"),
        ([torch.zeros(3), torch.zeros(3).double()], None, "one length, dtype"),
        ([torch.zeros(3, 1)], None, "flat floating-point"),
        ([torch.zeros(3).long()], None, "integer buffers"),
        (torch.zeros(2, 3), [1], "one id for each row, got 1 for 2"),
        (torch.zeros(2, 3), [7, 7], "got 7 twice"),
    ],
)
def test_what_does_not_fit_is_refused(rows, ids, rule):
    with pytest.raises(ConfigError, match=rule):
        ordered("rows", rows, ids)

"""The mean of all ranks' models, beside which each goes on with its own."""

import mean_rank
import pytest
import torch


@pytest.mark.job
@pytest.mark.parametrize("buffers", ["average", "keep"])
def test_the_mean_model(ranks, buffers):
    found = ranks(3)(mean_rank.mean_and_own, buffers)
    own = {"last.bias", "norm.num_batches_tracked"}
    if buffers == "keep":
        own |= {"norm.running_mean", "norm.running_var"}
    for mean, before, after in found:
        assert mean.keys() == before.keys()
        for name, value in mean.items():
            assert torch.equal(before[name], after[name])
            each = torch.stack([other[1][name].double() for other in found])
            expected = before[name] if name in own else each.mean(0)
            torch.testing.assert_close(value, expected, rtol=1e-14, atol=1e-15)
    assert not torch.equal(found[0][1]["first.weight"], found[1][1]["first.weight"])

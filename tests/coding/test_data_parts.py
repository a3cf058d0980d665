import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.coding import Batches
from distopt.coding.data_parts import part_of
from distopt.errors import ConfigError


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 5))
def test_each_epoch_takes_every_sample_of_a_whole_batch_once(num_samples, batch_size, seed):
    batch_size = min(batch_size, num_samples)
    batches = Batches(num_samples, batch_size, seed=seed)
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        taken = torch.cat([batches.indices(step) for step in steps])
        assert len(taken) == batches.steps_per_epoch * batch_size
        assert len(set(taken.tolist())) == len(taken)
        assert set(taken.tolist()) <= set(range(num_samples))


def test_a_batch_depends_on_the_step_alone():
    forwards, backwards = Batches(50, 7, seed=3), Batches(50, 7, seed=3)
    found = [forwards.indices(step).tolist() for step in range(20)]
    assert found == [backwards.indices(step).tolist() for step in reversed(range(20))][::-1]
    assert found[0] != Batches(50, 7, seed=4).indices(0).tolist()
    assert found[0] != found[7]  # another epoch, another order


@settings(deadline=None)
@given(st.integers(0, 50), st.lists(st.floats(0.01, 10.0), min_size=1, max_size=12))
def test_the_parts_are_all_samples_once_in_proportion(num_samples, weights):
    shares = np.array(weights) / sum(weights)
    samples = torch.randperm(num_samples)
    parts = [part_of(samples, shares, index) for index in range(len(shares))]
    assert torch.cat(parts).tolist() == samples.tolist()
    assert all(abs(len(part) - share * num_samples) <= 1 for part, share in zip(parts, shares, strict=True))


@pytest.mark.parametrize("arguments", [(0,), (10, 11), (10, 0), (10, 5, -1)])
def test_what_is_no_batch_is_refused(arguments):
    count, *rest = arguments
    with pytest.raises(ConfigError):
        Batches(count, *rest[:1], **({"seed": rest[1]} if len(rest) > 1 else {}))

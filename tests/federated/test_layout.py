"""Which tensors of a model are averaged, in which order, and what stays where it is."""

import pytest
import torch
from torch import nn

from distopt.errors import CompatibilityError, ConfigError
from distopt.federated import Layout


def small():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1, bias=False))


def test_trained_elements_come_first_then_buffers_and_frozen_ones_stay():
    model = small()
    model[0].weight.requires_grad_(False)
    layout = Layout(model)
    assert layout.trained_names == ("0.bias", "1.weight", "1.bias", "2.weight")
    assert layout.names == (*layout.trained_names, "1.running_mean", "1.running_var")
    assert set(layout.others(model)) == {"0.weight", "1.num_batches_tracked"}
    assert (layout.num_trained, layout.num_elements) == (12, 18)
    assert layout.dtype is torch.float32
    parts = [dict(model.state_dict())[name].reshape(-1) for name in layout.names]
    assert torch.equal(layout.read(model), torch.cat(parts))


def test_what_is_read_is_what_was_written_and_a_copy():
    model = small()
    layout = Layout(model)
    vector = torch.arange(layout.num_elements, dtype=torch.float32)
    layout.write(model, vector)
    read = layout.read(model)
    assert torch.equal(read, vector)
    layout.write(model, torch.zeros_like(vector))
    assert torch.equal(read, vector)
    assert model[1].num_batches_tracked.dtype == torch.int64
    assert all(p.requires_grad for p in model.parameters())


def test_memory_formats_do_not_matter():
    model = nn.Conv2d(3, 4, 2)
    layout = Layout(model)
    vector = layout.read(model)
    model.to(memory_format=torch.channels_last)
    assert torch.equal(layout.read(model), vector)
    layout.write(model, vector + 1)
    assert torch.equal(layout.read(model), vector + 1)


def test_trained_parameters_in_the_vectors_order():
    model = small()
    model[0].weight.requires_grad_(False)
    layout = Layout(model)
    trained = layout.trained(model)
    assert [p.numel() for p in trained] == [3, 3, 3, 3]
    assert trained[0] is model[0].bias
    assert torch.equal(torch.cat([p.detach().reshape(-1) for p in trained]), layout.read(model)[: layout.num_trained])


def test_split_is_of_views_with_any_dimensions_in_front():
    layout = Layout(small())
    vectors = torch.randn(5, 2, layout.num_elements)
    split = layout.split(vectors)
    assert split["0.weight"].shape == (5, 2, 3, 2)
    assert split["0.weight"].data_ptr() == vectors.data_ptr()
    for row in range(5):
        for name, part in layout.split(vectors[row, 1]).items():
            assert torch.equal(split[name][row, 1], part)


def test_scalars_count_as_one_element():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

    model = Scaled()
    layout = Layout(model)
    layout.write(model, torch.tensor([3.0]))
    assert model.scale.shape == ()
    assert model.scale.item() == 3.0


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["batch-norm"], {"0.weight", "0.bias", "2.weight"}),
        (["1.running_*"], {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight"}),
        (["*.bias", "batch-norm"], {"0.weight", "2.weight"}),
        (["2.weight", "0.*"], {"1.weight", "1.bias", "1.running_mean", "1.running_var"}),
    ],
)
def test_exclusion_by_name_and_by_kind(exclude, left):
    assert set(Layout(small(), exclude).names) == left


def test_errors_say_what_to_do():
    with pytest.raises(ConfigError, match=r"got '3\.weight'; it has 0\.weight, 0\.bias"):
        Layout(small(), ["3.weight"])
    with pytest.raises(ConfigError, match=r"must be a list of names, got 'batch-norm'; write \['batch-norm'\]"):
        Layout(small(), "batch-norm")
    with pytest.raises(ConfigError, match="got 'batch-norm'"):
        Layout(nn.Linear(2, 2), ["batch-norm"])
    frozen = small()
    frozen[2].half().requires_grad_(False)
    assert Layout(frozen).dtype is torch.float32  # a frozen part may have another dtype
    with pytest.raises(CompatibilityError, match="exclude less"):
        Layout(small(), ["*"])
    mixed = small()
    mixed[2].half()
    with pytest.raises(CompatibilityError, match=r"one dtype, got torch\.float32 .*torch\.float16 \(2\.weight\)"):
        Layout(mixed)
    assert Layout(mixed, ["2.weight"]).dtype is torch.float32


def test_a_model_without_trained_parameters_is_refused():
    with pytest.raises(CompatibilityError, match="something to train"):
        Layout(small().requires_grad_(False))


def test_a_vector_of_another_length_is_refused_and_changes_nothing():
    model = small()
    layout = Layout(model)
    before = layout.read(model)
    with pytest.raises(ConfigError, match=f"must have {layout.num_elements} elements, got {layout.num_elements - 1}; "):
        layout.write(model, before[:-1] + 1)
    assert torch.equal(layout.read(model), before)

import torch
from torch import nn

from distopt.coding.flat import FlatModel


def mixed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).double(), nn.Embedding(5, 2, sparse=True))
    model[0].bias.requires_grad_(False)
    return model


def test_parameters_go_out_and_come_back():
    source, target = FlatModel(mixed()), FlatModel(mixed())
    for p in source.parameters:
        p.data.add_(1.0)
    target.write(source.read())
    for ours, theirs in zip(source.parameters, target.parameters, strict=True):
        assert torch.equal(ours, theirs)
    assert [spec.dtype for spec in source.specs] == [torch.float32, torch.float64]
    assert [spec.shape for spec in source.specs] == [(12 + 10,), (8 + 2,)]


def test_gradients_go_out_and_come_back_also_sparse_ones_and_none():
    source, target = FlatModel(mixed()), FlatModel(mixed())
    model = source.model
    (model[0](torch.ones(1, 3)).sum() + model[2](torch.tensor([1, 3])).sum()).backward()
    flats, used = source.read_gradients()
    assert used.tolist() == [1, 0, 0, 1]  # the second layer has no gradient
    target.write_gradients(flats, used)
    for ours, theirs in zip(source.parameters, target.parameters, strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            assert torch.equal(ours.grad.to_dense(), theirs.grad)
    target.clear_gradients()
    assert all(p.grad is None for p in target.parameters)


def test_digests_tell_structures_and_fixed_values_apart():
    first, second = FlatModel(mixed()), FlatModel(mixed())
    assert first.describe() == second.describe()
    assert first.fixed_values() == second.fixed_values()
    for p in second.parameters:
        p.data.add_(1.0)  # trained values are sent: they may differ
    assert first.fixed_values() == second.fixed_values()
    second.model[0].bias.data.add_(1.0)  # frozen ones are not
    assert first.fixed_values() != second.fixed_values()
    renamed = FlatModel(nn.ModuleDict({"other": mixed()}))
    assert first.describe() != renamed.describe()

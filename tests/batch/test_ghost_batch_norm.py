"""Ghost batch normalisation against plain normalisations of the pieces, and what a swap must leave as it was."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distopt.batch import ghost_batch_norm_, plain_batch_norm_
from distopt.batch.ghost_batch_norm import ghost_sizes
from distopt.errors import CompatibilityError, ConfigError

KINDS = {
    "1d": (nn.BatchNorm1d, (3,)),
    "1d-long": (nn.BatchNorm1d, (3, 5)),
    "2d": (nn.BatchNorm2d, (3, 4, 2)),
    "3d": (nn.BatchNorm3d, (3, 2, 2, 2)),
}
SETTINGS = {
    "default": {},
    "cumulative": {"momentum": None},
    "no statistics": {"track_running_stats": False},
    "no parameters": {"affine": False},
}


def trained(module, batches, outputs_of):
    """Outputs, gradients and state after some batches."""
    seen = []
    for batch in batches:
        batch = batch.clone().requires_grad_()
        output = outputs_of(module, batch)
        output.square().sin().sum().backward()
        seen += [output.detach(), batch.grad]
    return seen + [parameter.grad for parameter in module.parameters()] + list(module.state_dict().values())


def in_pieces(sizes):
    return lambda module, batch: torch.cat([module(piece) for piece in batch.split(sizes)])


def whole(module, batch):
    return module(batch)


def assert_equal(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def batches_of(shape, samples=13, count=3):
    generator = torch.Generator().manual_seed(1)
    return [3 * torch.randn(samples, *shape, generator=generator) + 1 for _ in range(count)]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize(("made", "shape"), KINDS.values(), ids=KINDS.keys())
def test_it_is_plain_normalisation_of_the_pieces(made, shape, settings):
    plain, ghost = made(3, **settings), ghost_batch_norm_(made(3, **settings), 5)
    batches = batches_of(shape)
    assert_equal(trained(ghost, batches, whole), trained(plain, batches, in_pieces([5, 5, 3])))
    if settings.get("track_running_stats", True):
        assert int(ghost.num_batches_tracked) == 9  # 3 pieces of 3 batches
    assert_equal([ghost.eval()(batches[0])], [plain.eval()(batches[0])])  # in evaluation: the whole batch at once


@pytest.mark.parametrize("size", [13, 128])
def test_a_ghost_batch_as_large_as_the_batch_is_plain_to_the_bit(size):
    plain, ghost = nn.BatchNorm2d(3), ghost_batch_norm_(nn.BatchNorm2d(3), size)
    batches = batches_of((3, 4, 2))
    assert_equal(trained(ghost, batches, whole), trained(plain, batches, whole))


def test_running_statistics_are_hoffer_s():
    ghost = ghost_batch_norm_(nn.BatchNorm1d(3, momentum=0.3), 4)
    (batch,) = batches_of((3,), samples=12, count=1)
    ghost(batch)
    pieces = batch.split(4)  # algorithm 1: the piece i of n counts eta (1 - eta)^(n - i)
    weights = [0.3 * 0.7 ** (2 - i) for i in range(3)]
    mean = sum(weight * piece.mean(0) for weight, piece in zip(weights, pieces, strict=True))
    variance = 0.7**3 + sum(weight * piece.var(0) for weight, piece in zip(weights, pieces, strict=True))
    torch.testing.assert_close(ghost.running_mean, mean)
    torch.testing.assert_close(ghost.running_var, variance)


@pytest.mark.parametrize(
    ("samples", "sizes"), [(1, [1]), (4, [4]), (5, [5]), (8, [4, 4]), (9, [4, 5]), (10, [4, 4, 2]), (0, [])]
)
def test_a_rest_of_one_sample_joins_the_piece_before(samples, sizes):
    assert ghost_sizes(samples, 4) == sizes


def test_a_rest_of_one_sample_trains():
    ghost, plain = ghost_batch_norm_(nn.BatchNorm1d(3), 4), nn.BatchNorm1d(3)
    batches = batches_of((3,), samples=9)
    assert_equal(trained(ghost, batches, whole), trained(plain, batches, in_pieces([4, 5])))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4)
    )


def test_a_swap_keeps_everything_else_and_is_undone():
    model = network()
    heard = []
    model[1].register_forward_hook(lambda *_: heard.append("forward"))
    parameters, state, shown = dict(model.named_parameters()), copy.deepcopy(model.state_dict()), repr(model)
    assert ghost_batch_norm_(model, 4) is model
    assert "ghost_size=4" in repr(model)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert model.state_dict().keys() == state.keys()
    assert isinstance(model[1], nn.BatchNorm2d)
    network().load_state_dict(model.state_dict())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(ghost_batch_norm_(network(), 4)))):
        assert copied[1].ghost_size == 4
    model(torch.randn(8, 1, 4, 4))
    assert heard == ["forward"]  # once, not once per piece
    assert int(model[1].num_batches_tracked) == 2
    ghost_batch_norm_(model, 8)
    assert model[1].ghost_size == 8
    assert plain_batch_norm_(model) is model
    assert repr(model) == shown
    assert not hasattr(model[1], "ghost_size")
    assert (type(model[1]), type(model[5])) == (nn.BatchNorm2d, nn.BatchNorm1d)
    model(torch.randn(8, 1, 4, 4))
    assert int(model[1].num_batches_tracked) == 3


def test_channels_last_stays_channels_last():
    batch = torch.randn(8, 3, 4, 4).to(memory_format=torch.channels_last)
    assert ghost_batch_norm_(nn.BatchNorm2d(3), 4)(batch).is_contiguous(memory_format=torch.channels_last)


class Own(nn.BatchNorm1d):
    pass


@pytest.mark.parametrize(
    ("module", "remedy"),
    [
        (nn.SyncBatchNorm(3), "leave convert_sync_batchnorm"),
        (nn.LazyBatchNorm1d(), "one batch first"),
        (Own(3), "make it a plain one"),
    ],
    ids=["sync", "lazy", "own"],
)
def test_what_cannot_be_swapped_is_refused_and_nothing_is_changed(module, remedy):
    model = nn.Sequential(nn.BatchNorm1d(3), module)
    with pytest.raises(CompatibilityError, match=rf"got '1', which is .*; .*{remedy}"):
        ghost_batch_norm_(model)
    assert type(model[0]) is nn.BatchNorm1d


def test_other_bad_input():
    with pytest.raises(ConfigError, match="size must be an integer of at least 2, got 1; use 128"):
        ghost_batch_norm_(network(), 1)
    with pytest.raises(CompatibilityError, match="got Linear without any; leave it out"):
        ghost_batch_norm_(nn.Linear(2, 2))


def on_a_rank():
    """Gradients and statistics after two steps under DDP, swapped before or after the wrapping."""
    found = []
    for before in (True, False):
        model = network()
        if before:
            ghost_batch_norm_(model, 4)
        wrapped = DistributedDataParallel(model)
        if not before:
            ghost_batch_norm_(wrapped, 4)
        generator = torch.Generator().manual_seed(dist.get_rank())
        for _ in range(2):
            wrapped(torch.randn(8, 1, 4, 4, generator=generator)).square().sin().sum().backward()
        found.append([parameter.grad for parameter in model.parameters()] + list(model[1].buffers()))
    return found


@pytest.mark.job
def test_under_ddp(ranks):
    one, other = ranks(2)(on_a_rank)
    assert_equal(one[0], one[1])
    gradients = len(list(network().parameters()))
    assert_equal(one[0][:gradients], other[0][:gradients])
    assert int(one[0][-1]) == 4

"""How many entries are sent, and that flat states lie in memory as DDP's buckets do, whatever the layout."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distopt.ddp import DGC, FlatBucket
from distopt.ddp.parameters import flat_like, num_selected, shaped_like
from distopt.ops.checks import is_dense_in_memory

PARAMETERS = {
    "row-major": lambda: torch.randn(3, 4),
    "channels_last": lambda: torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
    "channels_last, one channel": lambda: torch.randn(4, 1, 5, 5).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.randn(2, 3, 2, 2, 2).to(memory_format=torch.channels_last_3d),
    "transposed": lambda: torch.randn(3, 4).t(),
    "permuted": lambda: torch.randn(2, 3, 4).permute(2, 0, 1),
    "every other column": lambda: torch.randn(3, 8)[:, ::2],
    "with an offset": lambda: torch.randn(50)[7:19].view(3, 4),
    "scalar": lambda: torch.randn(()),
    "one entry": lambda: torch.randn(1, 1, 1),
    "ones among the sizes": lambda: torch.randn(1, 5, 1, 2),
    "empty": lambda: torch.randn(0),
    "empty in two dimensions": lambda: torch.randn(3, 0),
    "bfloat16": lambda: torch.randn(3, 4).t().to(torch.bfloat16),
}
NOT_WRITABLE = {
    "expanded": lambda: torch.randn(1, 4).expand(3, 4),
    "expanded twice": lambda: torch.randn(()).expand(2, 3),
}


@pytest.mark.parametrize(
    ("numel", "density", "k"),
    [
        (0, 0.5, 0),
        (1, 1e-9, 1),
        (999, 0.001, 1),
        (1000, 0.001, 1),
        (1001, 0.001, 2),
        (700, 0.01, 7),  # 700 * 0.01 is a little more than 7
        (100, 0.07, 7),
        (10, 1.0, 10),
        (10, 0.999, 10),
        (3, 1 / 3, 1),
        (25_557_032, 0.001, 25_558),
        (2**31 - 1, 0.001, 2_147_484),
        (2**31 - 1, 1.0, 2**31 - 1),
    ],
)
def test_num_selected(numel, density, k):
    assert num_selected(numel, density) == k


@given(numel=st.integers(0, 2**31 - 1), density=st.floats(1e-9, 1.0))
def test_num_selected_is_the_ceiling_between_one_and_all(numel, density):
    k = num_selected(numel, density)
    assert min(numel, 1) <= k <= numel
    exact = max(1, math.ceil(numel * Fraction(density)))
    assert k in (min(numel, exact), min(numel, exact) - 1)
    assert k >= numel * density * (1 - 1e-12)


@given(numel=st.integers(1, 10**6), thousandths=st.integers(1, 1000))
def test_num_selected_of_decimal_densities_is_exact(numel, thousandths):
    assert num_selected(numel, thousandths / 1000) == max(1, -(-numel * thousandths // 1000))


@pytest.mark.parametrize("name", [*PARAMETERS, *NOT_WRITABLE])
def test_flat_and_shaped_are_inverse(name):
    parameter = {**PARAMETERS, **NOT_WRITABLE}[name]()
    values = torch.randn(parameter.shape)
    flat = flat_like(values, parameter, torch.float64)
    assert flat.shape == (parameter.numel(),)
    assert flat.dtype == torch.float64
    shaped = shaped_like(flat, parameter)
    assert shaped.shape == parameter.shape
    assert torch.equal(shaped, values.double())
    assert sorted(flat.tolist()) == sorted(values.double().flatten().tolist())
    if parameter.numel():
        shaped.fill_(3)  # a view: every entry of the flat tensor is one of the shaped one
        assert flat.eq(3).all()


@pytest.mark.parametrize("name", PARAMETERS)
def test_shaped_like_of_a_part_of_a_larger_tensor(name):
    parameter = PARAMETERS[name]()
    whole = torch.arange(parameter.numel() + 10.0)
    part = whole[5 : 5 + parameter.numel()]
    assert torch.equal(flat_like(shaped_like(part, parameter), parameter, torch.float32), part)


@pytest.mark.parametrize("name", [*PARAMETERS, *NOT_WRITABLE])
def test_dense_in_memory_means_what_torch_means(name):
    parameter = {**PARAMETERS, **NOT_WRITABLE}[name]()
    kept = torch.empty_like(parameter).stride()  # keeps the strides of dense tensors, and only of those
    matter = [i for i, size in enumerate(parameter.shape) if size > 1]
    assert is_dense_in_memory(parameter) == all(kept[i] == parameter.stride(i) for i in matter)
    assert is_dense_in_memory(parameter) == (name not in ("every other column", *NOT_WRITABLE))


class Odd(nn.Module):
    """Every layout above, each with another gradient at each entry."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for i, (name, make) in enumerate(PARAMETERS.items()):
            if name != "bfloat16":
                self.register_parameter(f"p{i}", nn.Parameter(make()))

    def forward(self):
        return sum((p * torch.arange(p.numel()).view(p.shape)).sum() for p in self.parameters())


def buffers_in_ddp():
    """How many parameters DDP's buckets hold in the order that `flat_like` says."""
    matching = []

    def hook(state, bucket):
        start = 0
        for parameter in bucket.parameters():
            values = torch.arange(parameter.numel()).view(parameter.shape).float()
            part = bucket.buffer()[start : start + parameter.numel()]
            matching.append(torch.equal(part, flat_like(values, parameter, torch.float32)))
            start += parameter.numel()
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model = DistributedDataParallel(Odd())
    model.register_comm_hook(None, hook)
    model().backward()
    return matching


def trained_with_decay(algorithm):
    """Parameters after some steps of SGD with momentum and weight decay."""
    model = DistributedDataParallel(Odd())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5, nesterov=True, weight_decay=0.3)
    if algorithm is not None:
        algorithm.attach(model, optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    return [parameter.detach().contiguous() for parameter in model.parameters()]


def test_states_lie_in_memory_as_gradients_do_in_ddp_buckets(ranks):
    assert ranks(2)(buffers_in_ddp)[0] == [True] * (len(PARAMETERS) - 1)


@pytest.mark.parametrize("form", ["momentum", "local"])
def test_weight_decay_reaches_the_right_entries_in_every_layout(ranks, form):
    expected = ranks(2)(trained_with_decay, None)[0]
    got = ranks(2)(trained_with_decay, DGC(density=1.0, weight_decay=form))[0]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["row-major", "channels_last", "transposed", "every other column", "scalar", "empty"])
def test_a_flat_bucket_lies_as_a_ddp_bucket_does(name):
    parameters = [PARAMETERS[name](), torch.zeros(2)]
    gradients = [torch.randn(p.shape) for p in parameters]
    bucket = FlatBucket(parameters, gradients)
    assert torch.equal(bucket.buffer()[: parameters[0].numel()], flat_like(gradients[0], parameters[0], torch.float32))
    for got, expected in zip(bucket.gradients(), gradients, strict=True):
        assert torch.equal(got, expected)
    bucket.buffer().zero_()
    assert not any(gradient.any() for gradient in bucket.gradients())

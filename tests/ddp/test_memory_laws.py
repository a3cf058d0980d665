"""What goes into a memory comes out or is still there, for every memory, over any mix of sparse and dense steps.

Everything runs in one process: a list of memories stands for the ranks. Values are small integers times a power of two,
so that sums are exact and the laws hold to the bit. A new subclass of `Memory` needs a line in MEMORIES.
"""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distopt.compress import round_to_wire
from distopt.ddp.memory import ErrorFeedback, Memory, MomentumCorrection, NoMemory

CPU = torch.device("cpu")
UNIT = 2.0**10  # of the gradients: ten halvings stay integers
MOMENTUM = 0.5


@dataclasses.dataclass(frozen=True)
class Kind:
    """A memory, and what its law calls "put in" and "held"."""

    make: Callable[..., Memory]  # of (numel, dtype, residual=)
    put_in: Callable[[Memory, Tensor], Tensor]  # what this step's gradient adds, from the memory before the step
    held: Callable[[Memory], Tensor | float]
    sparse: bool = True  # whether it has sparse steps
    masks: bool = False  # whether it forgets more than it sends


def held_v(memory):
    return 0.0 if memory.v is None else memory.v.clone()


def correction(*, nesterov, masking):
    def make(numel, dtype=torch.float32, *, residual=True):
        options = {"nesterov": nesterov, "masking": masking, "residual": residual}
        return MomentumCorrection(numel, dtype, CPU, momentum=MOMENTUM, **options)

    def put_in(memory, gradient):
        return (memory.u + gradient) * MOMENTUM + gradient if nesterov else memory.u * MOMENTUM + gradient

    return Kind(make, put_in, held_v, masks=masking)


def error_feedback(numel, dtype=torch.float32, *, residual=True):
    return ErrorFeedback(numel, dtype, CPU, residual=residual)


MEMORIES = {
    "none": Kind(lambda *_, **__: NoMemory(), lambda _, gradient: gradient.clone(), lambda _: 0.0, sparse=False),
    "error feedback": Kind(error_feedback, lambda _, gradient: gradient.clone(), held_v),
    "momentum": correction(nesterov=False, masking=False),
    "momentum, masking": correction(nesterov=False, masking=True),
    "nesterov": correction(nesterov=True, masking=False),
    "nesterov, masking": correction(nesterov=True, masking=True),
}
SPARSE = [name for name, kind in MEMORIES.items() if kind.sparse]
LOSSLESS = [name for name in SPARSE if not MEMORIES[name].masks]
CORRECTED = [name for name in SPARSE if isinstance(MEMORIES[name].make(1), MomentumCorrection)]


def integers(numel):
    return st.lists(st.integers(-8, 8), min_size=numel, max_size=numel).map(
        lambda v: torch.tensor(v, dtype=torch.float32) * UNIT
    )


def integer_gradient(numel, seed):
    return torch.randint(-8, 9, (numel,), generator=torch.Generator().manual_seed(seed)) * UNIT


def scatter(numel, indices, values):
    assert indices.dtype == torch.int32
    assert torch.equal(indices, indices.unique())  # ascending, each once
    return torch.zeros(numel, dtype=values.dtype).index_add_(0, indices.long(), values)


def select(memory, gradient, k):
    return memory.select_(gradient, torch.tensor([[0, gradient.numel(), k]]), k)


def sparse_step(memories, gradients, k):
    """The update that all ranks compute."""
    sent = [scatter(g.numel(), *reversed(select(m, g, k))) for m, g in zip(memories, gradients, strict=True)]
    return sum(sent) / len(memories)


def dense_step(memories, gradients):
    """The updates of the ranks, which must be equal."""
    outgoing = [memory.outgoing(gradient.clone()) for memory, gradient in zip(memories, gradients, strict=True)]
    assert {len(tensors) for tensors in outgoing} == {memories[0].num_outgoing}
    averaged = [sum(tensors) / len(memories) for tensors in zip(*outgoing, strict=True)]
    updates = [memory.settle_([a.clone() for a in averaged], None) for memory in memories]
    assert all(torch.equal(update, updates[0]) for update in updates)
    return updates[0].clone()


def subclasses(kind):
    return {kind, *(deeper for below in kind.__subclasses__() for deeper in subclasses(below))}


def test_every_memory_is_tested_here():
    shipped = {kind for kind in subclasses(Memory) - {Memory} if kind.__module__.startswith("distopt.")}
    assert {type(kind.make(3)) for kind in MEMORIES.values()} == shipped


@pytest.mark.parametrize("name", MEMORIES)
def test_a_new_memory_is_empty_and_its_tensors_are_flat(name):
    memory = MEMORIES[name].make(7)
    assert set(memory.tensors()) == set(memory.per_rank)
    assert all(tensor.shape == (7,) and not tensor.any() for tensor in memory.tensors().values())
    assert not memory.holds_back


@pytest.mark.parametrize("name", SPARSE)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_sparse_step_put_in_plus_held_is_sent_plus_held(name, data):
    kind, numel = MEMORIES[name], data.draw(st.integers(2, 40))
    memory = kind.make(numel)
    for _ in range(data.draw(st.integers(1, 6))):
        gradient, k = data.draw(integers(numel)), data.draw(st.integers(1, numel - 1))
        total = kind.put_in(memory, gradient) + kind.held(memory)
        before = gradient.clone()
        values, indices = select(memory, gradient, k)
        assert torch.equal(gradient, before)  # only read
        assert len(values) == k
        assert torch.equal(scatter(numel, indices, values) + kind.held(memory), total)
        assert values.abs().min() >= kind.held(memory).abs().max()  # the k largest
        assert not kind.held(memory)[indices.long()].any()


@pytest.mark.parametrize("name", CORRECTED)
def test_masking_forgets_the_velocity_of_what_was_sent_and_nothing_else(name):
    kind, memory = MEMORIES[name], MEMORIES[name].make(50)
    for step in range(4):
        gradient = integer_gradient(50, step)
        before = memory.u.clone()
        _, indices = select(memory, gradient, 5)
        made = (before + gradient) * MOMENTUM if "nesterov" in name else before * MOMENTUM + gradient
        if kind.masks:
            made[indices.long()] = 0
        assert torch.equal(memory.u, made)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("name", LOSSLESS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_over_any_mix_of_steps_all_that_was_put_in_is_sent_or_held(name, num_ranks, data):
    """`N sum(updates) + sum_r held_r == sum_t sum_r put_in`; for momentum correction `v_T == sum u_t - sum sent`."""
    kind, numel = MEMORIES[name], data.draw(st.integers(2, 20))
    memories = [kind.make(numel) for _ in range(num_ranks)]
    put_in, updates = torch.zeros(numel), torch.zeros(numel)
    for sparse in data.draw(st.lists(st.booleans(), min_size=1, max_size=6)):
        gradients = [data.draw(integers(numel)) for _ in range(num_ranks)]
        put_in += sum(kind.put_in(memory, gradient) for memory, gradient in zip(memories, gradients, strict=True))
        if sparse:
            updates += sparse_step(memories, gradients, data.draw(st.integers(1, numel - 1)))
        else:
            updates += dense_step(memories, gradients)
            assert not any(torch.any(kind.held(memory)) for memory in memories)
            assert not any(memory.holds_back for memory in memories)
        assert torch.equal(num_ranks * updates + sum(kind.held(memory) for memory in memories), put_in)


@pytest.mark.parametrize("name", SPARSE)
def test_the_dense_step_after_sparse_ones_sends_all_that_was_held_and_averages_the_velocity(name):
    kind = MEMORIES[name]
    memories = [kind.make(30) for _ in range(3)]
    for step in range(3):
        sparse_step(memories, [integer_gradient(30, 10 * step + rank) for rank in range(3)], 4)
    assert all(kind.held(memory).any() for memory in memories)
    gradients = [3.0 * integer_gradient(30, 100 + rank) for rank in range(3)]
    owed = sum(kind.put_in(m, g) + kind.held(m) for m, g in zip(memories, gradients, strict=True))
    velocities = [m.tensors().get("u", torch.zeros(30)).clone() for m in memories]
    assert torch.equal(dense_step(memories, gradients) * 3, owed)
    if name in CORRECTED:
        put = sum(
            (u + g) * MOMENTUM if "nesterov" in name else u * MOMENTUM + g
            for u, g in zip(velocities, gradients, strict=True)
        )
        assert torch.equal(memories[0].u * 3, put)
        assert all(torch.equal(memory.u, memories[0].u) for memory in memories)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("name", CORRECTED)
def test_dense_steps_are_sgd_with_momentum(name, residual, dtype):
    """To the bit for heavy-ball; with Nesterov, whose u is m times torch's buffer, to rounding."""
    nesterov = "nesterov" in name
    parameter = torch.zeros(200, dtype=dtype, requires_grad=True)
    sgd = torch.optim.SGD([parameter], lr=1.0, momentum=0.9, nesterov=nesterov)
    memories = [MEMORIES[name].make(200, dtype, residual=residual) for _ in range(2)]
    for memory in memories:
        memory.momentum = 0.9  # a power of two would hide rounding
    generator = torch.Generator().manual_seed(0)
    mine = torch.zeros(200, dtype=dtype)
    for _ in range(20):
        gradients = [torch.randn(200, generator=generator, dtype=dtype) for _ in range(2)]
        mine -= dense_step(memories, gradients)
        parameter.grad = sum(gradients) / 2
        sgd.step()
    torch.testing.assert_close(mine, parameter.detach(), **({} if nesterov else {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("name", ["none", "error feedback"])
def test_dense_steps_are_plain_averages_to_the_bit(name):
    memories = [MEMORIES[name].make(50, residual=False) for _ in range(2)]
    for seed in range(5):
        gradients = [torch.randn(50, generator=torch.Generator().manual_seed(seed + rank)) for rank in range(2)]
        assert torch.equal(dense_step(memories, gradients), sum(gradients) / 2)


@pytest.mark.parametrize("wire", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])  # under the smallest fp16, ordinary, over the largest
def test_what_16_bits_cut_off_is_given_back(name, wire, scale):
    kind, memory = MEMORIES[name], MEMORIES[name].make(100)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        gradient = torch.randn(100, generator=generator) * scale
        total = kind.held(memory) + kind.put_in(memory, gradient)
        values, indices = select(memory, gradient, 10)
        sent, error = round_to_wire(values, wire)
        memory.give_back_(indices, error)
        assert error.any()
        assert torch.equal(scatter(100, indices, sent.double()) + kind.held(memory).double(), total.double())


@pytest.mark.parametrize("name", SPARSE)
def test_what_a_dense_16_bit_wire_cut_off_goes_out_with_the_next_step(name):
    kind, memory = MEMORIES[name], MEMORIES[name].make(40)
    gradient = torch.randn(40, generator=torch.Generator().manual_seed(0))
    (whole,) = memory.outgoing(gradient)
    sent, error = round_to_wire(whole, torch.float16)
    memory.settle_([sent.float()], error)
    assert torch.equal(kind.held(memory), error)
    (again,) = memory.outgoing(torch.zeros(40))
    assert torch.equal(again, error)
    memory.settle_([again], None)
    assert not kind.held(memory).any()


@pytest.mark.parametrize("name", SPARSE)
def test_bfloat16_residuals_send_or_hold_what_they_rounded_to(name):
    kind, memory = MEMORIES[name], MEMORIES[name].make(100, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        gradient = torch.randn(100, generator=generator)
        state = MEMORIES[name].make(100)  # the same step with room for every bit
        for tensor_name, tensor in state.tensors().items():
            tensor.copy_(memory.tensors()[tensor_name])
        total = (kind.held(state) + kind.put_in(state, gradient)).bfloat16()
        values, indices = select(memory, gradient, 10)
        assert values.dtype == torch.float32
        assert kind.held(memory).dtype == torch.bfloat16
        assert torch.equal(scatter(100, indices, values) + kind.held(memory).float(), total.float())


@pytest.mark.parametrize("name", MEMORIES)
def test_restore_undoes_what_happened_since_the_snapshot(name):
    kind, memory = MEMORIES[name], MEMORIES[name].make(30)
    if kind.sparse:
        select(memory, integer_gradient(30, 1), 3)
    snapshot = memory.snapshot()
    before = {key: tensor.clone() for key, tensor in memory.tensors().items()}
    if kind.sparse:
        select(memory, integer_gradient(30, 2), 3)
        assert any(not torch.equal(tensor, before[key]) for key, tensor in memory.tensors().items())
    else:
        dense_step([memory], [integer_gradient(30, 2)])
    memory.restore_(snapshot)
    assert all(torch.equal(tensor, before[key]) for key, tensor in memory.tensors().items())
    assert set(before) == set(snapshot)


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("numel", [0, 1])
def test_empty_and_single_entries_go_whole(name, numel):
    memories = [MEMORIES[name].make(numel) for _ in range(2)]
    for _ in range(3):
        assert dense_step(memories, [torch.ones(numel), torch.ones(numel)]).shape == (numel,)


def test_plain_averaging_has_no_sparse_step():
    with pytest.raises(NotImplementedError, match="sends everything"):
        select(NoMemory(), torch.ones(3), 1)
    with pytest.raises(NotImplementedError, match="sends everything"):
        NoMemory().give_back_(torch.zeros(1, dtype=torch.int32), torch.ones(1))

"""A plan tiles its bucket, counts its bytes, and takes the wire that puts less on the link."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distopt
from distopt.compress import INDEX_FORMATS, WIRE_DTYPES, allgather_bytes, allreduce_bytes
from distopt.ddp.memory import ErrorFeedback, NoMemory
from distopt.ddp.parameters import TrackedParameter, num_selected
from distopt.ddp.plan import plan_bucket
from distopt.ddp.policy import WirePolicy

PAPER = [0.25, 0.0625, 0.015625, 0.004, 0.001]
HEADER = 12


class HoldsBack(NoMemory):
    """A memory that owes a flush."""

    num_outgoing = 2


def tracked(*shapes, density=0.01, dtype=torch.float32, memory=NoMemory):
    return [
        TrackedParameter(
            name=f"p{i}",
            parameter=torch.empty(shape, dtype=dtype, device="meta"),
            memory=memory(),
            density=None if len(shape) <= 1 else density,
        )
        for i, shape in enumerate(shapes)
    ]


def policy(values="fp32", indices="int32", choice="auto", *, with_status=True, with_used_flags=False):
    return WirePolicy(
        value_dtype=WIRE_DTYPES.get(values),
        index_format=INDEX_FORMATS[indices],
        choice=choice,
        with_status=with_status,
        with_used_flags=with_used_flags,
    )


def final(entry):
    return 1.0 if entry.density is None else entry.density


def plan(entries, wire=None, *, num_ranks=2, dtype=torch.float32, density_of=final):
    return plan_bucket(entries, dtype, density_of, wire or policy(), num_ranks)


def test_positions_in_a_bucket_fit_32_bits():
    with pytest.raises(distopt.CompatibilityError, match=r"at most 2147483647 entries, got 2147483798; use a smaller"):
        plan(tracked((2**31 - 2, 1), (102,), (25, 2), density=1e-6))
    whole = plan(tracked((2**31 - 2, 1), (102,), (25, 2), density=1.0))
    assert whole.dense_numel == 2**31 + 150


shapes = st.lists(
    st.one_of(st.tuples(st.integers(0, 300)), st.tuples(st.integers(1, 200), st.integers(1, 200))),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(
    shapes=shapes,
    density=st.sampled_from([1e-6, 0.001, 0.25, 0.9, 1.0]),
    values=st.sampled_from(sorted(WIRE_DTYPES)),
    indices=st.sampled_from(sorted(INDEX_FORMATS)),
    choice=st.sampled_from(["auto", "sparse", "dense"]),
    num_ranks=st.sampled_from([1, 2, 3, 8, 1000]),
    flags=st.booleans(),
)
def test_slots_bytes_and_wire(shapes, density, values, indices, choice, num_ranks, flags):
    entries = tracked(*shapes, density=density)
    wire = policy(values, indices, choice, with_used_flags=flags)
    made = plan(entries, wire, num_ranks=num_ranks)

    position = 0
    for slot, entry in zip(made.slots, entries, strict=True):
        numel = entry.parameter.numel()
        assert (slot.start, slot.stop) == (position, position + numel)
        position += numel
        k = num_selected(numel, density) if entry.density is not None and density < 1 else 0
        assert slot.k == (0 if k == numel else k)  # what would be sent entirely goes whole
    assert made.numel == position
    assert made.count == sum(slot.k for slot in made.slots)

    itemsize = WIRE_DTYPES[values].itemsize
    whole = sum(slot.stop - slot.start for slot in made.whole)
    if made.selected_on_dense_wire:
        assert made.count
        assert made.dense_numel == position
        assert made.layout.count == 0
    else:
        assert made.dense_numel == whole
        assert made.layout.count == made.count
    header = HEADER + (4 * -(-len(shapes) // 32) if flags else 0)
    sparse_bytes = 0
    if not made.selected_on_dense_wire and made.count:
        sparse_bytes = itemsize * made.count + INDEX_FORMATS[indices].nbytes(position, made.count)
    expected = header + sparse_bytes + itemsize * made.dense_numel
    assert expected <= made.sent_bytes < expected + 4  # up to an item of padding
    payload = made.sent_bytes - itemsize * made.dense_numel
    assert made.link_bytes == allgather_bytes(num_ranks, payload) + allreduce_bytes(
        num_ranks, itemsize * made.dense_numel
    )
    if choice != "auto":
        assert made.selected_on_dense_wire == (choice == "dense" and made.count > 0)
    again = plan(tracked(*shapes, density=density), wire, num_ranks=num_ranks)
    assert (again.layout, again.dense_numel, again.dense_dtype) == (made.layout, made.dense_numel, made.dense_dtype)


@settings(max_examples=100, deadline=None)
@given(
    shapes=shapes,
    density=st.sampled_from(PAPER),
    values=st.sampled_from(sorted(WIRE_DTYPES)),
    num_ranks=st.integers(1, 2000),
)
def test_auto_never_puts_more_on_the_link_than_either_wire(shapes, density, values, num_ranks):
    links = {
        choice: plan(tracked(*shapes, density=density), policy(values, choice=choice), num_ranks=num_ranks).link_bytes
        for choice in ("auto", "sparse", "dense")
    }
    header = allgather_bytes(num_ranks, HEADER + 4)
    assert links["auto"] <= min(links["sparse"], links["dense"]) + header


@pytest.mark.parametrize(
    ("values", "indices", "ranks_sparse"),
    [("fp32", "int32", 3), ("fp16", "int32", 2), ("fp16", "block16", 3)],
)
def test_the_25_percent_stage_goes_sparse_only_while_that_is_cheaper(values, indices, ranks_sparse):
    """Break-even 8 / (d b) for fp32, 4 / (d b) against 16-bit all-reduces; headers tip the balance at equality."""
    dense = [
        plan(tracked((1000, 1000), density=0.25), policy(values, indices), num_ranks=n).selected_on_dense_wire
        for n in range(1, 9)
    ]
    assert dense == [n > ranks_sparse for n in range(1, 9)]


def test_a_dense_stage_is_never_dearer_than_plain_averaging_but_for_its_header():
    for num_ranks in range(2, 65):
        for density in PAPER:
            made = plan(tracked((500, 400), (400,), density=density), num_ranks=num_ranks)
            assert made.link_bytes <= allreduce_bytes(num_ranks, 4 * made.numel) + allgather_bytes(num_ranks, HEADER)


@pytest.mark.parametrize(
    ("bucket", "values", "value_dtype", "dense_dtype"),
    [
        (torch.float32, "fp32", torch.float32, torch.float32),
        (torch.float32, "fp16", torch.float16, torch.float16),
        (torch.float32, "bf16", torch.bfloat16, torch.bfloat16),
        (torch.float32, None, torch.float32, torch.float32),
        (torch.bfloat16, "fp32", torch.float32, torch.bfloat16),
        (torch.bfloat16, "fp16", torch.float16, torch.bfloat16),
        (torch.float16, "bf16", torch.bfloat16, torch.float16),
        (torch.float64, "fp32", torch.float64, torch.float64),
        (torch.float64, "fp16", torch.float16, torch.float16),
    ],
)
def test_wire_dtypes(bucket, values, value_dtype, dense_dtype):
    made = plan(tracked((100, 100), (100,), dtype=bucket), policy(values), dtype=bucket)
    assert (made.value_dtype, made.dense_dtype) == (value_dtype, dense_dtype)
    assert made.layout.value_dtype == value_dtype


@pytest.mark.parametrize("values", ["fp32", "fp16"])
def test_a_flush_sends_two_tensors_in_full_precision(values):
    entries = tracked((10, 10), (10, 10), (10,), memory=HoldsBack)
    flush = plan(entries, policy(values), density_of=lambda _: 1.0)
    assert [slot.num_outgoing for slot in flush.slots] == [2, 2, 2]
    assert flush.dense_numel == 420
    assert flush.dense_dtype == torch.float32
    sparse = plan(tracked((10, 10), memory=HoldsBack), policy(values))
    assert sparse.dense_numel == 0  # a sparse step flushes nothing


def test_status_and_flags():
    entries = tracked((10,), (20,))
    assert plan(entries, policy(with_status=False)).layout is None
    assert plan(entries, policy(with_status=False)).sent_bytes == 4 * 30
    assert plan(entries).sent_bytes == 4 * 30 + HEADER
    assert plan(entries, policy(with_used_flags=True)).layout.num_flags == 2
    assert plan(tracked((100, 100)), policy(with_status=False)).layout.count == 100  # sparse always has a header


def test_a_matrix_of_one_entry_and_an_empty_one_go_whole():
    made = plan(tracked((1, 1), (0, 5), (2, 1)))
    assert [slot.k for slot in made.slots] == [0, 0, 1]


def test_parts_of_a_bucket():
    made = plan(tracked((2, 3), (4,), (5, 2), memory=lambda: ErrorFeedback(10, torch.float32, torch.device("meta"))))
    flat = torch.arange(20)
    assert [slot.of(flat).tolist() for slot in made.slots] == [list(range(6)), [6, 7, 8, 9], list(range(10, 20))]
    assert [slot.tracked.name for slot in made.sparse] == ["p0", "p2"]
    assert [slot.tracked.name for slot in made.whole] == ["p1"]


def test_one_density_per_parameter():
    entries = tracked((100, 100), (100, 100))
    made = plan(entries, density_of=lambda entry: {"p0": 0.5, "p1": 0.001}[entry.name])
    assert [slot.k for slot in made.slots] == [5000, 10]

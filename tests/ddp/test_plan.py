"""A plan tiles its bucket, counts its bytes, and takes the route that is predicted to be fastest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distopt
from distopt.comm import Place
from distopt.compress import INDEX_FORMATS, WIRE_DTYPES
from distopt.ddp.memory import ErrorFeedback, NoMemory
from distopt.ddp.parameters import TrackedParameter, num_selected
from distopt.ddp.plan import plan_bucket
from distopt.ddp.policy import Routing, WirePolicy

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


def policy(values="fp32", indices="int32", *, with_status=True, with_used_flags=False):
    return WirePolicy(
        value_dtype=WIRE_DTYPES.get(values),
        index_format=INDEX_FORMATS[indices],
        exchange="auto",
        with_status=with_status,
        with_used_flags=with_used_flags,
    )


def final(entry):
    return 1.0 if entry.density is None else entry.density


def plan(
    entries,
    wire=None,
    *,
    num_ranks=2,
    dtype=torch.float32,
    density_of=final,
    routes=("allgather",),
    predict=None,
    **place,
):
    routing = Routing(place=Place(num_ranks=num_ranks, **place), routes=routes, predict=predict)
    return plan_bucket(entries, dtype, density_of, wire or policy(), routing)


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


@settings(max_examples=200, deadline=None)
@given(
    shapes=shapes,
    density=st.sampled_from([1e-6, 0.001, 0.25, 0.9, 1.0]),
    values=st.sampled_from(sorted(WIRE_DTYPES)),
    indices=st.sampled_from(sorted(INDEX_FORMATS)),
    route=st.sampled_from(["whole", "allgather", "balanced", "hierarchical", "dense"]),
    num_ranks=st.sampled_from([1, 2, 3, 8, 1000]),
    flags=st.booleans(),
    leads=st.booleans(),
)
def test_slots_and_bytes_on_every_route(shapes, density, values, indices, route, num_ranks, flags, leads):
    entries = tracked(*shapes, density=density)
    wire = policy(values, indices, with_used_flags=flags)
    size = 2 if num_ranks % 2 == 0 else 1
    nodes = num_ranks // size
    made = plan(
        entries, wire, num_ranks=num_ranks, routes=(route,), num_nodes=nodes, node_size=size, leads=leads or size == 1
    )

    position = 0
    for slot, entry in zip(made.slots, entries, strict=True):
        numel = entry.parameter.numel()
        assert (slot.start, slot.stop) == (position, position + numel)
        position += numel
        k = num_selected(numel, density) if entry.density is not None and density < 1 and route != "whole" else 0
        assert slot.k == (0 if k == numel else k)  # what would be sent entirely goes whole
    assert made.numel == position
    assert made.count == sum(slot.k for slot in made.slots)
    assert sorted(slot.start for group in made.groups for slot in group) == sorted(slot.start for slot in made.slots)

    itemsize = WIRE_DTYPES[values].itemsize
    whole = sum(slot.numel for slot in made.whole)
    header = HEADER + (4 * -(-len(shapes) // 32) if flags else 0)

    def entries_nbytes(numel, count):
        return itemsize * count + INDEX_FORMATS[indices].nbytes(numel, count) if count else 0

    def padded(expected, found):
        assert expected <= found < expected + 4  # up to an item of padding
        return found

    n, k = num_ranks, made.count
    if k == 0:
        assert made.route == "whole"
    if made.route in ("whole", "dense"):
        assert made.dense_numel == position
        dense = itemsize * position
        assert made.sent_bytes == header + dense
        assert made.link_bytes == (n - 1) * header + 2 * (n - 1) * dense // n
        return
    assert made.dense_numel == whole
    dense = itemsize * whole
    ring = 2 * (n - 1) * dense // n
    if made.route == "allgather" and (n - 1) * dense <= 65536:  # one collective for all
        payload = padded(header + entries_nbytes(position, k) + dense, made.layout.nbytes)
        assert made.sent_bytes == payload
        assert made.link_bytes == (n - 1) * payload
    elif made.route == "allgather":
        payload = padded(header + entries_nbytes(position, k), made.layout.nbytes)
        assert made.sent_bytes == payload + dense
        assert made.link_bytes == (n - 1) * payload + ring
        assert route == "allgather" or made.sparse_numel < n  # balanced: too little for every owner
    elif made.route == "balanced":
        owned, available = -(-made.sparse_numel // n), made.sparse_numel // n
        sent, returned = min(-(-k // n), available), min(-(-4 * k // n), available)
        first = padded(header + entries_nbytes(owned, sent), made.layout.nbytes)
        second = padded(HEADER + entries_nbytes(owned, returned), made.returned.nbytes)
        assert made.sent_bytes == n * first + second + dense
        assert made.link_bytes == (n - 1) * (first + second) + ring
    else:
        payload = padded(HEADER + entries_nbytes(position, k), made.returned.nbytes)
        assert made.layout.nbytes == header
        if leads or size == 1:
            assert made.sent_bytes == header + payload + dense
            assert made.link_bytes == (n - 1) * header + (nodes - 1) * payload + 2 * (nodes - 1) * dense // nodes
            assert made.node_bytes == (size - 1) * (nodes * payload + dense)
        else:
            assert made.sent_bytes == header + dense
            assert made.link_bytes == (n - 1) * header
            assert made.node_bytes == 4 * position + dense


def test_of_several_routes_the_one_that_is_predicted_to_take_least():
    seen = []

    def predict(made):
        seen.append((made.route, made.dense_dtype))
        return {"allgather": 2.0, "whole": 1.0 if made.dense_dtype == torch.float32 else 0.5, "balanced": 3.0}[
            made.route
        ]

    routes = ("allgather", "whole", "balanced")
    made = plan(tracked((100, 100), (100,)), routes=routes, predict=predict)
    assert (made.route, made.predicted_s, made.count) == ("whole", 1.0, 0)
    assert [route for route, _ in seen] == list(routes)
    made = plan(tracked((100, 100)), policy("fp16"), routes=routes, predict=predict)
    assert (made.route, made.predicted_s, made.dense_dtype) == ("whole", 0.5, torch.float16)
    assert ("whole", torch.float32) in seen[-4:]  # both are considered
    assert plan(tracked((100,)), routes=routes, predict=predict).route == "whole"


@pytest.mark.parametrize(("saved_s", "route"), [(0.1, "balanced"), (0.0006, "balanced"), (0.0004, "allgather")])
def test_another_route_must_be_worth_it(saved_s, route):
    seconds = {"allgather": 2.0, "whole": 2.0, "balanced": 2.0 - saved_s}
    made = plan(tracked((100, 100)), routes=tuple(seconds), predict=lambda candidate: seconds[candidate.route])
    assert made.route == route


def test_a_bucket_too_small_for_its_owners_is_gathered():
    small = plan(tracked((3, 3), density=0.1), num_ranks=10, routes=("balanced",))
    gathered = plan(tracked((3, 3), density=0.1), num_ranks=10)
    assert (small.route, small.sent_bytes, small.link_bytes) == ("allgather", gathered.sent_bytes, gathered.link_bytes)
    assert plan(tracked((3, 3), density=0.1), num_ranks=9, routes=("balanced",)).route == "balanced"


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

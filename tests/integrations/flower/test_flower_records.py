"""Replies and broadcasts as records, and what a client keeps: what comes back, and what is refused."""

import math

import pytest
import torch

pytest.importorskip("flwr", reason="Flower has an environment of its own: make test-flower")

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from distopt.errors import ConfigError, DecodeError, StateMismatchError
from distopt.federated import Broadcast, FedAU, FisherAveraging, Layout, Reply, Scaffold, UplinkCompression
from distopt.integrations.flower.client_memory import NEVER, InContext, InFolder
from distopt.integrations.flower.job import Job
from distopt.integrations.flower.records import read_broadcast, read_reply, write_broadcast, write_reply
from flower_test_app.work import LOCAL, make_model

LAYOUT = Layout(make_model())
NUM_REST = LAYOUT.num_elements - LAYOUT.num_trained
UPLINKS = {"whole": None, "compressed": UplinkCompression(density=0.1), "rounded": UplinkCompression(density=1.0)}
ALGORITHMS = [FedAU(), Scaffold(), FisherAveraging()]


def vector(seed, length=LAYOUT.num_trained):
    return torch.randn(length, generator=torch.Generator().manual_seed(seed))


def reply_of(job, delta=None):
    tensors = {name: vector(seed) for seed, name in enumerate(("delta", *job.algorithm.sends))}
    if delta is not None:
        tensors["delta"] = delta
    reply = Reply(client=3, version=7, num_samples=40, num_steps=5, tensors={**tensors, "rest": vector(99, NUM_REST)})
    kept = (
        {} if job.uplink is None else {name: torch.zeros(LAYOUT.num_trained) for name in job.uplink.kept(job.algorithm)}
    )
    return reply if job.uplink is None else job.uplink.compress(job.algorithm, reply, kept)[0]


@pytest.mark.parametrize("uplink", UPLINKS)
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.name)
def test_a_reply_comes_back_to_the_bit_with_the_bytes_that_it_was(algorithm, uplink):
    job = Job(algorithm=algorithm, local=LOCAL, uplink=UPLINKS[uplink])
    sent = reply_of(job)
    content = write_reply(sent, job)
    came = read_reply(content, job, LAYOUT, 3)
    assert (came.client, came.version, came.num_samples, came.num_steps) == (3, 7, 40, 5)
    assert came.tensors.keys() == sent.tensors.keys()
    assert all(torch.equal(came.tensors[name], tensor) for name, tensor in sent.tensors.items())
    assert came.num_bytes == sent.num_bytes
    carried = sum(array.numpy().nbytes for array in content.array_records["tensors"].values())
    assert carried == sent.num_bytes


@pytest.mark.parametrize("uplink", UPLINKS)
def test_infinity_stays_infinite(uplink):
    """A 16-bit payload would make it the largest number, which the server would take."""
    job = Job(algorithm=FedAU(), local=LOCAL, uplink=UPLINKS[uplink])
    delta = vector(0)
    delta[5] = math.inf
    assert read_reply(write_reply(reply_of(job, delta), job), job, LAYOUT, 3).delta[5] == math.inf


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.name)
def test_a_broadcast_comes_back_to_the_bit(algorithm):
    job = Job(algorithm=algorithm, local=LOCAL, uplink=UPLINKS["compressed"], exclude=("0.bias",), seed=4)
    sent = Broadcast(version=3, model=vector(1, LAYOUT.num_elements), extras={"c": vector(2)})
    content = write_broadcast(sent, job, saved=2, run="a")
    came = read_broadcast(content, LAYOUT)
    assert came.version == 3
    assert torch.equal(came.model, sent.model)
    assert torch.equal(came.extras["c"], sent.extras["c"])
    assert Job.from_text(content.config_records["distopt"]["job"]) == job


def test_a_broadcast_of_another_model_is_refused():
    content = write_broadcast(
        Broadcast(version=0, model=torch.zeros(3)), Job(algorithm=FedAU(), local=LOCAL), saved=0, run="a"
    )
    with pytest.raises(DecodeError, match=f"must be {LAYOUT.num_elements} elements"):
        read_broadcast(content, LAYOUT)
    with pytest.raises(DecodeError, match="use FederatedStrategy"):
        read_broadcast(RecordDict(), LAYOUT)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"algorithm": {"algorithm": "dgc"}}', "\N{SNOWMAN}", "null"])
def test_what_is_no_job_is_refused(text):
    with pytest.raises(ConfigError, match="a job must be the text of the server's"):
        Job.from_text(text)


def test_a_job_of_an_algorithm_that_is_not_known_here():
    text = Job(algorithm=FedAU(), local=LOCAL).to_text().replace("fedau", "fedpower")
    with pytest.raises(ConfigError, match="got 'fedpower'"):
        Job.from_text(text)
    with pytest.raises(ConfigError, match="must be a federated one, got 'topk'"):
        Job.from_text(
            text.replace('"algorithm": "fedpower"', '"algorithm": "topk"')
            .replace(', "cutoff": 50', "")
            .replace('"server_optimizer": {"optimizer": "plain"}, "weighting": "uniform"', '"density": 0.1')
        )


@given(
    data=st.binary(max_size=300),
    head=st.sampled_from(
        [
            b"",
            b"\x93NUMPY\x01\x00",
            b"PK\x03\x04",
            b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999,), }",
        ]
    ),
    name=st.sampled_from(["delta", "rest"]),
    uplink=st.sampled_from(sorted(UPLINKS)),
)
def test_arbitrary_bytes_in_place_of_an_array(data, head, name, uplink):
    job = Job(algorithm=FedAU(), local=LOCAL, uplink=UPLINKS[uplink])
    content = write_reply(reply_of(job), job)
    content.array_records["tensors"][name] = Array("float32", (5,), "numpy.ndarray", head + data)
    with pytest.raises(DecodeError):
        read_reply(content, job, LAYOUT, 3)


@given(data=st.binary(max_size=300), uplink=st.sampled_from(["compressed", "rounded"]))
def test_arbitrary_bytes_in_place_of_a_payload(data, uplink):
    job = Job(algorithm=FedAU(), local=LOCAL, uplink=UPLINKS[uplink])
    content = write_reply(reply_of(job), job)
    content.array_records["tensors"]["delta"] = Array(torch.tensor(list(data), dtype=torch.uint8))
    with pytest.raises(DecodeError):
        read_reply(content, job, LAYOUT, 3)


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"tensors": ArrayRecord(), "numbers": MetricRecord({"version": 0})}),
        RecordDict({"tensors": ConfigRecord(), "numbers": ConfigRecord()}),
    ],
    ids=["nothing", "too little", "other kinds"],
)
def test_records_that_are_no_reply(content):
    with pytest.raises(DecodeError, match="a reply must have"):
        read_reply(content, Job(algorithm=FedAU(), local=LOCAL), LAYOUT, 3)


# -- what a client keeps -----------------------------------------------------------------------------------------------


def kept(number):
    return {"c": torch.full((4,), float(number))}


def test_a_client_goes_back_with_its_server_and_forgets_what_came_after(tmp_path):
    memory = InFolder(tmp_path, "run", 3)
    assert memory.answered == NEVER
    assert memory.before(0) == {}
    for version in (0, 1, 2):
        memory.keep(version, kept(version), saved=0)
    assert memory.answered == 2
    assert torch.equal(memory.before(1)["c"], kept(0)["c"])
    memory.keep(1, kept(7), saved=1)
    assert memory.answered == 1
    assert torch.equal(memory.before(5)["c"], kept(7)["c"])  # not what it had after the version 2 that is no more


def test_a_client_keeps_what_its_server_may_ask_for_and_no_more(tmp_path):
    memory = InFolder(tmp_path, "run", 3)
    for version in range(8):
        memory.keep(version, kept(version), saved=version - version % 3)
    assert torch.equal(memory.before(6)["c"], kept(5)["c"])
    assert len(list((tmp_path / "run" / "client-3").iterdir())) == 3
    with pytest.raises(StateMismatchError, match="what the client kept before version 3, got"):
        memory.before(3)


def test_a_run_must_not_name_a_folder_elsewhere(tmp_path):
    with pytest.raises(ConfigError, match=r"letters and digits, got '\.\./etc'"):
        InFolder(tmp_path, "../etc", 3)


def test_a_context_of_another_strategy_is_empty():
    state = RecordDict()
    memory = InContext(state, "a")
    memory.keep(4, kept(4), saved=0)
    assert torch.equal(InContext(state, "a").before(5)["c"], kept(4)["c"])
    assert InContext(state, "b").before(0) == {}
    with pytest.raises(StateMismatchError, match="must not be asked for version 4 again"):
        memory.before(4)

"""What compressed replies lose: nothing, only time; and what they cost."""

import numpy as np
import pytest
import torch
from least_squares import NUM_CLIENTS, Job, batches_of

from distopt.errors import DecodeError
from distopt.federated import (
    Client,
    ClientData,
    FedAvg,
    FisherAveraging,
    IIDPartition,
    LocalTraining,
    Scaffold,
    Simulation,
    UplinkCompression,
)

VECTOR = torch.tensor([0.5, -3.0, 0.125, 2.0, -0.25, 1e-3, 70000.0, 0.0], dtype=torch.float64)


def test_the_largest_entries_are_sent_and_the_others_are_not():
    uplink = UplinkCompression(density=0.4, values="fp32")
    payload, unsent = uplink.send(VECTOR)
    sent = uplink.receive(payload, 8, torch.float64)
    assert sent.tolist() == [0.0, -3.0, 0.0, 2.0, 0.0, 0.0, 70000.0, 0.0]
    assert torch.equal(sent + unsent, VECTOR)


@pytest.mark.parametrize("values", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("indices", ["int32", "block16"])
@pytest.mark.parametrize("density", [1e-6, 0.3, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sent_and_unsent_are_all_that_there_was(values, indices, density, dtype):
    uplink = UplinkCompression(density=density, values=values, indices=indices)
    vector = torch.randn(1000, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 10
    vector[17] = 1e6  # beyond what fp16 holds: cut off, and the rest unsent
    payload, unsent = uplink.send(vector)
    sent = uplink.receive(payload, 1000, dtype)
    assert payload.nbytes == uplink.layout(1000).nbytes
    assert int(sent.count_nonzero()) == max(1, round(density * 1000))
    torch.testing.assert_close(sent + unsent, vector, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0)


def test_a_payload_of_something_else_is_refused():
    payload, _ = UplinkCompression(density=0.4).send(VECTOR)
    with pytest.raises(DecodeError):
        UplinkCompression(density=0.5).receive(payload, 8, torch.float64)
    with pytest.raises(DecodeError):
        UplinkCompression(density=0.4, values="bf16").receive(payload, 8, torch.float64)


def with_uplink(algorithm, uplink):
    job = Job(algorithm)
    job.client = Client(
        algorithm=algorithm, loss=job.client.loss, optimizer=job.client.optimizer, max_norm=None, uplink=uplink
    )
    return job


@pytest.mark.parametrize("algorithm", [FedAvg(), Scaffold()])
def test_what_a_client_sends_over_rounds_is_what_it_would_have_sent(algorithm):
    """Of one client whose broadcasts are given, the sum of all that arrives and of what is unsent."""
    names = ("delta", *algorithm.sends)
    job, plain = with_uplink(algorithm, UplinkCompression(density=0.3)), Job(algorithm)
    arrived = dict.fromkeys(names, 0.0)
    meant = dict.fromkeys(names, 0.0)
    for _ in range(5):
        for total, reply in ((arrived, job.reply(1)), (meant, plain.reply(1))):
            for name in names:
                total[name] = total[name] + reply.tensors[name]
    for name in names:
        unsent = job.kept[1][f"unsent {name}"]
        assert unsent.any()
        torch.testing.assert_close(arrived[name] + unsent, meant[name], rtol=1e-12, atol=1e-12)
    for name in algorithm.kept:  # what the algorithm keeps is of what the client did
        assert torch.equal(job.kept[1][name], plain.kept[1][name])


def test_without_error_feedback_it_is_lost():
    job = with_uplink(FedAvg(), UplinkCompression(density=0.3, error_feedback=False))
    job.reply(1)
    assert job.kept[1] == {}
    first = job.reply(1)
    assert torch.equal(first.delta, job.reply(1).delta)


def test_what_is_no_change_is_sent_whole():
    algorithm = FisherAveraging()
    job, plain = with_uplink(algorithm, UplinkCompression(density=0.3)), Job(algorithm)
    step = {"client": 1, "num_samples": 5, "samples": lambda: batches_of(1, (0, 2, 0, 0, 0))}
    sent = [
        each.client.step(each.model, each.layout, {}, each.broadcast, batches_of(1, (0, 2, 0, 0, 0)), **step)[1]
        for each in (job, plain)
    ]
    assert torch.equal(sent[0].tensors["fisher"], sent[1].tensors["fisher"])
    assert int(sent[0].delta.count_nonzero()) == 1
    assert sent[0].num_bytes == UplinkCompression(density=0.3).layout(4).nbytes + 4 * 8


def test_a_reply_that_is_not_finite_is_refused_and_keeps_what_was_unsent():
    job = with_uplink(FedAvg(), UplinkCompression(density=0.3))
    before = dict(job.round((1,)) is not None and job.kept[1])
    batches = [(inputs * float("inf"), targets) for inputs, targets in batches_of(1, (0, 1, 0, 0, 0))]
    kept, reply = job.client.step(job.model, job.layout, job.kept[1], job.broadcast, batches, client=1, num_samples=5)
    assert all(torch.equal(kept[name], before[name]) for name in before)
    state, _ = job.server.step(job.state, [reply])
    assert state.refused == {"not finite": 1}


def test_a_client_without_samples_sends_nothing_and_forgets_nothing():
    job = with_uplink(FedAvg(), UplinkCompression(density=0.3))
    job.round((1,))
    before = job.kept[1]["unsent delta"]
    kept, reply = job.client.step(job.model, job.layout, job.kept[1], job.broadcast, [], client=1, num_samples=0)
    assert reply.num_bytes == 0
    assert torch.equal(kept["unsent delta"], before)


def test_density_one_in_full_precision_changes_nothing():
    whole, plain = with_uplink(FedAvg(), UplinkCompression(density=1, values="fp32")), Job(FedAvg())
    everybody = [tuple(range(NUM_CLIENTS))] * 4
    np.testing.assert_allclose(whole.run(everybody), plain.run(everybody), rtol=1e-5)


def test_bytes_of_a_job():
    rng = np.random.default_rng(0)
    inputs = torch.from_numpy(rng.standard_normal((200, 50)).astype(np.float32))
    labels = (inputs[:, 0] > 0).long()
    settings = {
        "clients": ClientData.split((inputs, labels), IIDPartition(), 10),
        "local": LocalTraining(steps=5, lr=0.5),
        "algorithm": FedAvg(),
        "evaluate": lambda model: {"accuracy": (model(inputs).argmax(1) == labels).double().mean()},
        "evaluate_every": 40,
    }
    torch.manual_seed(0)
    dense = Simulation(model=torch.nn.Linear(50, 2), **settings).run(40)
    torch.manual_seed(0)
    sparse = Simulation(model=torch.nn.Linear(50, 2), uplink=UplinkCompression(density=0.05), **settings).run(40)
    nbytes = UplinkCompression(density=0.05).layout(102).nbytes
    assert {row["bytes_up"] for row in sparse} == {10 * nbytes}
    assert {row["bytes_down"] for row in sparse} == {row["bytes_down"] for row in dense} == {10 * 102 * 4}
    assert 10 * nbytes < 0.1 * dense.rows[0]["bytes_up"]
    assert sparse.last("accuracy") > 0.9
    assert dense.last("accuracy") - sparse.last("accuracy") < 0.05

"""Loops that users have, between real ranks: nothing of them changes but the average behind each step."""

import execution_rank
import pytest
import torch

from distopt.gossip import Gossip

pytestmark = pytest.mark.job


def test_loops_stay_as_they_are(ranks):
    """Accumulation, clipping, schedulers, a scaler that skips on one rank only, a compiled model, Adam."""
    for numbers in ranks(2)(execution_rank.loops, execution_rank.LOOPS, 5):
        assert numbers == dict.fromkeys(execution_rank.LOOPS, (5, 5))


COMPLETE = {"topology": "complete", "correction": "off"}


def test_state_is_kept_or_averaged_as_the_policy_says(ranks):
    cases = [
        (Gossip(**COMPLETE, optimizer_state=state, buffers=buffers).to_dict(), optimizer)
        for state, buffers, optimizer in (
            ("keep", "average", "SGD"),
            ("average", "keep", "SGD"),
            ("keep", "keep", "Adam"),
            ("average", "average", "Adam"),
        )
    ]
    first, second = ranks(2)(execution_rank.policies, cases, 3)
    for (described, _), (same, counted), (_, other) in zip(cases, first, second, strict=True):
        assert same.pop("parameters") < 1e-12
        for name, apart in same.items():
            policy = described["buffers" if name.startswith("running") else "optimizer_state"]
            assert (apart < 1e-12) == (policy == "average"), (described, name)
        assert (counted, other) == (3, 4)  # counters are each rank's own


def test_narrow_dtypes_are_averaged_in_wide_ones(ranks):
    (first, found, views), (second, other, _) = ranks(2)(execution_rank.averaged_in_two_dtypes)
    assert views
    for one, two, average, same in zip(first, second, found, other, strict=True):
        expected = ((one.double() + two.double()) / 2).float().to(one.dtype)
        torch.testing.assert_close(average, expected, rtol=1e-6 if one.dtype == torch.float32 else 0, atol=1e-7)
        assert torch.equal(average, same)
        assert average.stride() == one.stride()


def test_statistics_are_averaged_also_where_exchanges_overlap(ranks):
    cases = [
        (Gossip(**COMPLETE, exchange="overlapped", buffers=buffers).to_dict(), "SGD") for buffers in ("average", "keep")
    ]
    (averaged, _), (kept, _) = ranks(2)(execution_rank.policies, cases, 30)[0]
    for name in ("running_mean", "running_var"):
        assert averaged[name] < 0.5 * kept[name]


def test_a_trace_shows_the_exchange_beside_the_computation(ranks, tmp_path):
    spans, _ = ranks(2)(execution_rank.traced, tmp_path / "trace.json")
    compute, exchange, wait = spans["compute"], spans["distopt::gossip::exchange"], spans["distopt::gossip::wait"]
    assert exchange[0] != compute[0] == wait[0]  # another thread
    assert exchange[1] < compute[1] < compute[2] < exchange[2]
    assert compute[2] < wait[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mixing", ["d-psgd", "push-sum", "a2cid2"])
@pytest.mark.parametrize("exchange", ["synchronous", "overlapped"])
def test_models_on_the_gpu_are_staged_through_the_host(ranks, mixing, exchange):
    topology = "random-matchings" if mixing == "a2cid2" else "ring"
    gossip = Gossip(topology=topology, mixing=mixing, correction="off", exchange=exchange)
    for host, device in ranks(2)(execution_rank.on_the_gpu, gossip.to_dict(), 20):
        torch.testing.assert_close(device, host, rtol=1e-6, atol=1e-8)

"""stats() against numbers worked out by hand, for one bucket with a (10, 20) weight and a bias of 10."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import dgc, momentum_sgd, topk

import distopt

DENSE = 840  # (200 + 10) entries of 4 bytes
HEADER = 12  # three int32


def on_stats(algorithm, steps: int, dtype=torch.float32, **options) -> list[dict]:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(20, 10).to(dtype), **options)
    optimizer = momentum_sgd(model.parameters())
    attachment = algorithm.attach(model, optimizer)
    reports = []
    for step in range(steps):
        if step == 2 and isinstance(algorithm, distopt.DGC) and algorithm.masking is False:
            attachment.pause()
        generator = torch.Generator().manual_seed(dist.get_rank() + 10 * step)
        model(torch.randn(4, 20, generator=generator).to(dtype)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        reports.append(attachment.stats())
    return reports


# sparse: header, 10 of 200 positions and values, then the bias, which is so small that it travels with them
CASES = {
    "fp32 and int32": (dgc(density=0.05), {}, 12 + 10 * 4 + 10 * 4, 10 * 4),
    "fp16 and int32": (topk(density=0.05, values="fp16"), {}, 12 + 10 * 4 + 10 * 2, 10 * 2),
    # one 16-bit count for the only block; the payload is padded to a multiple of 4
    "fp16 and block16": (dgc(density=0.05, values="fp16", indices="block16"), {}, 12 + 2 + 10 * 2 + 10 * 2 + 2, 10 * 2),
    "used flags": (topk(density=0.05), {"find_unused_parameters": True}, 12 + 4 + 10 * 4 + 10 * 4, 10 * 4),
    "bf16 model": (topk(density=0.05), {"dtype": torch.bfloat16}, 12 + 10 * 4 + 10 * 4, 10 * 2),
    "dense wire": (dgc(density=0.05, exchange="dense"), {}, 12, 840),
    "dense wire in bf16": (dgc(density=0.05, exchange="dense", values="bf16"), {}, 12, 420),
    "sent whole": (dgc(density=1.0), {}, 12, 840),
    "plain averaging": (distopt.Dense(), {}, 0, 840),
}


@pytest.mark.parametrize(
    ("num_ranks", "case"), [*((2, case) for case in CASES), (3, "fp32 and int32"), (3, "dense wire")]
)
def test_bytes_by_hand(ranks, num_ranks, case):
    algorithm, options, gathered, reduced = CASES[case]
    for reports in ranks(num_ranks)(on_stats, algorithm, 3, **options):
        for steps, report in enumerate(reports, start=1):
            sparse = gathered > HEADER + 4
            link = (num_ranks - 1) * (gathered + reduced)
            if not sparse:
                link = (num_ranks - 1) * gathered + 2 * (num_ranks - 1) * reduced // num_ranks
            expected = {
                "bytes_sent": gathered + reduced,
                "bytes_dense": DENSE,
                "link_bytes_sent": link,
                "link_bytes_dense": 2 * (num_ranks - 1) * DENSE // num_ranks,
                "entries_sent": 10 if algorithm.name != "dense" and algorithm.density < 1 else 0,
            }
            for key, value in expected.items():
                assert report["last"][key] == value, key
                assert report[key] == steps * value, key
            assert (report["steps"], report["skipped_steps"], report["world_size"]) == (steps, 0, num_ranks)
            assert (report["last"]["buckets_sparse"], report["last"]["buckets_dense"]) == (sparse, not sparse)


def test_auto_chooses_by_the_link_and_stays_sparse_where_that_hardly_matters(ranks):
    """840 bytes: a link on which they take seconds is worth compressing for, and so is one where nothing matters."""
    fast, slow = distopt.ddp.Link(latency_s=1e-6, bandwidth=1e12), distopt.ddp.Link(latency_s=1e-6, bandwidth=100.0)
    for link, density, goes_sparse in ((fast, 0.05, True), (slow, 0.05, True), (slow, 0.9, False)):
        algorithm = distopt.DGC(density=density, link=link)
        for reports in ranks(2)(on_stats, algorithm, 2):
            assert reports[-1]["last"]["buckets_sparse"] == goes_sparse
            (taken,) = reports[-1]["routes"]
            assert taken == ("allgather" if goes_sparse else "whole")
            route = reports[-1]["routes"][taken]
            assert route["buckets"] == 2
            assert route["measured_s"] > 0
            sent = reports[-1]["last"]["link_bytes_sent"]
            if link is slow:
                assert route["predicted_s"] == pytest.approx(sent / 100, rel=0.01)


def test_pausing_sends_what_was_held_back_once(ranks):
    """The first dense step after sparse ones averages v and u of the weight; later ones its gradient."""
    for reports in ranks(2)(on_stats, dgc(density=0.05, masking=False), 5):
        assert [report["last"]["bytes_sent"] for report in reports] == [132, 132, 12 + 1640, 12 + 840, 12 + 840]
        assert [report["paused"] for report in reports] == [False, False, True, True, True]


def test_what_else_stats_says(ranks):
    report = ranks(2)(on_stats, dgc(density=0.05), 1)[0][0]
    assert report["algorithm"] == "dgc"
    assert report["overlap"] is True
    assert report["entries_compressed"] == 200
    assert report["entries_sent_whole"] == 10
    assert report["state_bytes"] == 2 * 200 * 4 + 10 * 4  # u and v of the weight, u of the bias
    assert report["taken_over"] == "momentum 0.9 and weight decay 0 of 2 parameters"
    for key in ("seconds_selecting", "seconds_communicating", "seconds_decoding"):
        assert 0 < report["last"][key] < 60

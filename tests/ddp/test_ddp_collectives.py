"""What really goes out: the number, order and bytes of the collectives, seen where they are launched."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from training import Chosen, chosen_gradients, dgc, momentum_sgd, topk

import distopt
from distopt.ddp.registration import HookSlot
from distopt.ddp.routes import allgather


@contextlib.contextmanager
def recorded():
    """Yields the list of what happens: ("bucket", index) and (collective, bytes of this rank's tensor)."""
    events: list[tuple[str, int]] = []
    originals = HookSlot.__call__, allgather.all_gather, allgather.all_reduce_sum

    def call(slot, bucket):
        events.append(("bucket", bucket.index()))
        return originals[0](slot, bucket)

    def launch(name, original):
        def launched(tensor, group):
            events.append((name, tensor.nbytes))
            return original(tensor, group)

        return launched

    HookSlot.__call__ = call
    allgather.all_gather = launch("all-gather", originals[1])
    allgather.all_reduce_sum = launch("all-reduce", originals[2])
    try:
        yield events
    finally:
        HookSlot.__call__, allgather.all_gather, allgather.all_reduce_sum = originals


def on_steps(algorithm) -> list[tuple[list, int]]:
    model = DistributedDataParallel(Chosen(), bucket_cap_mb=0.0008)
    optimizer = momentum_sgd(model.parameters())
    attachment = algorithm.attach(model, optimizer)
    steps = []
    for step in range(6):
        if step == 3:
            attachment.pause()
        if step == 5:
            attachment.resume()
        with recorded() as events:
            model(chosen_gradients(step, 0, dist.get_rank(), torch.float32)).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append((events, attachment.stats()["last"]["bytes_sent"]))
    return steps


@pytest.mark.parametrize(
    "algorithm",
    [dgc(), dgc(exchange="dense"), dgc(values="fp16", skip=("block3.*",)), topk(indices="block16"), distopt.Dense()],
    ids=["dgc", "dense-wire", "fp16", "topk", "dense"],
)
def test_at_most_two_collectives_per_bucket_in_bucket_order_and_every_byte_counted(ranks, algorithm):
    per_rank = ranks(2)(on_steps, algorithm)
    assert [events for events, _ in per_rank[0]] == [events for events, _ in per_rank[1]]
    for step, (events, counted) in enumerate(per_rank[0]):
        buckets = [number for kind, number in events if kind == "bucket"]
        assert buckets == list(range(len(buckets)))
        assert len(buckets) > 4 or step == 0  # DDP begins with one bucket and rebuilds
        kinds = "".join({"bucket": "|", "all-gather": "g", "all-reduce": "r"}[kind] for kind, _ in events)
        assert set(kinds.strip("|").split("|")) <= {"g", "r", "gr"}
        assert sum(nbytes for kind, nbytes in events if kind != "bucket") == counted

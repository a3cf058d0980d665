"""The process does not end before the callbacks of its collectives have been dropped."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt.ddp.routes import allgather

SCRIPT = """
import atexit, threading, time, weakref
from distopt.comm import await_at_exit

def make():
    def callback(): pass
    return callback

held = [make()]
dropped = weakref.ref(held[0])
atexit.register(lambda: print("gone" if dropped() is None else "still there"))  # runs after what is registered later
await_at_exit(held[0])
threading.Thread(target=lambda: (time.sleep({seconds}), held.clear()), daemon=True).start()
"""


@pytest.mark.parametrize(("seconds", "found"), [(0.3, "gone"), (60, "still there")])
def test_the_end_waits_for_callbacks_but_not_for_ever(warm_python, seconds, found):
    ran = warm_python.run(SCRIPT.format(seconds=seconds), timeout=50)
    assert (ran.stdout.strip(), ran.returncode) == (found, 0), ran.stderr


def on_step() -> tuple[int, float]:
    awaited = []
    original = allgather.await_at_exit
    allgather.await_at_exit = lambda callback: awaited.append(callback.__name__)
    try:
        model = DistributedDataParallel(torch.nn.Linear(8, 8))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        attachment = distopt.TopK(density=0.1).attach(model, optimizer)
        for _ in range(3):
            model(torch.ones(1, 8)).sum().backward()
            optimizer.step()
    finally:
        allgather.await_at_exit = original
    stats = attachment.stats()
    return len(awaited), stats["buckets_sparse"] + stats["buckets_dense"]


def test_every_exchange_is_awaited(ranks):
    ((awaited, buckets),) = ranks(1)(on_step)
    assert awaited == buckets > 0

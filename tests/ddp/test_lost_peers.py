"""A rank that stops, dies or fails, on loopback: the others raise `PeerLostError` at `optimizer.step()`, and end.

Ranks come from the fork server, for the pool's ranks must not be lost; where the end of the process counts, they are
scripts. A cut link needs hosts of its own: tests/launch/test_cut_link.py.
"""

import contextlib
import gc
import itertools
import os
import signal
import threading
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import distopt
from listening import heard
from rank_pool import FORKS

DEADLINE_S = 240


def build(algorithm, **settings):
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(torch.nn.Linear(100, 100) for _ in range(6)))
    model = DistributedDataParallel(net, bucket_cap_mb=0.05)  # many buckets: several collectives wait at once
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, **settings)
    return model, optimizer, algorithm.attach(model, optimizer)


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(1, 100)).square().mean().backward()
    optimizer.step()


def rank_that_trains(rank, size, store, algorithm, ending, pipe):
    """The last rank ends in its fourth step as it is told to; the others send what they get."""
    gc.freeze()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    model, optimizer, attachment = build(algorithm)
    try:
        for i in range(1000):
            if i == 3 and rank == size - 1:
                if ending == "fail":
                    attachment.__exit__(ValueError, ValueError(), None)  # as leaving `with attachment:` by an error
                    os._exit(1)
                os.kill(os.getpid(), getattr(signal, ending))
            step(model, optimizer)
    except distopt.PeerLostError as error:
        before = [p.detach().clone() for p in model.parameters()]
        again = []
        for _ in range(2):  # who goes on all the same is told again, at once
            try:
                step(model, optimizer)
            except distopt.PeerLostError as repeated:
                again.append(str(repeated) == str(error))
        unchanged = all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        stats = attachment.stats()["heartbeat"]
        attachment.detach()  # takes no part in a collective
        pipe.send((str(error), error.ranks, again, unchanged, stats["state"], stats["lost_ranks"]))


LOSSES = {
    "streaming": (2, distopt.DGC(density=0.01, peer_timeout=3.0), "SIGSTOP", "no heartbeat for"),
    "killed": (3, distopt.DGC(density=0.01, peer_timeout=3.0), "SIGKILL", ""),
    "balanced": (3, distopt.TopK(density=0.01, exchange="balanced", peer_timeout=3.0), "SIGSTOP", ""),
    "deferred": (2, distopt.DGC(density=0.01, clip=1.0, nonfinite="skip", peer_timeout=3.0), "SIGSTOP",
                 "no heartbeat for"),
    "dense": (2, distopt.Dense(peer_timeout=3.0), "SIGSTOP", "no heartbeat for"),
    "failed": (2, distopt.DGC(density=0.01, peer_timeout=3600.0), "fail", "it has ended with an error"),
}  # fmt: skip


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Pipes of the ranks that are left, by loss; all losses wait for their timeouts at the same time."""
    folder = tmp_path_factory.mktemp("stores")
    pipes, processes = {}, []
    for name, (size, algorithm, ending, _) in LOSSES.items():
        made = [FORKS.Pipe() for _ in range(size)]
        for rank, (_, theirs) in enumerate(made):
            one = (rank, size, str(folder / name), algorithm, ending, theirs)
            processes.append(FORKS.Process(target=rank_that_trains, args=one))
            processes[-1].start()
        pipes[name] = [ours for ours, _ in made[:-1]]
    yield pipes
    for process in processes:
        process.kill()
        process.join()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_others_are_told_and_can_go_no_further(told, loss):
    size, _, _, reason = LOSSES[loss]
    lost = size - 1
    for pipe in told[loss]:
        assert pipe.poll(DEADLINE_S), "a rank has not noticed"
        message, ranks, again, unchanged, state, in_stats = pipe.recv()
        assert message.startswith(f"lost rank {lost} (")
        assert reason in message
        assert (ranks, in_stats, state) == ((lost,), [lost], "lost")
        assert again == [True, True]
        assert unchanged


# -- the end of the process ----------------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys, torch, torch.distributed as dist
from test_lost_peers import build, distopt, step
torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
model, optimizer, attachment = build(distopt.DGC(density=0.01, peer_timeout=3.0))
for _ in range(3):  # in its second DDP has a collective of its own
    step(model, optimizer)
if rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
{rest}
"""
TRAIN = "while True: step(model, optimizer)"
CAUGHT = """
try:
    while True: step(model, optimizer)
except distopt.PeerLostError:
    dist.destroy_process_group()
    sys.exit(17)
"""
BARRIER = "dist.barrier()"


ENDINGS = {
    "raised": (TRAIN, 1, "distopt.errors.PeerLostError: lost rank 1 ("),
    "caught": (CAUGHT, 17, ""),
    "stuck": (BARRIER, 1, "where no exception can reach it: this process ends here"),
}


@pytest.fixture(scope="module")
def deserted(warm_python, tmp_path_factory):
    """Rank 0 of each ending; all wait for their timeouts at the same time."""
    folder = tmp_path_factory.mktemp("stores")
    scripts = {
        name: [warm_python.start(SCRIPT.format(rest=rest), rank, folder / name) for rank in range(2)]
        for name, (rest, *_) in ENDINGS.items()
    }
    yield {name: first for name, (first, _) in scripts.items()}
    for script in itertools.chain(*scripts.values()):
        script.kill()
        script.wait()


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.job
def test_the_process_ends_although_its_collectives_never_do(deserted, ending):
    _, status, said = ENDINGS[ending]
    _, errors = deserted[ending].communicate(DEADLINE_S)
    assert deserted[ending].returncode == status, errors
    assert said in errors
    assert ending == "caught" or "lost rank 1 (" in errors


# -- what is watched and for how long ------------------------------------------------------------------------------


def heartbeat_threads():
    return [thread for thread in threading.enumerate() if thread.name == "distopt heartbeat"]


def on_life_cycle():
    """Number of threads while attached, after detach, after a `with` and after all references are gone."""
    gc.collect()
    gc.freeze()  # what earlier tests have left is not looked through again
    before = len(heartbeat_threads())
    counts = []
    model, optimizer, attachment = build(distopt.DGC(density=0.1))
    state = attachment.stats()["heartbeat"]["state"]
    counts.append(len(heartbeat_threads()) - before)
    attachment.detach()
    counts.append(len(heartbeat_threads()) - before)
    with distopt.TopK(density=0.1).attach(model, optimizer):
        counts.append(len(heartbeat_threads()) - before)
        step(model, optimizer)
    counts.append(len(heartbeat_threads()) - before)
    attachment = distopt.TopK(density=0.1).attach(model, optimizer)
    gone = weakref.ref(attachment)
    counts.append(len(heartbeat_threads()) - before)
    del model, optimizer, attachment
    end = time.monotonic() + 10
    while (gone() is not None or len(heartbeat_threads()) > before) and time.monotonic() < end:
        gc.collect()  # again: a thread that was about to end may have held what held it
        time.sleep(0.01)
    counts.append(len(heartbeat_threads()) - before)
    gc.unfreeze()
    dist.barrier()
    return state, counts, gone() is None


def test_the_heartbeat_lives_as_long_as_the_attachment(ranks):
    for answer in ranks(2)(on_life_cycle):
        assert answer == ("on", [1, 0, 1, 0, 1, 0], True)


def on_attaching(algorithm):
    with heard() as said, contextlib.closing(Detaching(algorithm)) as held:
        stats = held.attachment.stats()["heartbeat"]
    return stats, [message for _, message in said if "lost peers" in message]


class Detaching:
    def __init__(self, algorithm):
        *_, self.attachment = build(algorithm)

    def close(self):
        self.attachment.detach()


@pytest.mark.parametrize(
    ("size", "algorithm", "reason"),
    [(2, distopt.DGC(peer_timeout=0), "peer_timeout is 0"), (1, distopt.DGC(), "there are no other ranks")],
    ids=["off", "alone"],
)
def test_who_is_not_watched_is_not_and_stats_say_why(ranks, size, algorithm, reason):
    for stats, said in ranks(size)(on_attaching, algorithm):
        assert stats == {"state": "off", "reason": reason}
        assert said == []  # that was asked for


def on_a_firewall():
    from distopt.comm import rollcall

    original, rollcall.own_address = rollcall.own_address, lambda towards: "127.0.0.1"
    rollcall._REACH_S, sendto = 0.5, rollcall.Heartbeat._send
    rollcall.Heartbeat._send = lambda self, to: None
    try:
        return on_attaching(distopt.DGC())
    finally:
        rollcall.own_address, rollcall._REACH_S, rollcall.Heartbeat._send = original, 10.0, sendto


def test_where_datagrams_do_not_get_through_this_is_said_once(ranks):
    first, second = ranks(2)(on_a_firewall)
    assert first[0] == second[0]
    assert first[0]["state"] == "off"
    assert "gets no datagrams from" in first[0]["reason"]
    assert len(first[1]) == 1
    assert first[1][0].startswith("lost peers will not be noticed, a collective waits for them: ")
    assert second[1] == []

"""The transport over a real mpirun. A start costs seconds, so the ranks of one start check many things, and the starts
of a test run side by side."""

import textwrap

import pytest

from mpirun import finish, needs_mpi, start

HEAD = """
import os, signal, sys, threading, time
import torch
from distopt.comm.mpi import MPITransport
from distopt.errors import ConfigError

MIB = 1 << 20

def frame(value, num_bytes=1):
    return torch.full((num_bytes,), value, dtype=torch.uint8)

def receive():
    arrived = transport.receive(30)
    assert arrived is not None, "nothing has arrived"
    return arrived

def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.01)

def threads():
    return [thread.name for thread in threading.enumerate() if thread.name == "distopt-mpi"]
"""

TOGETHER = """
transport = MPITransport(max_frame_bytes=100 * MIB)
rank = transport.rank
assert transport.size == 3

# Order per source, any source, oneself included; small frames and frames that MPI does not buffer in one stream.
lengths = [3 * MIB if i % 10 == 0 else 1000 * i for i in range(1, 41)]
for i, length in enumerate(lengths, start=1):
    for destination in range(3):
        transport.send(destination, frame(i, length))
arrived = {0: [], 1: [], 2: []}
while sum(map(len, arrived.values())) < 3 * len(lengths):
    source, got = receive()
    value = int(got[0])
    assert got.dtype == torch.uint8 and got.numel() == lengths[value - 1] and bool((got == value).all())
    arrived[source].append(value)
assert all(values == list(range(1, 41)) for values in arrived.values()), arrived
assert transport.receive(0.0) is None and transport.receive(0.05) is None

# What cannot be sent is refused in the call, and probes are never delivered.
two_dimensional = torch.zeros(2, 2, dtype=torch.uint8)
for wrong in (frame(1, 100 * MIB + 1), frame(1, 0), torch.zeros(4), two_dimensional, frame(1, 8)[::2]):
    try:
        transport.send(0, wrong)
    except ConfigError:
        continue
    raise SystemExit(f"not refused: {wrong.dtype} {wrong.shape}")
transport.probe((rank + 1) % 3)

# A large frame does not hold up those of others.
if rank == 1:
    transport.send(0, torch.arange(100 * MIB // 8).view(torch.uint8))
elif rank == 2:
    transport.send(0, torch.tensor([os.getpid()]).view(torch.uint8))
else:
    by_source = dict(receive() for _ in range(2))
    assert bool((by_source[1].view(torch.int64) == torch.arange(100 * MIB // 8)).all())
    process = int(by_source[2].view(torch.int64))

# A frozen rank takes nothing, and the others go on; then it takes all of it.
if rank == 2:
    assert receive()[1].numel() == 5 * MIB and receive()[1].tolist() == [9]
    transport.send(0, frame(10))
elif rank == 0:
    wait_until(lambda: not transport.pending_bytes(1) and not transport.pending_bytes(2))
    os.kill(process, signal.SIGSTOP)
    transport.send(2, frame(8, 5 * MIB))
    transport.send(2, frame(9))
    for i in range(100):
        transport.send(1, frame(i, 20000))
        source, got = receive()
        assert source == 1 and int(got[0]) == i
    transport.probe(2)
    assert transport.pending_bytes(2) == 5 * MIB + 1
    wait_until(lambda: not transport.pending_bytes(1))
    assert transport.lost == frozenset()
    os.kill(process, signal.SIGCONT)
    assert receive()[1].tolist() == [10]
    wait_until(lambda: not transport.pending_bytes(2))
    transport.send(1, frame(11))
else:
    for i in range(100):
        transport.send(*receive())
    assert receive()[1].tolist() == [11]

# Frames that nobody asks for any more keep nobody from ending, and nothing of the transport is left.
if rank:
    transport.send(0, frame(1, 2 * MIB))
begun = time.monotonic()
transport.close(20)
transport.close(20)
assert time.monotonic() - begun < 10, "the ends did not notice that they are closed"
assert transport.receive(None) is None and not threads()
print(f"rank {rank} is done", flush=True)
"""

KILLED = """
rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
transport = MPITransport(max_frame_bytes=20 * MIB, peers=None if rank == 0 else [0])
if rank == 2:
    transport.send(0, frame(2))
    receive()
    transport.send(0, frame(3, 20 * MIB))
    os.kill(os.getpid(), signal.SIGKILL)
if rank == 1:
    while (arrived := receive()[1]).numel() > 1:
        transport.send(0, arrived)
else:
    assert receive()[1].tolist() == [2]
    assert transport.lost == frozenset()
    transport.send(2, frame(1))
    def is_lost():
        transport.probe(2)
        return transport.lost == {2}
    wait_until(is_lost)
    transport.send(2, frame(1, 10 * MIB))
    assert transport.pending_bytes(2) == 0
    for i in range(50):
        transport.send(1, frame(i, 20000))
        source, got = receive()
        if source == 2:  # it was on its way: whole or not at all
            assert got.numel() == 20 * MIB and bool((got == 3).all())
            source, got = receive()
        assert source == 1 and int(got[0]) == i
    transport.send(1, frame(0))
    transport.close(20)
print(f"rank {rank} lost {sorted(transport.lost)}", flush=True)  # rank 1 leaves the closing to the end of the script
"""


@pytest.fixture
def launch(tmp_path):
    """`launch(size, script, *options)` starts ranks; what a failed test leaves is ended."""
    jobs = []

    def begin(size, script, *options):
        path = tmp_path / f"ranks{len(jobs)}.py"
        path.write_text(HEAD + script)
        jobs.append(start(size, path, *options))
        return jobs[-1]

    yield begin
    for job in jobs:
        if job.poll() is None:
            job.terminate()
            job.wait(20)


@needs_mpi
def test_frames_arrive_whole_in_order_and_past_a_frozen_rank(launch):
    job = launch(3, TOGETHER, "--with-ft", "ulfm")  # which must not take a frozen rank for a dead one
    said = finish(job)
    assert job.returncode == 0, said
    assert sorted(line for line in said.splitlines() if line.startswith("rank")) == [
        f"rank {rank} is done" for rank in range(3)
    ]


def survivors(said):
    return sorted(line for line in said.splitlines() if line.startswith("rank"))


@needs_mpi
def test_a_killed_rank_is_noticed_and_the_others_end_well(launch):
    tolerant = launch(3, KILLED, "--with-ft", "ulfm")
    recovering = launch(3, KILLED, "--enable-recovery", "--mca", "btl", "self,sm")
    for job, finalized in [(tolerant, True), (recovering, False)]:
        said = finish(job)
        assert job.returncode == 0, said
        assert survivors(said) == ["rank 0 lost [2]", "rank 1 lost []"], said
        assert ("MPI is not finalized" not in said) == finalized, said


@needs_mpi
@pytest.mark.slow
def test_a_killed_rank_is_noticed_over_tcp(launch):
    job = launch(3, KILLED, "--with-ft", "ulfm", "--mca", "btl", "self,tcp")
    said = finish(job)
    assert job.returncode == 0, said
    assert survivors(said) == ["rank 0 lost [2]", "rank 1 lost []"], said


def refusal(warm_python, code):
    """What a script on one rank of its own, without mpirun, is told."""
    script = f"""
        import distopt.errors
        from distopt.comm.mpi import MPITransport
        {code}
        try:
            MPITransport(max_frame_bytes=1000)
        except distopt.errors.CompatibilityError as error:
            print(error)
    """
    ran = warm_python.run(textwrap.dedent(script))
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_without_mpi_the_remedy_is_named(warm_python):
    told = refusal(warm_python, "import sys; sys.modules['mpi4py'] = None")
    assert "pip install 'torch-distopt[mpi]'" in told


@needs_mpi
def test_mpi_without_threads_is_refused(warm_python):
    told = refusal(warm_python, "import mpi4py; mpi4py.rc.thread_level = 'serialized'")
    assert "MPI_THREAD_MULTIPLE" in told

"""The transport over a real mpirun. A start costs seconds, so the ranks of one start check many things, and the starts
of a test run side by side."""

import textwrap

import pytest

from mpirun import finish, needs_mpi, start

HEAD = """
import os, signal, sys, threading, time, traceback
import torch
from distopt.comm.mpi import MPITransport
from distopt.errors import ConfigError

MIB = 1 << 20

def fail(*raised):
    traceback.print_exception(*raised)
    transport._mpi.COMM_WORLD.Abort(1)  # the others might wait for this rank

sys.excepthook = fail

def frame(value, num_bytes=1):
    return torch.full((num_bytes,), value, dtype=torch.uint8)

def receive():
    arrived = transport.receive(30)
    assert arrived is not None, "nothing has arrived"
    return arrived

def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, f"did not happen; lost: {transport.lost}"
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
transport._mpi.COMM_WORLD.Barrier()  # a script may use MPI itself

# What cannot be sent is refused in the call, and probes are never delivered.
two_dimensional = torch.zeros(2, 2, dtype=torch.uint8)
for wrong in (frame(1, 100 * MIB + 1), frame(1, 0), torch.zeros(4), two_dimensional, frame(1, 8)[::2]):
    try:
        transport.send(0, wrong)
    except ConfigError:
        continue
    raise SystemExit(f"not refused: {wrong.dtype} {wrong.shape}")
transport.probe(2)
if rank == 2:  # nobody has anything else for this rank until it has told its process
    assert transport.receive(0.0) is None and transport.receive(0.1) is None

# A large frame does not hold up those of others, and those behind it do not overtake it.
if rank == 1:
    transport.send(0, torch.arange(100 * MIB // 8).view(torch.uint8))
    transport.send(0, frame(7))
elif rank == 2:
    transport.send(0, torch.tensor([os.getpid()]).view(torch.uint8))
else:
    by_source = {1: [], 2: []}
    for _ in range(3):
        source, got = receive()
        by_source[source].append(got)
    large, small = by_source[1]
    assert bool((large.view(torch.int64) == torch.arange(100 * MIB // 8)).all()) and small.tolist() == [7]
    process = int(by_source[2][0].view(torch.int64))

# A frozen rank takes nothing, and the others go on; then it takes all of it.
if rank == 2:
    assert receive()[1].tolist() == [8] and receive()[1].numel() == 5 * MIB
    transport.send(0, frame(10))
elif rank == 0:
    wait_until(lambda: not transport.pending_bytes(1) and not transport.pending_bytes(2))
    os.kill(process, signal.SIGSTOP)
    transport.send(2, frame(8))  # MPI itself would buffer this one and call it sent
    transport.send(2, frame(9, 5 * MIB))
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
else:
    wait_until(lambda: transport._inbox.qsize() == 2)
begun = time.monotonic()
transport.close(20)
transport.close(20)
assert time.monotonic() - begun < 10, "the ends did not notice that they are closed"
assert transport.receive(None) is None and not threads()
print(f"rank {rank} is done", flush=True)
"""

DYING = """
# Rank 2 is killed while frames from and to it are on their way; rank 3, where there is one, ends with an error and no
# word to MPI.
rank, size = (int(os.environ[f"OMPI_COMM_WORLD_{name}"]) for name in ("RANK", "SIZE"))
victims = list(range(2, size))
transport = MPITransport(max_frame_bytes=20 * MIB, peers=None if rank == 0 else [0])
if rank in victims:
    transport.send(0, torch.tensor([os.getpid()]).view(torch.uint8))
    if rank == 2:
        transport.send(0, frame(2, 20 * MIB))
    receive()
    os._exit(3)
if rank == 1:
    while (arrived := receive()[1]).numel() > 1:
        transport.send(0, arrived)
else:
    processes = {}
    while len(processes) < len(victims):
        source, got = receive()
        if got.numel() == 8:
            processes[source] = int(got.view(torch.int64))
    assert transport.lost == frozenset()
    os.kill(processes[2], signal.SIGSTOP)
    transport.send(2, frame(1, 10 * MIB))
    time.sleep(0.2)
    assert transport.pending_bytes(2) == 10 * MIB
    os.kill(processes[2], signal.SIGKILL)
    if 3 in victims:
        transport.send(3, frame(1))
    def are_lost():
        for victim in victims:
            transport.probe(victim)
        return transport.lost == set(victims)
    wait_until(are_lost)
    for victim in victims:
        transport.send(victim, frame(1, MIB))
        assert transport.pending_bytes(victim) == 0
    for i in range(50):
        transport.send(1, frame(i, 20000))
        source, got = receive()
        if source == 2:  # it was on its way: whole or not at all
            assert got.numel() == 20 * MIB and bool((got == 2).all())
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
@pytest.mark.parametrize("carrier", ["tcp", pytest.param("sm", marks=pytest.mark.slow)])
@pytest.mark.job
def test_frames_arrive_whole_in_order_and_past_a_frozen_rank(launch, carrier):
    # Fault tolerance must not take a frozen rank for a dead one.
    job = launch(3, TOGETHER, "--with-ft", "ulfm", "--mca", "btl", f"self,{carrier}")
    said = finish(job)
    assert job.returncode == 0, said
    assert sorted(line for line in said.splitlines() if line.startswith("rank")) == [
        f"rank {rank} is done" for rank in range(3)
    ]


def survivors(job, status=0):
    """What they printed. That the job ends at all is the point: `MPI_Finalize` would wait for the dead."""
    said = finish(job)
    assert job.returncode == status, said
    return sorted(line for line in said.splitlines() if line.startswith("rank"))


@needs_mpi
@pytest.mark.job
def test_dead_ranks_are_noticed_and_the_others_end_well(launch):
    tolerant = launch(4, DYING, "--with-ft", "ulfm")  # which tells of rank 2 only: rank 3 ends with an error
    recovering = launch(3, DYING, "--enable-recovery", "--mca", "btl", "self,sm")
    assert survivors(tolerant, status=3) == ["rank 0 lost [2, 3]", "rank 1 lost []"]
    assert survivors(recovering) == ["rank 0 lost [2]", "rank 1 lost []"]


@needs_mpi
@pytest.mark.slow
def test_dead_ranks_are_noticed_over_tcp(launch):
    job = launch(3, DYING, "--with-ft", "ulfm", "--mca", "btl", "self,tcp")
    assert survivors(job) == ["rank 0 lost [2]", "rank 1 lost []"]


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

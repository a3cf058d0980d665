"""The example under every real launcher: the same accuracy and the same model to the last bit."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mpirun
import netns
from example_ranks import AS_IT_IS, EXAMPLES, free_port

pytestmark = pytest.mark.job

EXAMPLE = EXAMPLES / "federated_torchrun.py"
ROUNDS, DEADLINE_S = 20, 240
ARGUMENTS = ["--rounds", str(ROUNDS), "--data", "digits"]
ELSEWHERE = """
import socket, time
while True:
    try:
        socket.create_connection(("10.88.0.1", 7000), 5).close()
        break
    except ConnectionRefusedError:
        time.sleep(0.05)
print("listens")
try:
    socket.create_connection(("127.0.0.1", 7000), 5)
except OSError as error:
    print(type(error).__name__)
"""
SECRET = "a secret of the tests, long enough"


@pytest.fixture(scope="module")
def simulated(warm_python):
    """What the example says in one process."""
    ran = warm_python.run(AS_IT_IS, EXAMPLE, *ARGUMENTS, OMP_NUM_THREADS="1")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return result(ran.stdout)


def result(output):
    found = re.findall(r"test accuracy ([0-9.]+)% after (\d+) rounds, model ([0-9a-f]{16})", output)
    assert len(found) == 1, output
    return found[0]


def environment(**changed):
    with_python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": with_python, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent), **changed}


def test_by_tcp_it_is_the_simulation_to_the_last_digit(warm_python, simulated):
    start = functools.partial(warm_python.start, AS_IT_IS, EXAMPLE, *ARGUMENTS, OMP_NUM_THREADS="1")
    address = f"127.0.0.1:{free_port()}"
    joining = [["--server", address, "--rank", rank] for rank in (1, 2)]
    given = [["--listen", address], *joining]
    ranks = [start(*each, "--sites", 2, DISTOPT_JOB_SECRET=SECRET) for each in given]
    try:
        outputs = [one.communicate(DEADLINE_S) for one in ranks]
    finally:
        for one in ranks:
            one.kill()
            one.wait()
    assert [one.returncode for one in ranks] == [0, 0, 0], outputs
    assert result(outputs[0][0]) == simulated
    assert float(simulated[0]) > 30
    assert "Attendance(hosts=(0, 2, 4," in outputs[1][0]


def test_torchrun(simulated):
    ran = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", EXAMPLE, *ARGUMENTS],
        env=environment(), capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert result(ran.stdout) == simulated


@mpirun.needs_mpi
def test_mpirun(simulated):
    job = mpirun.start(3, EXAMPLE, arguments=ARGUMENTS)
    said = mpirun.finish(job, DEADLINE_S)
    assert job.returncode == 0, said
    assert result(said) == simulated


@netns.needs_namespaces
def test_hosts_with_addresses_of_their_own(simulated):
    ran = netns.cluster(
        "once", "3", "1gbit", "--deadline", "150", "--", EXAMPLE, *ARGUMENTS,
        name=f"{netns.NAME}f", deadline_s=240, env=environment(DISTOPT_JOB_SECRET=SECRET, **netns.REAL),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert result(ran.stdout) == simulated


@netns.needs_namespaces
def test_by_tcp_between_hosts(simulated):
    """The server is heard on the interface that it was given, and on no other."""
    name = f"{netns.NAME}g"
    made = netns.cluster("up", 3, "1gbit", name=name)
    assert made.returncode == 0, made.stderr
    processes = []

    def start(host, *arguments):
        command = ["ip", "netns", "exec", f"distopt-{name}-{host}", sys.executable, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, env=environment(DISTOPT_JOB_SECRET=SECRET), **pipes)
        processes.append(process)
        return process

    try:
        address = "10.88.0.1:7000"
        server = start(1, EXAMPLE, *ARGUMENTS, "--listen", address, "--sites", "2")
        sites = [start(r + 1, EXAMPLE, *ARGUMENTS, "--server", address, "--sites", "2", "--rank", r) for r in (1, 2)]
        elsewhere = start(1, "-c", ELSEWHERE).communicate(timeout=DEADLINE_S)[0]
        assert elsewhere == "listens\nConnectionRefusedError\n"
        outputs = [process.communicate(timeout=DEADLINE_S)[0] for process in (server, *sites)]
        assert [process.returncode for process in (server, *sites)] == [0, 0, 0], outputs
        assert result(outputs[0]) == simulated
    finally:
        for process in processes:
            process.kill()
            process.wait()
        netns.cluster("down", name=name)

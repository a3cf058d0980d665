"""`distopt doctor` on real ranks: sound ones, some that never come, cut and slow links between hosts of their own."""

import json
import os
import subprocess
import sys

import pytest

import mpirun
from example_ranks import free_port
from mpirun import needs_mpi
from netns import NAME, REAL, SCRIPT, cluster, needs_namespaces

CODE = "from distopt.cli import main; main()"
DEADLINE_S = 240


def found_by(ranks):
    """Exit codes, and what rank 0 says as JSON."""
    try:
        outputs = [rank.communicate(timeout=DEADLINE_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    codes = [rank.returncode for rank in ranks]
    said = outputs[0][0].strip()
    return codes, json.loads(said) if said else None, [errors for _, errors in outputs]


# A process that is stopped when it should measure: its host still takes connections.
STOPS = "import os, signal; from distopt.cli.doctor import examination; "
STOPS += "examination.measurers = lambda facts: os.kill(os.getpid(), signal.SIGSTOP); "


def start(warm_python, rank, size, port, deadline=200, code=CODE):
    place = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    arguments = ["doctor", "--json", "--deadline", deadline]
    return warm_python.start(code, *arguments, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", **place)


def severe(found):
    return [each for each in found["findings"] if each["severity"] != "advice"]


def test_two_sound_ranks(warm_python):
    port = free_port()
    codes, found, errors = found_by([start(warm_python, rank, 2, port) for rank in range(2)])
    assert codes == [0, 0], errors
    assert severe(found) == []
    assert sorted(found["ranks"]) == ["0", "1"]
    there, back = found["pairs"]
    assert (there["from"], there["to"], back["from"], back["to"]) == (0, 1, 1, 0)
    assert there["send_bandwidth"] > 1e6
    assert abs(there["clock_offset_s"]) <= there["clock_uncertainty_s"] + 1e-3  # of one clock
    assert "token" not in json.dumps(found)


@pytest.mark.job
def test_there_is_an_answer_whoever_does_not_come_or_stops(warm_python):
    port, stopped, other = free_port(), free_port(), free_port()
    alone = start(warm_python, 1, 2, free_port(), deadline=5)
    first_stops = [start(warm_python, rank, 2, stopped, 24, [STOPS, ""][rank] + CODE) for rank in (0, 1)]
    second_stops = [start(warm_python, rank, 2, other, 24, ["", STOPS][rank] + CODE) for rank in (0, 1)]
    codes, found, errors = found_by([start(warm_python, rank, 4, port, deadline=24) for rank in (0, 2)])
    assert codes == [2, 2], errors
    assert found["missing"] == [1, 3]
    assert [each["said"] for each in severe(found)] == ["rank 1, 3 of 4 did not come"]
    codes, _, (error,) = found_by([alone])
    assert codes == [2]
    assert "cannot meet the others at 127.0.0.1:" in error
    assert "nothing listens there: rank 0 has not started" in error
    try:
        codes, found, _ = found_by(second_stops[:1])
        assert codes == [2]
        assert found["silent"] == [1]
        codes, _, (error,) = found_by(first_stops[1:])
        assert codes == [2]
        assert "rank 0" in error
    finally:
        for rank in (first_stops[0], second_stops[1]):
            rank.kill()
            rank.wait()


@pytest.mark.job
def test_under_torchrun():
    environment = {**os.environ, **REAL, "RANKS": "2", "OMP_NUM_THREADS": "1"}
    starter = SCRIPT.with_name("torchrun_local.sh")
    ran = subprocess.run(
        ["bash", starter, "-m", "distopt.cli", "doctor", "--deadline", "200"],
        env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("Links") == 1  # one rank speaks
    assert "rank 0 (" in ran.stdout


@needs_mpi
@pytest.mark.job
def test_under_mpirun(tmp_path):
    (tmp_path / "doctor.py").write_text(CODE)
    job = mpirun.start(2, tmp_path / "doctor.py", arguments=["doctor", "--json", "--deadline", 200])
    output = mpirun.finish(job)
    assert job.returncode == 0, output
    found = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    assert [pair["error"] for pair in found["pairs"]] == [None, None]


# One process per host: host 2 has another torch, the clock of host 3 is ahead.
ODD = """
import functools, os, time
from distopt.cli import main
from distopt.cli.doctor import examination
if os.environ["RANK"] == "1":
    import torch
    torch.__version__ = "1.0.0"
if os.environ["RANK"] == "2":
    examination.ProbeServer = functools.partial(examination.ProbeServer, now=lambda: time.time() + 90)
main()
"""


@needs_namespaces
@pytest.mark.job
def test_hosts_with_a_cut_a_slow_link_another_version_and_another_time():
    assert cluster("up", 3, "200mbit").returncode == 0
    try:
        for host in (2, 3):  # they get no frames from each other, and both reach host 1
            isolate = f"ip -n distopt-{NAME}-switch link set port{host} type bridge_slave isolated on"
            subprocess.run(isolate.split(), check=True)
        slow = f"tc -n distopt-{NAME}-3 qdisc replace dev eth0 root tbf rate 20mbit burst 128kb latency 100ms"
        subprocess.run(slow.split(), check=True)
        codes, found, errors = found_by([_on_host(rank) for rank in range(3)])
    finally:
        cluster("down")
    assert codes == [1, 1, 1], errors
    text = [each["said"] for each in found["findings"]]
    for expected in (
        "rank 1 (host2) cannot reach rank 2 (host3) at 10.88.0.3: ",
        "rank 2 (host3) cannot reach rank 1 (host2) at 10.88.0.2: ",
        "torch differs: ",
        "rank 2 (host3) sends to rank 0 (host1) ",
        "the clock of rank 2 (host3) is 90.0 s ahead of that of rank 0 (host1)",
    ):
        assert [each for each in text if each.startswith(expected)], text
    assert not [each for each in text if "cut off" in each]  # both reach host 1
    measured = {(pair["from"], pair["to"]): pair for pair in found["pairs"] if "latency_s" in pair}
    assert measured.keys() == {(0, 1), (0, 2)}
    assert 100e6 / 8 < measured[0, 1]["send_bandwidth"] < 300e6 / 8
    assert 10e6 / 8 < measured[0, 2]["receive_bandwidth"] < 30e6 / 8


def _on_host(rank):
    place = {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "10.88.0.1", "MASTER_PORT": "29500"}
    named = ["unshare", "--uts", "bash", "-c", 'hostname "$0" && exec "$@"', f"host{rank + 1}"]
    return subprocess.Popen(
        ["ip", "netns", "exec", f"distopt-{NAME}-{rank + 1}", *named, sys.executable, "-c", ODD, "doctor", "--json",
         "--deadline", "200"],
        env={**os.environ, **REAL, **place, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

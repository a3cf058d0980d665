import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from example_ranks import free_port
from mpirun import needs_mpi

LAUNCH = Path(__file__).parents[2] / "launch"
PROBE = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(())
dist.all_reduce(total)
print(f"rank {dist.get_rank()} of {dist.get_world_size()}, sum {total.item():g}", flush=True)
dist.destroy_process_group()
"""


# Ranks without torch, which takes them seconds to import: rank VICTIM dies, or ends with an error of its own.
VICTIM = """
import os, signal, sys, time
rank, victim, end = os.environ["RANK"], sys.argv[1], sys.argv[2]
if rank == victim:
    if end == "error":
        sys.exit(3)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(1)
print(f"rank {rank} went on", flush=True)
"""
MPI_VICTIM = """
import os, signal, sys, time
import mpi4py
mpi4py.rc.finalize = False  # which may wait for the dead rank for ever, see distopt.comm.mpi_runtime
from mpi4py import MPI
rank = MPI.COMM_WORLD.Get_rank()
MPI.COMM_WORLD.Barrier()
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(1)
print(f"rank {rank} went on", flush=True)
"""


def start(starter, script, *arguments, **settings):
    with_python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": with_python, **settings}
    return subprocess.Popen(
        ["bash", str(LAUNCH / starter), str(script), *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("starter", "settings"),
    [
        ("torchrun_multinode.sh", [{"NODES": "2", "NODE_RANK": "0"}, {"NODES": "2", "NODE_RANK": "1"}]),
        ("elastic.sh", [{"MIN_NODES": "2", "MAX_NODES": "2"}] * 2),
        ("torchrun_local.sh", [{"RANKS": "2"}]),
        pytest.param("mpirun.sh", [{"RANKS": "2"}], marks=needs_mpi),
    ],
)
@pytest.mark.job
def test_the_ranks_that_are_started_form_one_group(tmp_path, starter, settings):
    (tmp_path / "probe.py").write_text(PROBE)
    port = free_port()
    hosts = [start(starter, tmp_path / "probe.py", MASTER="127.0.0.1", PORT=port, **one) for one in settings]
    try:
        outputs = [host.communicate(timeout=90)[0] for host in hosts]
    finally:
        for host in hosts:
            host.terminate()
    assert [host.returncode for host in hosts] == [0] * len(hosts), "\n".join(outputs)
    said = re.findall(r"rank . of 2, sum 2", "".join(outputs))  # two ranks may share a line
    assert sorted(said) == ["rank 0 of 2, sum 2", "rank 1 of 2, sum 2"]


@pytest.mark.parametrize(
    ("starter", "missing"),
    [
        ("torchrun_multinode.sh", "NODES"),
        ("torchrun_local.sh", "RANKS"),
        ("elastic.sh", "MASTER"),
        ("slurm.sbatch", "SLURM_JOB_NODELIST"),
        ("torchrun_survivors.sh", "RANKS"),
        ("mpirun.sh", "RANKS"),
    ],
)
def test_a_missing_setting_is_named(starter, missing):
    ran = start(starter, "script.py")
    output, _ = ran.communicate(timeout=20)
    assert ran.returncode != 0
    assert missing in output


def finish(jobs, timeout=60):
    """What each job printed; all are ended then."""
    try:
        return [job.communicate(timeout=timeout)[0] for job in jobs]
    finally:
        for job in jobs:
            if job.poll() is None:
                job.terminate()
                job.wait(20)


def went_on(output):
    return sorted(line for line in output.splitlines() if line.endswith("went on"))


@pytest.mark.job
def test_ranks_under_torchrun_outlive_a_killed_one(tmp_path):
    """Two hosts with two ranks each: neither the other rank of the host nor, at the end, the other agent is stopped."""
    (tmp_path / "ranks.py").write_text(VICTIM)
    settings = {"NODES": "2", "MASTER": "127.0.0.1", "PORT": free_port(), "RANKS": "2"}
    hosts = [
        start("torchrun_survivors.sh", tmp_path / "ranks.py", "1", "kill", NODE_RANK=str(number), **settings)
        for number in range(2)
    ]
    outputs = finish(hosts)
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(outputs)
    assert [went_on(output) for output in outputs] == [["rank 0 went on"], ["rank 2 went on", "rank 3 went on"]]
    assert "rank 1 was ended by signal 9 (KILL); the others go on" in outputs[0]


@pytest.mark.parametrize(
    ("victim", "end", "settings", "status"),
    [
        ("1", "kill", {}, 0),
        ("1", "error", {}, 3),  # as under any torchrun
        ("0", "kill", {}, 128 + signal.SIGKILL),  # the master
        ("0", "kill", {"ESSENTIAL": ""}, 0),
        ("2", "kill", {"ESSENTIAL": "1 2"}, 128 + signal.SIGKILL),
    ],
)
def test_what_the_agent_sees_of_a_rank(tmp_path, victim, end, settings, status):
    (tmp_path / "ranks.py").write_text(VICTIM)
    below = [sys.executable, str(tmp_path / "ranks.py"), victim, end]
    rank = start("torchrun_survivors.sh", "--rank", *below, RANK=victim, **settings)
    (output,) = finish([rank])
    assert rank.returncode == status, output


def test_an_agent_that_stops_its_ranks_reaches_them(tmp_path):
    (tmp_path / "ranks.py").write_text("import time; print('up', flush=True); time.sleep(60)")
    rank = start("torchrun_survivors.sh", "--rank", sys.executable, str(tmp_path / "ranks.py"), RANK="1")
    assert rank.stdout.readline() == "up\n"
    rank.terminate()
    finish([rank], timeout=20)  # its output ends when the rank itself has ended
    assert rank.returncode == 128 + signal.SIGTERM


@needs_mpi
@pytest.mark.job
def test_ranks_under_mpirun_outlive_a_killed_one_unless_told_otherwise(tmp_path):
    (tmp_path / "ranks.py").write_text(MPI_VICTIM)
    tolerant, strict = jobs = [
        start("mpirun.sh", tmp_path / "ranks.py", RANKS="3", FAULTS=faults) for faults in ("tolerate", "abort")
    ]
    outputs = finish(jobs)
    assert tolerant.returncode == 0, outputs[0]
    assert went_on(outputs[0]) == ["rank 0 went on", "rank 2 went on"], outputs[0]
    assert strict.returncode != 0
    assert went_on(outputs[1]) == []


@pytest.mark.parametrize(
    ("starter", "settings", "said"),
    [
        ("mpirun.sh", {"RANKS": "many"}, "RANKS must be a number of ranks, got 'many'"),
        ("mpirun.sh", {"RANKS": "2", "FAULTS": "maybe"}, "FAULTS must be tolerate or abort, got 'maybe'"),
        ("mpirun.sh", {"RANKS": "2", "HOSTS": "nowhere"}, "HOSTS must be a file that can be read, got 'nowhere'"),
        ("torchrun_survivors.sh", {"RANKS": "2", "ESSENTIAL": "all"}, "ESSENTIAL must be ranks"),
        ("torchrun_local.sh", {"RANKS": "two"}, "RANKS must be a number of ranks, got 'two'"),
        (
            "torchrun_multinode.sh",
            {"NODES": "2", "MASTER": "a", "RENDEZVOUS": "etcd"},
            "RENDEZVOUS must be static or c10d, got 'etcd'",
        ),
        (
            "torchrun_multinode.sh",
            {"NODES": "2", "MASTER": "a", "RENDEZVOUS": "c10d", "NODE_RANK": "1"},
            "hosts have no numbers with c10d, got NODE_RANK=1",
        ),
        ("mpirun.sh", {"RANKS": "2", "INTERFACE": "eth1"}, "--mca btl_tcp_if_include eth1"),
        (
            "slurm.sbatch",
            {"SLURM_JOB_NODELIST": "a", "SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "DRY_RUN": "1", "RANKS": "0"},
            "RANKS must be a number of ranks, got '0'",
        ),
    ],
)
def test_a_wrong_setting_is_refused(starter, settings, said):
    ran = start(starter, "script.py", **settings)
    (output,) = finish([ran], timeout=20)
    assert ran.returncode == 2
    assert said in output


FAKE_SLURM = {
    "scontrol": '#!/bin/sh\n[ "$*" = "show hostnames node[3-4]" ] && printf "node3\\nnode4\\n"\n',
    "srun": '#!/bin/sh\nprintf "%s\\n" "$GLOO_SOCKET_IFNAME" "$OMP_NUM_THREADS" "$@"\n',
}
SLURM = {
    "SLURM_JOB_NODELIST": "node[3-4]", "SLURM_JOB_ID": "40007", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "8",
    "SLURM_GPUS_ON_NODE": "4", "INTERFACE": "ib0",
}  # fmt: skip
TORCHRUN_ON_NODES = [
    "python", "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "4", "--max-restarts", "0",
    "--rdzv-backend", "c10d", "--rdzv-endpoint", "node3:20007", "--rdzv-id", "40007", "train.py", "two words",
]  # fmt: skip


@pytest.mark.parametrize("dry", [False, True])
def test_what_slurm_is_asked_for(tmp_path, dry):
    for name, script in FAKE_SLURM.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, **SLURM, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("OMP_NUM_THREADS", None)
    if dry:
        environment["DRY_RUN"] = "1"
    ran = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch"), "train.py", "two words"],
        env=environment, capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    asked = ["--nodes", "2", "--ntasks-per-node", "1", "--kill-on-bad-exit=1", "--cpus-per-task", "8"]
    if dry:
        assert shlex.split(ran.stdout) == ["env", "OMP_NUM_THREADS=2", "srun", *asked, *TORCHRUN_ON_NODES]
    else:
        assert ran.stdout.splitlines() == ["ib0", "2", *asked, *TORCHRUN_ON_NODES]


@pytest.mark.parametrize("script", sorted(each.name for each in LAUNCH.iterdir() if each.suffix in (".sh", ".sbatch")))
def test_a_header_says_how_to_start_and_what_to_change(script):
    text = (LAUNCH / script).read_text()
    assert os.access(LAUNCH / script, os.X_OK)  # docs type its name alone
    assert subprocess.run(["bash", "-n", str(LAUNCH / script)], check=False).returncode == 0
    header = "\n".join(line for line in text.partition("set -euo pipefail")[0].splitlines() if line.startswith("#"))
    assert "What to change" in header or "Options" in header
    assert f"launch/{script} " in header
    read = set(re.findall(r"\$\{([A-Z][A-Z_]+)[:}?-]", text.partition("set -euo pipefail")[2]))
    set_elsewhere = {"BASH_SOURCE", "RANDOM", "SECONDS"} | {name for name in read if name.startswith("SLURM_")}
    assert {name for name in read - set_elsewhere if name not in header} == set()

"""Hosts made of network namespaces: the script's own promises, and a short training job across two of them.

Most tests put a stand-in for torchrun in the place of Python, which is enough for what the script does with processes.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from netns import DEADLINE_S, NAME, REAL, SCRIPT, cluster, command, namespaces, needs_namespaces

TORCHRUN = """#!/bin/bash
# what the script starts on each host: python -m torch.distributed.run ... --no-python COMMAND
while [ "$1" != --no-python ]; do
  [ "$1" != --node-rank ] || export RANK=$2
  shift
done
shift
exec "$@"
"""


def processes(marker, program=None):
    """Ids of the processes with this in their command line, of all programs or one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if marker.encode() in words and program in (None, words[0].decode()):
                found.append(int(folder.name))
    return found


def wait_until(condition):
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def hosts():
    made = cluster("up", 2, "100mbit")
    assert made.returncode == 0, made.stderr
    yield
    removed = cluster("down")
    assert (removed.returncode, namespaces()) == (0, set()), removed.stderr


@pytest.fixture
def environment(tmp_path):
    """Where `python` is the stand-in, and a marker that the processes of this test carry in their command lines."""
    stand_in = tmp_path / "bin" / "python"
    stand_in.parent.mkdir()
    stand_in.write_text(TORCHRUN)
    stand_in.chmod(0o755)
    return {**os.environ, "PATH": f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture
def marker(tmp_path):
    (tmp_path / "marker").touch()
    yield str(tmp_path / "marker")
    for process in processes(str(tmp_path / "marker")):  # of a test that failed
        os.kill(process, signal.SIGKILL)


# -- what it is told -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "what to do?"),
        (("frob",), "unknown subcommand 'frob'; use up, run, once, link or down"),
        (("up", "2"), "write it:"),
        (("up", "2", "1gbit", "--fast"), "unknown option --fast"),
        (("up", "2", "1gbit", "--name"), "--name needs a value"),
        (("up", "2", "1gbit", "--name", "a/b"), "--name must be 1 to 16 small letters and digits, got 'a/b'"),
    ],
)
def test_what_cannot_be_understood_is_refused(arguments, said):
    ran = cluster(*arguments)
    assert ran.returncode == 2
    assert said in ran.stderr


@needs_namespaces
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("up", "0", "1gbit"), "N must be a number from 1 to 64, got '0'"),
        (("up", "65", "1gbit"), "N must be a number from 1 to 64, got '65'"),
        (("up", "08", "1gbit"), "N must be a number from 1 to 64, got '08'"),
        (("up", "two", "1gbit"), "N must be a number from 1 to 64, got 'two'"),
        (
            ("up", "2", "fast"),
            "RATE must be a number with kbit, mbit or gbit, or none, got 'fast'; use 100mbit or 1gbit",
        ),
        (("up", "2", "1"), "RATE must be"),
        (("run", "2", "--", "true"), "make it with:"),
        (("link", "1", "down"), "make it with:"),
        (("once", "2", "1gbit"), "once needs a command"),
    ],
)
def test_what_cannot_be_done_is_refused_and_makes_nothing(arguments, said):
    name = f"{NAME}x"
    ran = cluster(*arguments, name=name)
    assert ran.returncode == 2
    assert said in ran.stderr
    assert not {n for n in namespaces() if n.startswith(f"distopt-{name}-")}


@needs_namespaces
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("up", "2", "1gbit"), "of 2 hosts already; remove it with:"),
        (("run", "3", "--", "true"), "N must be a number from 1 to 2, got '3'"),
        (("run", "2"), "run needs a command"),
        (("run", "2", "--processes", "0", "--", "true"), "--processes must be"),
        (("run", "2", "--deadline", "soon", "--", "true"), "--deadline must be"),
        (("link", "3", "down"), "HOST must be a number from 1 to 2, got '3'"),
        (("link", "2", "sideways"), "a link can be set up, down or unplugged, got 'sideways'"),
    ],
)
def test_what_does_not_fit_the_hosts_is_refused(hosts, arguments, said):
    ran = cluster(*arguments)
    assert ran.returncode == 2
    assert said in ran.stderr


@needs_namespaces
def test_who_is_not_root_is_told():
    ran = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", "bash", "-s", "up", "2", "1gbit"],
        stdin=SCRIPT.open(), capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert ran.returncode == 2
    assert "network namespaces need root" in ran.stderr


def test_a_missing_tool_is_named(tmp_path):
    for tool in ("bash", "id", "awk", "sed", "grep"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    (tmp_path / "id").unlink()
    (tmp_path / "id").write_text("#!/bin/sh\necho 0\n")
    (tmp_path / "id").chmod(0o755)
    ran = cluster("up", 2, "1gbit", env={"PATH": str(tmp_path)})
    assert ran.returncode == 2
    assert "ip is missing; install iproute2" in ran.stderr


# -- what it makes and removes -------------------------------------------------------------------------------------


@needs_namespaces
def test_both_directions_of_every_host_have_the_rate(hosts):
    for namespace, device in [(f"distopt-{NAME}-{i}", "eth0") for i in (1, 2)] + [
        (f"distopt-{NAME}-switch", f"port{i}") for i in (1, 2)
    ]:
        shown = subprocess.run(
            ["tc", "-n", namespace, "qdisc", "show", "dev", device], capture_output=True, text=True, check=True
        ).stdout
        assert "tbf" in shown
        assert "rate 100Mbit" in shown


@needs_namespaces
def test_nothing_of_the_machine_is_changed_and_down_takes_only_its_own(environment):
    name, other = f"{NAME}a", f"distopt-{NAME}a-1x"
    shown = [["ip", "-o", "link"], ["ip", "-o", "addr"], ["ip", "route"]]

    def machine():
        return [subprocess.run(what, capture_output=True, text=True, check=True).stdout for what in shown]

    subprocess.run(["ip", "netns", "add", other], check=True)  # of somebody else, with a name much alike
    try:
        before = machine()
        assert cluster("up", 3, "1gbit", name=name).returncode == 0
        assert {n for n in namespaces() if n.startswith(f"distopt-{name}-")} == {
            other, *(f"distopt-{name}-{end}" for end in ("switch", 1, 2, 3)),
        }  # fmt: skip
        assert machine() == before
        assert cluster("down", name=name).returncode == 0
        assert {n for n in namespaces() if n.startswith(f"distopt-{name}-")} == {other}
        assert not list(Path("/etc").glob(f"netns/distopt-{name}*"))
        again = cluster("down", name=name)
        assert (again.returncode, "nothing to remove" in again.stdout) == (0, True)
    finally:
        subprocess.run(["ip", "netns", "del", other], check=True)


@needs_namespaces
def test_a_cluster_that_cannot_be_made_whole_is_removed(tmp_path):
    broken = tmp_path / "tc"
    broken.write_text("#!/bin/sh\necho 'tc: no tbf in this kernel' >&2\nexit 1\n")
    broken.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    ran = cluster("up", 2, "1gbit", name=f"{NAME}b", env={**os.environ, "PATH": path})
    assert ran.returncode != 0
    assert "no tbf in this kernel" in ran.stderr
    assert "removed what was made" in ran.stderr
    assert not {n for n in namespaces() if n.startswith(f"distopt-{NAME}b-")}


@needs_namespaces
def test_hosts_have_names_and_addresses_and_see_each_other_but_no_other_cluster(hosts, environment):
    probe = 'echo "$(hostname) $(ip -o -4 addr show eth0 | cut -d " " -f 7) $(ip route | wc -l) $OMP_NUM_THREADS"'
    ran = cluster("run", 2, "--", "bash", "-c", probe, env={**environment, "OMP_NUM_THREADS": "1"})
    assert sorted(ran.stdout.splitlines()) == ["host1| host1 10.88.0.1/24 1 1", "host2| host2 10.88.0.2/24 1 1"]


@needs_namespaces
@pytest.mark.parametrize("state", ["down", "unplugged"])
def test_a_link_goes_down_and_up(hosts, state):
    def answers():
        knock = ["ip", "netns", "exec", f"distopt-{NAME}-1", "timeout", "1", "bash", "-c", "echo >/dev/tcp/10.88.0.2/9"]
        return "refused" in subprocess.run(knock, capture_output=True, text=True, check=False).stderr

    wait_until(answers)
    assert cluster("link", 2, state).returncode == 0
    assert not answers()
    assert cluster("link", 2, "up").returncode == 0
    wait_until(answers)


# -- what it runs --------------------------------------------------------------------------------------------------

# A job with a process that torchrun knows nothing of, in a session of its own.
JOB = 'setsid tail -f "$1" & echo started; exec tail -f "$1"'
ENDING = 'setsid tail -f "$1" & echo started; [ "$RANK" = 0 ] || { sleep 0.5; exit "$2"; }; exec tail -f "$1"'


@needs_namespaces
def test_output_has_the_hosts_name_or_goes_to_a_file_each(hosts, environment, tmp_path):
    job = ("bash", "-c", 'echo "out $RANK"; echo "err $RANK" >&2')
    ran = cluster("run", 2, "--", *job, env=environment)
    assert (ran.returncode, sorted(ran.stdout.splitlines())) == (0, ["host1| out 0", "host2| out 1"])
    assert sorted(ran.stderr.splitlines()) == ["host1| err 0", "host2| err 1"]
    ran = cluster("run", 2, "--logs", tmp_path / "logs", "--", *job, env=environment)
    assert (ran.returncode, ran.stdout) == (0, "")
    assert (tmp_path / "logs" / "host2.log").read_text().splitlines() == ["out 1", "err 1"]


@needs_namespaces
@pytest.mark.parametrize(
    ("options", "ending", "status"),
    [(("--grace", "0"), "3", 3), (("--deadline", "30", "--grace", "0"), "5", 5), (("--deadline", "2"), "0", 124)],
    ids=["a host fails", "a host fails before the deadline", "deadline"],
)
def test_whatever_happens_nothing_goes_on_running(hosts, environment, marker, options, ending, status):
    ran = cluster("run", 2, *options, "--", "bash", "-c", ENDING, "job", marker, ending,
                  env=environment)  # fmt: skip
    assert ran.returncode == status, ran.stderr
    started = set(ran.stdout.splitlines())  # on a busy machine host 1 may be ended before it says so
    assert {"host2| started"} <= started <= {"host1| started", "host2| started"}
    assert processes(marker) == []


@needs_namespaces
@pytest.mark.parametrize(("options", "status", "went_on"), [((), 137, False), (("--survivors",), 0, True)])
def test_a_killed_rank_ends_the_others_unless_they_are_survivors(
    hosts, environment, tmp_path, options, status, went_on
):
    killed = (
        '[ $RANK = 0 ] || { touch "$1"; kill -KILL $$; }; until [ -e "$1" ]; do sleep 0.1; done; sleep 2; echo went on'
    )
    job = ("bash", "-c", killed, "job", tmp_path / "killed")
    ran = cluster("run", 2, "--grace", "0", *options, "--", *job, env=environment)
    assert ran.returncode == status, ran.stderr
    assert ("host1| went on" in ran.stdout) == went_on
    assert ("rank 1 was ended by signal 9" in ran.stderr) == went_on


@needs_namespaces
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_ends_what_it_started(hosts, environment, marker, how):
    arguments = command("run", 2, "--", "bash", "-c", JOB, "job", marker)
    running = subprocess.Popen(
        arguments,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(how, signal.SIG_DFL),  # a job in the background ignores SIGINT, for good
    )
    wait_until(lambda: len(processes(marker, "tail")) == 4)  # before they are that, they may still fork
    busy = cluster("run", 2, "--", "true", env=environment)
    assert (busy.returncode, f"a run is under way in cluster '{NAME}'" in busy.stderr) == (2, True)
    running.send_signal(how)
    assert running.wait(DEADLINE_S) == 128 + how
    assert processes(marker) == []


@needs_namespaces
def test_what_a_killed_script_leaves_is_ended_by_the_next(hosts, environment, marker):
    """torchrun is asked to stop by the kernel; what it does not know of has to wait for the next run."""
    arguments = command("run", 2, "--", "bash", "-c", JOB, "job", marker)
    running = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(processes(marker, "tail")) == 4)  # before they are that, they may still fork
    running.kill()
    running.wait()
    ran = cluster("run", 2, "--", "echo", "here", env=environment)
    assert (ran.returncode, sorted(ran.stdout.splitlines())) == (0, ["host1| here", "host2| here"])
    assert processes(marker) == []


@needs_namespaces
@pytest.mark.parametrize("status", [0, 7])
def test_once_leaves_nothing_also_after_a_failure(environment, marker, status):
    name = f"{NAME}c"
    ran = cluster("once", 2, "1gbit", "--", "bash", "-c", f"exit $((RANK * {status}))", name=name, env=environment)
    assert ran.returncode == status, ran.stderr
    assert not {n for n in namespaces() if n.startswith(f"distopt-{name}-")}


@needs_namespaces
def test_down_ends_what_still_runs(environment, marker):
    name = f"{NAME}d"
    assert cluster("up", 2, "none", name=name).returncode == 0
    arguments = command("run", 2, "--", "bash", "-c", JOB, "job", marker, name=name)
    running = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(processes(marker, "tail")) == 4)  # before they are that, they may still fork
    assert cluster("down", name=name).returncode == 0
    assert running.wait(DEADLINE_S) != 0
    assert processes(marker) == []


# -- training across hosts -----------------------------------------------------------------------------------------

TRAINING = """
import hashlib, json, os, socket, torch, torch.distributed as dist
from pathlib import Path
from torch.nn.parallel import DistributedDataParallel
import distopt

def sent_by_this_host():
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())

dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Sequential(*(torch.nn.Linear(500, 500) for _ in range(2))))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
attachment = distopt.DGC(density=0.001).attach(model, optimizer)
data = torch.Generator().manual_seed(dist.get_rank())  # every host has its own
before = sent_by_this_host()
for _ in range(20):
    optimizer.zero_grad()
    model(torch.randn(8, 500, generator=data)).square().mean().backward()
    optimizer.step()
dist.barrier()
stats = attachment.stats()
replica = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
(Path(os.environ["RESULTS"]) / f"{dist.get_rank()}.json").write_text(json.dumps({
    "host": socket.gethostname(), "replica": replica, "cores": sorted(os.sched_getaffinity(0)),
    "on_the_link": sent_by_this_host() - before,
    **{key: stats[key] for key in ("bytes_sent", "bytes_dense", "link_bytes_sent", "link_bytes_dense", "steps")},
}))
dist.destroy_process_group()
"""


@needs_namespaces
@pytest.mark.job
@pytest.mark.timeout(100)
def test_two_hosts_train_with_dgc(hosts, tmp_path):
    (tmp_path / "training.py").write_text(TRAINING)
    settings = {**REAL, "RESULTS": str(tmp_path)}
    ran = cluster("run", 2, "--deadline", 80, "--", tmp_path / "training.py", deadline_s=90,
                  env={**os.environ, **settings})  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert (one["host"], two["host"]) == ("host1", "host2")
    assert one["replica"] == two["replica"]
    assert one["steps"] == 20
    if os.cpu_count() >= 2:
        assert len(one["cores"]) == len(two["cores"]) == 1
        assert one["cores"] != two["cores"]
    for result in (one, two):
        assert result["bytes_dense"] == 20 * 4 * 2 * 500 * 501
        assert result["bytes_sent"] < result["bytes_dense"] / 100
        # What distopt counts is what the interface sees, but for headers and the barrier.
        assert result["link_bytes_sent"] <= result["on_the_link"] < 2 * result["link_bytes_sent"] + 50_000
        assert result["on_the_link"] < result["link_bytes_dense"] / 20

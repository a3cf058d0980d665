"""launch/torchrun_multinode.sh on hosts with addresses of their own, which know each other by address or by name."""

import os
import subprocess
from pathlib import Path

import pytest

from netns import DEADLINE_S, NAME, REAL, cluster, namespaces, needs_namespaces

pytestmark = [pytest.mark.job, needs_namespaces]

LAUNCH = Path(__file__).parents[2] / "launch"
PROBE = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(())
dist.all_reduce(total)
print(f"{os.uname().nodename}: rank {dist.get_rank()} of {dist.get_world_size()}, sum {total.item():g}", flush=True)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def hosts():
    made = cluster("up", 2, "1gbit")
    assert made.returncode == 0, made.stderr
    yield
    removed = cluster("down")
    assert (removed.returncode, namespaces()) == (0, set()), removed.stderr


def on_host(number, script, **settings):
    """The same line on a host, whose name is its own too."""
    named = ["unshare", "--uts", "bash", "-c", 'hostname "$0" && exec "$@"', f"host{number}"]
    return subprocess.Popen(
        ["ip", "netns", "exec", f"distopt-{NAME}-{number}", *named, "bash", LAUNCH / "torchrun_multinode.sh", script],
        env={**os.environ, **REAL, "OMP_NUM_THREADS": "1", "INTERFACE": "eth0", "NODES": "2", **settings},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        [{"MASTER": "10.88.0.1", "NODE_RANK": "0"}, {"MASTER": "10.88.0.1", "NODE_RANK": "1"}],
        [{"MASTER": "host2", "RENDEZVOUS": "c10d", "JOB": "own", "RANKS": "2"}] * 2,
    ],
    ids=["static", "c10d"],
)
def test_hosts_meet(hosts, tmp_path, settings):
    (tmp_path / "probe.py").write_text(PROBE)
    started = [on_host(number, tmp_path / "probe.py", **one) for number, one in enumerate(settings, start=1)]
    try:
        outputs = [one.communicate(timeout=DEADLINE_S)[0] for one in started]
    finally:
        for one in started:
            if one.poll() is None:
                one.terminate()  # torchrun ends its ranks
                one.wait(30)
    assert [one.returncode for one in started] == [0, 0], "\n".join(outputs)
    ranks = int(settings[0].get("RANKS", "1"))
    for number, output in enumerate(outputs, start=1):
        assert output.count(f"of {2 * ranks}, sum {2 * ranks}") == ranks, output
        assert output.count(f"host{number}: rank") == ranks, output

import os
import subprocess
import sys
from pathlib import Path

import pytest

from example_ranks import free_port

LAUNCH = Path(__file__).parents[2] / "launch"
PROBE = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(())
dist.all_reduce(total)
print(f"rank {dist.get_rank()} of {dist.get_world_size()}, sum {total.item():g}", flush=True)
dist.destroy_process_group()
"""


def start(starter, script, **settings):
    with_python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": with_python, **settings}
    return subprocess.Popen(
        ["bash", str(LAUNCH / starter), str(script)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("starter", "settings"),
    [
        ("torchrun_nodes.sh", [{"NODES": "2", "NODE_RANK": "0"}, {"NODES": "2", "NODE_RANK": "1"}]),
        ("elastic.sh", [{"MIN_NODES": "2", "MAX_NODES": "2"}] * 2),
    ],
)
def test_two_hosts_on_this_machine_form_one_group(tmp_path, starter, settings):
    (tmp_path / "probe.py").write_text(PROBE)
    port = free_port()
    hosts = [start(starter, tmp_path / "probe.py", MASTER="127.0.0.1", PORT=port, **one) for one in settings]
    try:
        outputs = [host.communicate(timeout=90)[0] for host in hosts]
    finally:
        for host in hosts:
            host.terminate()
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(outputs)
    assert sorted(line for output in outputs for line in output.splitlines() if line.startswith("rank")) == [
        "rank 0 of 2, sum 2",
        "rank 1 of 2, sum 2",
    ]


@pytest.mark.parametrize(
    ("starter", "missing"),
    [("torchrun_nodes.sh", "NODES"), ("elastic.sh", "MASTER"), ("slurm.sbatch", "SLURM_JOB_NODELIST")],
)
def test_a_missing_setting_is_named(starter, missing):
    ran = start(starter, "script.py")
    output, _ = ran.communicate(timeout=20)
    assert ran.returncode != 0
    assert missing in output

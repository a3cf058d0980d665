"""The example trains, goes on with another number of ranks, and under real torchrun survives a killed worker.

That run ends with the bits of one that was never disturbed.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from example_ranks import DDP_DGC, EPOCHS, ROUTED, ddp_dgc_arguments, final_state, run_ranks

pytestmark = pytest.mark.job

# The first time around rank 1 dies in the middle of the second epoch.
DEATH = """
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    step, steps = torch.optim.SGD.step, []

    def step_until_killed(optimizer, *args, **kwargs):
        steps.append(None)
        if len(steps) == 30:
            open(__file__ + ".died", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return step(optimizer, *args, **kwargs)

    torch.optim.SGD.step = step_until_killed
"""


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]
    # As launch/elastic.sh does: workers that start again must not find the addresses of those that died.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)


def reports(output):
    """The lines of the script itself: before torch 2.13 gloo also writes to standard output."""
    return [line for line in output.splitlines() if line.startswith("epoch ")]


def test_the_example_trains_and_says_what_it_saves(undisturbed):
    output, checkpoints = undisturbed
    lines = reports(output)
    assert [line.partition(":")[0] for line in lines] == [f"epoch {epoch}" for epoch in (1, 2, 3)]
    assert float(lines[-1].split("accuracy ")[1].partition("%")[0]) > 60
    assert "x fewer bytes than dense" in lines[-1]
    assert sum(name.startswith("distopt-") for name in final_state(checkpoints)) > 2  # u and v of two ranks


def test_a_killed_worker_is_restarted_and_the_run_ends_bit_identical(tmp_path, undisturbed):
    (tmp_path / "killed.py").write_text(ROUTED.format(disturbance=DEATH))
    ran = torchrun("--max-restarts=2", str(tmp_path / "killed.py"), *ddp_dgc_arguments(tmp_path / "checkpoints"))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (tmp_path / "killed.py.died").exists(), "no worker was killed"
    assert ran.stdout.count("epoch 1:") == 1, "the second start must resume, not begin again"
    state, expected = final_state(tmp_path / "checkpoints"), final_state(undisturbed[1])
    assert state.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []


def test_a_checkpoint_of_two_ranks_goes_on_with_three(warm_python, tmp_path, undisturbed):
    shutil.copytree(undisturbed[1], tmp_path / "checkpoints")
    output = run_ranks(warm_python, *ddp_dgc_arguments(tmp_path / "checkpoints", epochs=EPOCHS + 1), ranks=3)
    assert reports(output)[0].startswith(f"epoch {EPOCHS + 1}:")


@pytest.mark.job
def test_a_jobs_file_says_what_is_kept_and_written(warm_python, tmp_path):
    folders = {"checkpoint": {"folder": str(tmp_path / "kept"), "every": 30}, "log": {"folder": str(tmp_path / "log")}}
    job = {"algorithm": "topk", "density": 0.05, "exchange": "allgather", **folders}
    (tmp_path / "distopt.json").write_text(json.dumps(job))
    output = run_ranks(warm_python, DDP_DGC, "--epochs", "3", "--job", str(tmp_path / "distopt.json"))
    assert len(reports(output)) == 3
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["epoch-2", "epoch-3"]  # of 22 steps each
    assert "topk on 2 ranks" in (tmp_path / "log/report.txt").read_text()

"""The example under real torchrun: it trains, and with a worker killed it ends with the bits of a run undisturbed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "ddp_dgc.py"
EPOCHS = 3  # of 22 steps

# The route is given: each run would choose by a link that it has measured for itself, and two may not agree.
ROUTED = """
import functools, os, runpy, signal, sys
import torch, distopt

distopt.DGC = functools.partial(distopt.DGC, exchange="allgather")
{disturbance}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
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


def torchrun(*arguments, ranks=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *arguments]
    # As launch/elastic.sh does: workers that start again must not find the addresses of those that died.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)


def example_arguments(checkpoints, epochs=EPOCHS):
    return [str(EXAMPLE), "--epochs", str(epochs), "--checkpoints", str(checkpoints)]


def reports(output):
    """The lines of the script itself: before torch 2.13 gloo also writes to standard output."""
    return [line for line in output.splitlines() if line.startswith("epoch ")]


def flat_tensors(value, path=""):
    """All tensors of a nested state with their paths."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    if not isinstance(value, dict):
        return {}
    return {key: tensor for name in value for key, tensor in flat_tensors(value[name], f"{path}/{name}").items()}


def final_state(checkpoints):
    folder = checkpoints / f"epoch-{EPOCHS}"
    # The distopt files' names end in a digest, also of the link that each run has measured for itself.
    paths = {path.name.partition("-of-")[0]: path for path in sorted(folder.glob("*.pt"))}
    states = {name: flat_tensors(torch.load(path)) for name, path in paths.items()}
    return {f"{name}{path}": tensor for name, tensors in states.items() for path, tensor in tensors.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a run printed, and its folder of checkpoints."""
    checkpoints = tmp_path_factory.mktemp("undisturbed")
    starter = checkpoints.with_suffix(".py")
    starter.write_text(ROUTED.format(disturbance=""))
    ran = torchrun(str(starter), *example_arguments(checkpoints))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout, checkpoints


def test_the_example_trains_and_says_what_it_saves(undisturbed):
    output, checkpoints = undisturbed
    lines = reports(output)
    assert [line.partition(":")[0] for line in lines] == [f"epoch {epoch}" for epoch in (1, 2, 3)]
    assert float(lines[-1].split("accuracy ")[1].partition("%")[0]) > 60
    assert "x fewer bytes than dense" in lines[-1]
    assert sum(name.startswith("distopt-") for name in final_state(checkpoints)) > 2  # u and v of two ranks


@pytest.mark.timeout(110)
def test_a_killed_worker_is_restarted_and_the_run_ends_bit_identical(tmp_path, undisturbed):
    (tmp_path / "killed.py").write_text(ROUTED.format(disturbance=DEATH))
    ran = torchrun("--max-restarts=2", str(tmp_path / "killed.py"), *example_arguments(tmp_path / "checkpoints"))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (tmp_path / "killed.py.died").exists(), "no worker was killed"
    assert ran.stdout.count("epoch 1:") == 1, "the second start must resume, not begin again"
    state, expected = final_state(tmp_path / "checkpoints"), final_state(undisturbed[1])
    assert state.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []


@pytest.mark.timeout(110)
def test_a_checkpoint_of_two_ranks_goes_on_with_three(tmp_path, undisturbed):
    shutil.copytree(undisturbed[1], tmp_path / "checkpoints")
    ran = torchrun(*example_arguments(tmp_path / "checkpoints", epochs=EPOCHS + 1), ranks=3)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert reports(ran.stdout)[0].startswith(f"epoch {EPOCHS + 1}:")

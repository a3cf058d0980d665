"""The ranks of an example without torchrun, in processes that have imported torch already."""

import socket
import subprocess
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
DDP_DGC = EXAMPLES / "ddp_dgc.py"
EPOCHS = 3  # of 22 steps
DEADLINE_S = 240

# The route is given: each run would choose by a link that it has measured for itself, and two may not agree.
ROUTED = """
import functools, os, runpy, signal, sys
import torch, distopt

distopt.DGC = functools.partial(distopt.DGC, exchange="allgather")
{disturbance}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
AS_IT_IS = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_ranks(warm_python, script, *arguments, ranks=2, code=AS_IT_IS):
    """What rank 0 printed. All ranks must end well; torchrun's environment is all that they have of it."""
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = [
        warm_python.start(code, script, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank in range(ranks)
    ]
    try:
        outputs = [one.communicate(DEADLINE_S) for one in started]
    except subprocess.TimeoutExpired as late:
        raise AssertionError(f"a rank has not ended: {late.stderr}") from late
    finally:
        for one in started:
            one.kill()
            one.wait()
    assert [one.returncode for one in started] == [0] * ranks, "".join(errors for _, errors in outputs)
    return outputs[0][0]


def train_undisturbed(warm_python, checkpoints):
    """Trains examples/ddp_dgc.py on two ranks to its end; what was printed."""
    arguments = ddp_dgc_arguments(checkpoints)
    return run_ranks(warm_python, *arguments, code=ROUTED.format(disturbance=""))


def ddp_dgc_arguments(checkpoints, epochs=EPOCHS):
    return [str(DDP_DGC), "--epochs", str(epochs), "--checkpoints", str(checkpoints)]


def final_state(checkpoints):
    """All tensors of the last checkpoint by file and path: parameters, optimizer, and u and v of every rank."""
    folder = checkpoints / f"epoch-{EPOCHS}"
    # The files' names end in a digest, also of the link that each run has measured for itself.
    paths = {path.name.rpartition("-")[0].partition("-of-")[0]: path for path in sorted(folder.glob("*.pt"))}
    states = {name: _flat_tensors(torch.load(path)) for name, path in paths.items()}
    return {f"{name}{path}": tensor for name, tensors in states.items() for path, tensor in tensors.items()}


def _flat_tensors(value, path=""):
    if isinstance(value, torch.Tensor):
        return {path: value}
    if not isinstance(value, dict):
        return {}
    return {key: tensor for name in value for key, tensor in _flat_tensors(value[name], f"{path}/{name}").items()}

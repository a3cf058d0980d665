"""What the tests of training frameworks share: a rank's place, a small model, real digits.

A host takes seconds to import, and some change torch when they are: the process of the tests names what ranks shall do
(`call`), and only the ranks import it.
"""

import contextlib
import importlib
import io
import os
import re
import runpy
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import nn

BATCH = 16
STEPS = 8
DGC = {"algorithm": "dgc", "density": 0.01, "exchange": "allgather"}
WHOLE = {**DGC, "density": 1.0}
TOPK = {**DGC, "algorithm": "topk"}


def call(name, *args, **kwargs):
    """Runs `module:function`, for a rank."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)(*args, **kwargs)


def here():
    """Rank and size."""
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


@contextlib.contextmanager
def launched(rank, size):
    """The environment that torchrun gives a rank. The process group is there already, and hosts take it."""
    place = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
        "GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1, "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29511,
    }  # fmt: skip
    with mock.patch.dict(os.environ, {name: str(value) for name, value in place.items()}):
        yield


def run_example(name, *arguments):
    """Runs a file of examples/ as a rank that torchrun has started; what it printed."""
    script = str(Path(__file__).parents[1] / "examples" / name)
    if "accelerate" in sys.modules:
        reset_accelerate()
    with (
        launched(*here()),
        mock.patch.object(sys, "argv", [script, *arguments]),
        mock.patch.object(torch.distributed, "destroy_process_group"),  # it is the pool's
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        runpy.run_path(script, run_name="__main__")
    return printed.getvalue()


def check_example(ranks, name, folder):
    """It trains on two ranks and sends little."""
    printed, _ = ranks(2)(run_example, name, "--epochs", "2", "--checkpoints", str(folder))
    assert re.search(r"epoch 2: accuracy \d\d\.\d%", printed)
    assert int(re.search(r"(\d+)x fewer bytes", printed)[1]) >= 20
    assert list(folder.iterdir())


def reset_accelerate():
    """Accelerate keeps how it was set up in the process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def build_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def digits(rank, size, steps):
    """`steps` batches of this rank's share."""
    from sklearn.datasets import load_digits  # only the ranks need it

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[rank::size]
    images, labels = torch.from_numpy(pixels).float()[order] / 16, torch.from_numpy(labels)[order]
    return [(images[i * BATCH : (i + 1) * BATCH], labels[i * BATCH : (i + 1) * BATCH]) for i in range(steps)]


def flat(model):
    """All parameters of a model as one vector."""
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])

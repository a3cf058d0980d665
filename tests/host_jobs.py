"""What the tests of training frameworks share: a rank's place, a small model, real digits."""

import contextlib
import os
from unittest import mock

import torch
from sklearn.datasets import load_digits
from torch import nn

BATCH = 16


@contextlib.contextmanager
def launched(rank, size):
    """The environment that torchrun gives a rank. The process group is there already, and hosts take it."""
    place = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29511, "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    with mock.patch.dict(os.environ, {name: str(value) for name, value in place.items()}):
        yield


def build_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def digits(rank, size, steps):
    """`steps` batches of this rank's share."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[rank::size]
    images, labels = torch.from_numpy(pixels).float()[order] / 16, torch.from_numpy(labels)[order]
    return [(images[i * BATCH : (i + 1) * BATCH], labels[i * BATCH : (i + 1) * BATCH]) for i in range(steps)]


def flat(model):
    """All parameters of a model as one vector."""
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])

"""What every system trains, whatever its environment: needs torch and numpy only.

A worker is started as `python SYSTEM_worker.py TASK.json`, trains that task with its system as that system's users
would, and prints one line of JSON, see `Clock.report`.
"""

import itertools
import json
import os
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

STARTED_AT = "FEDERATED_STARTED_AT"  # in the environment: time.time() just before the worker was started


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to train: FedAvg with plain SGD, one epoch over a client's samples per round."""

    folder: str  # of train_images, train_labels, parts (clients, samples), test_images and test_labels, each .npy
    model: str
    clients_per_round: int
    batch_size: int
    lr: float
    rounds: int
    seed: int
    mode: str = "auto"  # of distopt's Simulation
    processes: int = 1  # of flwr's actors


class Data:
    """The arrays of a task's folder as tensors."""

    def __init__(self, folder: str) -> None:
        def load(name: str) -> np.ndarray:
            return np.load(Path(folder) / f"{name}.npy")

        self.train_images = torch.from_numpy(load("train_images"))
        self.train_labels = torch.from_numpy(load("train_labels"))
        self.test_images = torch.from_numpy(load("test_images"))
        self.test_labels = torch.from_numpy(load("test_labels"))
        self.parts = load("parts")

    def of_client(self, client: int) -> tuple[Tensor, Tensor]:
        part = torch.from_numpy(self.parts[client])
        return self.train_images[part], self.train_labels[part]


@lru_cache
def load_data(folder: str) -> Data:
    return Data(folder)


def make_model(task: Task) -> nn.Module:
    """The same initial parameters for the same seed in every system."""
    torch.manual_seed(task.seed)
    if task.model == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.BatchNorm1d(10))
    if task.model == "cnn":
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
            nn.Conv2d(8, 16, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
            nn.Flatten(), nn.Linear(16 * 7 * 7, 10),
        )  # fmt: skip
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    return model.to(memory_format=torch.channels_last)


def train_epoch(model: nn.Module, task: Task, images: Tensor, labels: Tensor) -> None:
    """One epoch of plain SGD over one client's samples in random order."""
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr)
    model.train()
    for batch in torch.randperm(len(labels)).split(task.batch_size):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """On the whole test set."""
    model.eval()
    parts = zip(data.test_images.split(1000), data.test_labels.split(1000), strict=True)
    return sum(int((model(images).argmax(1) == labels).sum()) for images, labels in parts) / len(data.test_labels)


class Clock:
    """When the imports were done, and when each round was."""

    def __init__(self) -> None:
        self._began = float(os.environ[STARTED_AT])
        self._imported = time.time()
        self._ends: list[float] = []

    def tick(self) -> None:
        """A round has ended."""
        self._ends.append(time.time())

    def report(self, accuracy: float) -> None:
        """Prints the seconds of importing, of starting (both since the process was), of each round but the first."""
        ends = self._ends
        figures = {
            "import_s": self._imported - self._began,
            "start_s": ends[0] - self._began,
            "rounds_s": [late - early for early, late in itertools.pairwise(ends)],
            "accuracy": accuracy,
        }
        print(json.dumps(figures), flush=True)


def task_of_command_line() -> Task:
    return read_task(sys.argv[1])


@lru_cache
def read_task(path: str) -> Task:
    task = Task(**json.loads(Path(path).read_text()))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return task

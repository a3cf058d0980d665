"""What a test asks for, for the server, the clients and the simulator alike."""

import json

import numpy as np
import torch
from torch import nn

from distopt import from_config
from distopt.federated import (
    ClientData,
    ConstantDelays,
    DirichletPartition,
    LocalTraining,
    Participation,
    Simulation,
    UplinkCompression,
)

LOCAL = LocalTraining(steps=3, batch_size=8, lr=0.2)


def make_model(hidden=12):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 4))


def make_clients(num_clients):
    random = np.random.default_rng(5)
    labels = torch.from_numpy(random.integers(0, 4, size=40 * num_clients))
    inputs = torch.from_numpy(random.normal(size=(len(labels), 16)).astype(np.float32)) + labels[:, None]
    return ClientData.split((inputs, labels), DirichletPartition(alpha=1.0), num_clients, seed=1)


def evaluator(num_clients):
    inputs, labels = make_clients(num_clients).tensors

    def evaluate(model):
        return {"accuracy": float((model(inputs).argmax(1) == labels).double().mean())}

    return evaluate


class Job:
    """One of the jobs of a run: {"algorithm": {...}, "rounds": 5, "participation": {...}, "uplink": true}."""

    def __init__(self, told):
        self.algorithm = from_config(told["algorithm"])
        self.rounds = told.get("rounds", 5)
        drawn = told.get("participation")
        self.participation = None if drawn is None else Participation.from_dict(drawn)
        self.uplink = UplinkCompression(density=0.2) if told.get("uplink") else None

    def simulated(self, num_clients, seed=0):
        """The same job in one process: the simulation, which has run, and its last model's state."""
        simulation = Simulation(
            model=make_model(),
            clients=make_clients(num_clients),
            algorithm=self.algorithm,
            local=LOCAL,
            participation=self.participation,
            uplink=self.uplink,
            delays=ConstantDelays(mean_s=1e-3) if hasattr(self.algorithm, "max_staleness") else None,
            evaluate=evaluator(num_clients),
            seed=seed,
            mode="loop",
        )
        simulation.run(self.rounds)
        return simulation


def read(context):
    """What the test said, from the run's configuration."""
    return json.loads(context.run_config["job"])

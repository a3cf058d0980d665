"""Server and sites over queues in one process: the simulation's history and model to the bit, and what is refused."""

import threading

import numpy as np
import pytest
import torch
from test_algorithm_laws import NOISELESS
from torch import nn

from distopt.comm import InProcess
from distopt.federated import (
    Bernoulli,
    ClientData,
    DirichletPartition,
    LocalTraining,
    Service,
    Simulation,
    Synchronous,
    UplinkCompression,
    take_part,
)

CLIENTS, SITES, ROUNDS = 12, 3, 4
_rng = np.random.default_rng(0)
INPUTS = torch.from_numpy(_rng.standard_normal((200, 6)))
LABELS = (INPUTS[:, 0] > 0).long() + (INPUTS[:, 1] > 0).long()
WAITING = {name: each for name, each in NOISELESS.items() if each.pacing == Synchronous()}


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


def data():
    parts = DirichletPartition(alpha=0.3, min_samples=0).split(LABELS.numpy(), CLIENTS - 1, 1)
    return ClientData((INPUTS, LABELS), [*parts, np.empty(0, dtype=np.int64)])  # one has nothing


def evaluate(model):
    return {"accuracy": (model(INPUTS).argmax(1) == LABELS).double().mean()}


def settings(algorithm, **changed):
    return {
        "model": build(),
        "clients": data(),
        "algorithm": algorithm,
        "local": LocalTraining(steps=3, batch_size=8, lr=0.1, max_norm=5.0),
        "participation": Bernoulli(probability=0.6),
        "evaluate": evaluate,
        "seed": 5,
        **changed,
    }


class Sites:
    """Threads that take part, and what became of each."""

    def __init__(self, ends, changed):
        self.found = {}
        self.threads = []
        for end in ends:  # models are built here: threads share torch's random numbers
            own = {"model": build(), "clients": data(), "transport": end, **changed.get(end.rank, {})}
            thread = threading.Thread(target=self._run, args=(end.rank, own), daemon=True)
            self.threads.append(thread)

    def start(self):
        for thread in self.threads:
            thread.start()

    def _run(self, rank, own):
        try:
            self.found[rank] = take_part(**own)
        except Exception as error:
            self.found[rank] = error

    def join(self):
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()
        return self.found


def served(algorithm, rounds=ROUNDS, *, sites=SITES, site=None, **changed):
    server, *ends = InProcess.connect(1 + sites)
    took = Sites(ends, site or {})
    made = settings(algorithm, **changed)
    took.start()
    with Service(**made, transport=server, wait_s=20.0) as service:
        history = service.run(rounds)
    return made["model"], history, took.join()


def vector(model):
    return torch.cat([t.detach().reshape(-1) for t in model.state_dict().values() if t.is_floating_point()])


@pytest.mark.parametrize("uplink", [None, UplinkCompression(density=0.3)], ids=["whole", "compressed"])
@pytest.mark.parametrize("name", WAITING)
def test_it_is_the_simulation_to_the_bit(name, uplink):
    algorithm = WAITING[name]
    model, history, found = served(algorithm, uplink=uplink)
    made = settings(algorithm, uplink=uplink)
    simulated = Simulation(**made, mode="loop").run(ROUNDS)
    assert history == simulated
    assert torch.equal(vector(model), vector(made["model"]))
    assert [found[rank].hosts for rank in (1, 2, 3)] == [(0, 3, 6, 9), (1, 4, 7, 10), (2, 5, 8, 11)]
    assert sum(each.replies for each in found.values()) == sum(len(row["participants"]) for row in history)

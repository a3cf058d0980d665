"""What ranks run for `test_sharded.py`: the same jobs as one process."""

import numpy as np
import torch
from torch import nn

from distopt.federated import (
    Bernoulli,
    ClientData,
    DirichletPartition,
    ExponentialDelays,
    FederatedAlgorithm,
    LocalTraining,
    Simulation,
    Synchronous,
)

CLIENTS = 12
_rng = np.random.default_rng(0)
INPUTS = torch.from_numpy(_rng.standard_normal((200, 6)))
LABELS = (INPUTS[:, 0] > 0).long() + (INPUTS[:, 1] > 0).long()


def evaluate(model):
    return {"accuracy": (model(INPUTS).argmax(1) == LABELS).double().mean()}


def job(algorithm, mode, **changed):
    torch.manual_seed(0)
    parts = DirichletPartition(alpha=0.3, min_samples=0).split(LABELS.numpy(), CLIENTS - 1, 1)
    settings = {
        "model": nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double(),
        "clients": ClientData((INPUTS, LABELS), [*parts, np.empty(0, dtype=np.int64)]),  # one has nothing
        "algorithm": algorithm,
        "local": LocalTraining(steps=3, batch_size=8, lr=0.1, max_norm=5.0),
        "participation": Bernoulli(probability=0.8),
        "delays": None if algorithm.pacing == Synchronous() else ExponentialDelays(),
        "evaluate": evaluate,
        "seed": 5,
        "mode": mode,
    }
    return Simulation(**{**settings, **changed})


def trained(described, mode, num_rounds, **changed):
    """The model after each round, and the history."""
    made = job(FederatedAlgorithm.from_dict(described), mode, **changed)
    models = []
    for number in range(1, num_rounds + 1):
        made.run(number)
        models.append(made.layout.read(made.model))
    return torch.stack(models), made.history.rows


def all_trained(listed, mode, num_rounds, **changed):
    return [trained(each, mode, num_rounds, **changed) for each in listed]


def private(described, num_rounds):
    """The same of a private algorithm, everybody taking part; on one process "auto" is that process."""
    torch.manual_seed(0)
    settings = {
        "model": nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(),
        "clients": ClientData((INPUTS, LABELS), [np.arange(50 * i, 50 * i + 50) for i in range(4)]),
        "algorithm": FederatedAlgorithm.from_dict(described),
        "evaluate": evaluate,
    }
    made = Simulation(**settings)
    models = []
    for number in range(1, num_rounds + 1):
        made.run(number)
        models.append(made.layout.read(made.model))
    return torch.stack(models), made.history.rows


def resumed(described, path, num_rounds):
    """Stopped in the middle, begun again from the file."""
    algorithm = FederatedAlgorithm.from_dict(described)
    first = job(algorithm, "sharded", checkpoint=path, checkpoint_every=2)
    first.run(num_rounds // 2)
    torch.distributed.barrier()
    second = job(algorithm, "sharded", checkpoint=path)
    assert second.resume()
    second.run(num_rounds)
    return second.layout.read(second.model), second.history.rows


def failing(when):
    """A rank whose loss fails, at once or in the first round."""
    fails = [when == "at once"]

    def loss(model, batch):
        if fails[0] and torch.distributed.get_rank() == 1:
            raise ZeroDivisionError("of rank 1")
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    try:
        made = job(FederatedAlgorithm.from_dict({"algorithm": "fedavg"}), "sharded", loss=loss)
        fails[0] = True
        made.run(1)
    except Exception as error:
        return str(error)
    return None


def failing_to_evaluate():
    """Only the first rank evaluates."""
    calls = []

    def fails(model):
        calls.append(torch.distributed.get_rank())
        raise ZeroDivisionError("while evaluating")

    try:
        job(FederatedAlgorithm.from_dict({"algorithm": "fedavg"}), "sharded", evaluate=fails).run(1)
    except Exception as error:
        return calls, str(error)
    return calls, None


def different(what, folder):
    """What is not the same on all ranks is said by each."""
    rank = torch.distributed.get_rank()
    algorithm = FederatedAlgorithm.from_dict({"algorithm": "fedavg"})
    changed = {"seed": rank} if what == "seed" else {}
    if what == "model":
        changed = {"model": nn.Linear(6, 3).double()}
        nn.init.constant_(changed["model"].weight, rank)
    if what == "checkpoint":
        changed = {"checkpoint": folder / f"{rank}.pt"}
        (folder / "0.pt").write_bytes(b"")
    try:
        job(algorithm, "sharded", **changed).resume()
    except Exception as error:
        return str(error)
    return None

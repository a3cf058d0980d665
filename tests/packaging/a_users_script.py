"""A user's script: mypy must find nothing here. A script with mistakes lies beside it in the test."""

import torch
from torch import nn

import distopt
from distopt import federated


def train(model: nn.Module, data: torch.Tensor, targets: torch.Tensor) -> int:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with distopt.DGC(density=1e-3).attach(model, optimizer) as attachment:
        torch.autograd.backward(nn.functional.cross_entropy(model(data), targets))
        optimizer.step()
        distopt.checkpoint.save(attachment, "checkpoints/1")
        sent: int = attachment.stats()["bytes_sent"]
    return sent


def simulate(images: torch.Tensor, labels: torch.Tensor) -> float:
    clients = federated.ClientData.split((images, labels), federated.IIDPartition(), num_clients=2)
    simulation = federated.Simulation(model=nn.Linear(4, 2), clients=clients, algorithm=federated.FedAU(cutoff=50))
    history: federated.History = simulation.run(1)
    accuracy: float = history.last("accuracy")
    return accuracy


gossip: distopt.Gossip = distopt.Gossip(topology="ring")
code: distopt.coding.Code = distopt.coding.cyclic(5, 2, seed=0)

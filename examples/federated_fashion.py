"""Federated training of 100 clients that have few labels each, one in ten of whom takes part in a round.

    python examples/federated_fashion.py [ROUNDS]

Who has usual labels takes part more often; FedAU makes up for that, FedAvg would not. The data are Fashion-MNIST where
Debian's package dataset-fashion-mnist is installed, else scikit-learn's digits. Leaves federated_fashion.png.
"""

import sys

import torch
from torch import nn

from distopt import federated
from distopt.cli.datasets import load

rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 300
data = load(None)  # the best that is installed
images, labels = data.train_images.flatten(1), data.train_labels


def evaluate(model):
    return {"accuracy": (model(data.test_images.flatten(1)).argmax(1) == data.test_labels).double().mean()}


torch.manual_seed(0)
clients = federated.ClientData.split((images, labels), federated.DirichletPartition(alpha=0.1), num_clients=100)
chances = federated.correlated_probabilities(federated.label_distributions(clients.parts, labels), mean=0.1)
history = federated.Simulation(
    model=nn.Sequential(nn.Linear(images.shape[1], 64), nn.ReLU(), nn.Linear(64, 10)),
    clients=clients,
    algorithm=federated.FedAU(cutoff=50),
    local=federated.LocalTraining(steps=5, batch_size=16, lr=0.1),
    participation=federated.Bernoulli(probability=tuple(chances)),
    evaluate=evaluate,
    evaluate_every=10,
    progress=federated.ProgressBar(rounds),
).run(rounds)
megabytes = history.total_bytes() / 1e6
print(f"test accuracy {history.last('accuracy'):.2%} after {rounds} rounds, {megabytes:.0f} MB sent down and up")
history.plot("federated_fashion.png")

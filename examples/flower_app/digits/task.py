"""What is trained on what; server, clients and a simulation without Flower make the same of the same numbers.

It is the job of examples/federated_torchrun.py on scikit-learn's digits: 100 clients with few of the ten digits each,
of which those with usual digits take part more often.
"""

import hashlib
from functools import cache

import torch
from torch import nn

from distopt import federated
from distopt.cli.datasets import load

LOCAL = federated.LocalTraining(steps=5, batch_size=16, lr=0.1)


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


@cache
def make_clients(num_clients):
    """Who has which samples. Every process here makes them all; a real client would have its own and nobody else's."""
    data = load("digits")
    partition = federated.DirichletPartition(alpha=0.1)
    return federated.ClientData.split((data.train_images.flatten(1), data.train_labels), partition, num_clients)


def data_of(client, num_clients):
    clients = make_clients(num_clients)
    return clients.batch(clients.parts[client])


def make_participation(num_clients):
    clients = make_clients(num_clients)
    distributions = federated.label_distributions(clients.parts, clients.tensors[1])
    chances = federated.correlated_probabilities(distributions, mean=0.1)
    return federated.Bernoulli(probability=tuple(chances))


@torch.no_grad()
def evaluate(model):
    data = load("digits")
    model.eval()
    return {"accuracy": (model(data.test_images.flatten(1)).argmax(1) == data.test_labels).double().mean().item()}


def result(history, model):
    """In a line, with a digest of the trained parameters."""
    bits = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy().tobytes()
    digest = hashlib.sha256(bits).hexdigest()[:16]
    return f"test accuracy {history.last('accuracy'):.4%} after {len(history)} rounds, model {digest}"

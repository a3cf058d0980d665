"""What is trained on what; server, clients and a simulation without Flower make the same of the same numbers."""

from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import nn

from distopt import federated

NUM_TRAIN = 1500
LOCAL = federated.LocalTraining(steps=5, batch_size=16, lr=0.3)


@cache
def images_and_labels():
    pixels, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    return pixels.float() / 16, labels


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def make_clients(num_clients):
    """Who has which of the first samples. Real clients would have their own and nobody else's."""
    images, labels = images_and_labels()
    partition = federated.DirichletPartition(alpha=0.3)
    return federated.ClientData.split((images[:NUM_TRAIN], labels[:NUM_TRAIN]), partition, num_clients)


def data_of(client, num_clients):
    clients = make_clients(num_clients)
    return clients.batch(clients.parts[client])


@torch.no_grad()
def evaluate(model):
    images, labels = images_and_labels()
    model.eval()
    return {"accuracy": (model(images[NUM_TRAIN:]).argmax(1) == labels[NUM_TRAIN:]).double().mean().item()}

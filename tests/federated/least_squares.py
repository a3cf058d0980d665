"""A job small enough to follow by hand: clients with a linear model, each with least squares of its own, in float64."""

import numpy as np
import torch
from torch import nn

from distopt.federated import Client, Layout, Server

NUM_CLIENTS = 5
NUM_VALUES = 4
NUM_SAMPLES = (30, 10, 25, 5, 40)
NUM_STEPS = (2, 3, 1, 4, 2)
LR = 0.05
START = np.array([0.5, -1.0, 0.25, 2.0])

# Three of five, one, nobody, then again and again; the last rounds are of all.
PARTIAL = ((0, 1, 2), (3,), (), (1, 4), (0, 2, 3), (), (0, 1, 2, 3, 4), (2, 4), (1,), (0, 1, 4))
FULL = ((0, 1, 2, 3, 4),) * 6

_random = np.random.default_rng(7)
INPUTS = _random.normal(size=(NUM_CLIENTS, max(NUM_STEPS), 6, NUM_VALUES))  # by client and local step
TARGETS = _random.normal(size=(NUM_CLIENTS, max(NUM_STEPS), 6)) + np.arange(NUM_CLIENTS)[:, None, None]


def gradient(client, step, w):
    """Of the mean squared error of one minibatch."""
    inputs, targets = INPUTS[client, step], TARGETS[client, step]
    return 2 / len(targets) * inputs.T @ (inputs @ w - targets)


def linear():
    model = nn.Linear(NUM_VALUES, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(START))
    return model


def mean_squared_error(model, batch):
    inputs, targets = batch
    return (model(inputs).squeeze(-1) - targets).square().mean()


def batches_of(client, num_steps):
    return [
        (torch.from_numpy(INPUTS[client, k]), torch.from_numpy(TARGETS[client, k])) for k in range(num_steps[client])
    ]


def make_sgd(parameters):
    return torch.optim.SGD(parameters, lr=LR)


class Job:
    """`Server` and `Client` of one algorithm, and what its clients keep."""

    def __init__(self, algorithm, *, num_steps=NUM_STEPS, num_samples=NUM_SAMPLES, max_norm=None):
        self.model = linear()
        self.layout = Layout(self.model)
        self.server = Server(algorithm, self.layout.num_trained)
        self.client = Client(algorithm=algorithm, loss=mean_squared_error, optimizer=make_sgd, max_norm=max_norm)
        self.num_steps, self.num_samples = num_steps, num_samples
        self.state = self.server.begin(self.layout.read(self.model), NUM_CLIENTS)
        self.broadcast = self.server.broadcast(self.state)
        self.kept = {}

    def reply(self, client):
        self.kept[client], reply = self.client.step(
            self.model,
            self.layout,
            self.kept.get(client, {}),
            self.broadcast,
            batches_of(client, self.num_steps),
            client=client,
            num_samples=self.num_samples[client],
            samples=lambda: batches_of(client, self.num_steps),
        )
        return reply

    def round(self, clients):
        self.state, self.broadcast = self.server.step(self.state, [self.reply(client) for client in clients])
        return self.state.model.numpy()

    def run(self, rounds):
        """(rounds, d), the model after each."""
        return np.stack([self.round(clients) for clients in rounds])

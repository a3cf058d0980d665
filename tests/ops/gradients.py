"""Gradients of a real model, recorded while it trains: the demo's multi-layer perceptron on scikit-learn's digits."""

from functools import cache

import torch
from torch import Tensor

from distopt.cli.datasets import load
from distopt.cli.models import MLP


@cache
def recorded(steps: int = 20, seed: int = 0) -> tuple[list[list[Tensor]], list[int]]:
    """Per step the flat gradient of each parameter, and the parameters' sizes."""
    torch.manual_seed(seed)
    data = load("digits")
    model = MLP().build(data.shape, data.num_classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for step in range(steps):
        batch = slice(32 * step, 32 * (step + 1))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(data.train_images[batch]), data.train_labels[batch]).backward()
        found.append([p.grad.detach().reshape(-1).clone() for p in model.parameters()])
        optimizer.step()
    return found, [p.numel() for p in model.parameters()]

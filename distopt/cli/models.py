"""The small models that the comparison trains: a convolutional net and a multi-layer perceptron."""

from collections.abc import Callable

import torch
from torch import nn


def cnn(shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Two 3x3 convolutions (16 and 32 channels) with pooling, a hidden layer of 128; 206,922 parameters at 28x28."""
    channels, height, width = shape
    model = nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (height // 4) * (width // 4), 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )
    # Twice as fast as the default layout on a CPU core.
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def mlp(shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Two hidden layers of 256 and 128; 235,146 parameters at 28x28."""
    channels, height, width = shape
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * height * width, 256),
        nn.ReLU(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )


MODELS: dict[str, Callable[[tuple[int, int, int], int], nn.Module]] = {"cnn": cnn, "mlp": mlp}

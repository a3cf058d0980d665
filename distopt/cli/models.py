"""The small image models that commands train: a convolutional net, a multi-layer perceptron, a softmax regression.

Each is a configuration, written `{"model": "mlp", "hidden": [64]}`, that builds itself for images of any size.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from distopt.config import Configurable, check_choice
from distopt.errors import ConfigError

Shape = tuple[int, int, int]  # channels, height, width


class Model(Configurable, tag="model"):
    """Base of the models."""

    @abstractmethod
    def build(self, shape: Shape, num_classes: int) -> nn.Module:
        """A new one, from images (batch, *shape) to logits (batch, num_classes), drawn from torch's generator."""


@dataclass(frozen=True, kw_only=True)
class CNN(Model, name="cnn"):
    """Two 3x3 convolutions (16 and 32 channels) with pooling, a hidden layer of 128; 206,922 parameters at 28x28.

    Raises:
        ConfigError: A value breaks its rule.
    """

    norm: str = "none"  # "group": 4 groups per convolution; unlike batch statistics these fit any split of the data

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, ("none", "group"))

    def build(self, shape: Shape, num_classes: int) -> nn.Module:
        """See `Model.build`."""
        channels, height, width = shape
        model = nn.Sequential(
            *self._convolution(channels, 16),
            *self._convolution(16, 32),
            nn.Flatten(),
            nn.Linear(32 * (height // 4) * (width // 4), 128),
            nn.ReLU(),
            nn.Linear(128, num_classes),
        )
        # Twice as fast as the default layout on a CPU core.
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def _convolution(self, channels: int, made: int) -> list[nn.Module]:
        norm = [nn.GroupNorm(4, made)] if self.norm == "group" else []
        return [nn.Conv2d(channels, made, 3, padding=1), *norm, nn.MaxPool2d(2), nn.ReLU()]


@dataclass(frozen=True, kw_only=True)
class MLP(Model, name="mlp"):
    """Hidden layers with ReLU; 235,146 parameters at 28x28 as it comes.

    Raises:
        ConfigError: A value breaks its rule.
    """

    hidden: tuple[int, ...] = (256, 128)  # widths: wider learns more and sends more

    def __post_init__(self) -> None:
        widths = self.hidden
        if not isinstance(widths, tuple) or not all(type(width) is int and width >= 1 for width in widths):
            raise ConfigError(f"hidden must be widths of at least 1, got {widths!r}; use (256, 128), or () for none")

    def build(self, shape: Shape, num_classes: int) -> nn.Module:
        """See `Model.build`."""
        channels, height, width = shape
        layers: list[nn.Module] = [nn.Flatten()]
        previous = channels * height * width
        for size in self.hidden:
            layers += [nn.Linear(previous, size), nn.ReLU()]
            previous = size
        return nn.Sequential(*layers, nn.Linear(previous, num_classes))


@dataclass(frozen=True, kw_only=True)
class Softmax(Model, name="softmax"):
    """Softmax regression, a convex problem without norm; 7,850 parameters at 28x28.

    Raises:
        ConfigError: A value breaks its rule.
    """

    norm: str = "none"  # "batch": BatchNorm of the logits, whose statistics are averaged too unless they are excluded

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, ("none", "batch"))

    def build(self, shape: Shape, num_classes: int) -> nn.Module:
        """See `Model.build`."""
        channels, height, width = shape
        norm = [nn.BatchNorm1d(num_classes)] if self.norm == "batch" else []
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, num_classes), *norm)

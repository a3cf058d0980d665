"""How long clients take: models that a virtual clock asks for each work of a client."""

from distopt.federated.delays.base import DelayProcess, Delays
from distopt.federated.delays.laws import (
    ConstantDelays,
    ExponentialDelays,
    HeavyTailedDelays,
    UniformDelays,
)
from distopt.federated.delays.traced import TracedDelays

__all__ = [
    "ConstantDelays",
    "DelayProcess",
    "Delays",
    "ExponentialDelays",
    "HeavyTailedDelays",
    "TracedDelays",
    "UniformDelays",
]

"""distopt: train over a slow, uneven or unreliable network as if it were a fast one.

A plugin for stock PyTorch: keep the model, the optimizer and the loop, and add one line::

    distopt.DGC(density=1e-3).attach(ddp_model, optimizer)
"""

from distopt import batch, checkpoint, coding, ddp, federated, gossip, local, observe, ops
from distopt.batch import AdaptiveBatch
from distopt.coding import GradientCoding
from distopt.ddp import DGC, Dense, TopK
from distopt.errors import (
    CompatibilityError,
    ConfigError,
    DecodeError,
    DesyncError,
    DistoptError,
    NonFiniteGradientError,
    PeerLostError,
    StateMismatchError,
)
from distopt.gossip import Gossip
from distopt.job import Job, from_config
from distopt.local import DiLoCo, SparseLoCo
from distopt.version import __version__

__all__ = [
    "DGC",
    "AdaptiveBatch",
    "CompatibilityError",
    "ConfigError",
    "DecodeError",
    "Dense",
    "DesyncError",
    "DiLoCo",
    "DistoptError",
    "Gossip",
    "GradientCoding",
    "Job",
    "NonFiniteGradientError",
    "PeerLostError",
    "SparseLoCo",
    "StateMismatchError",
    "TopK",
    "__version__",
    "batch",
    "checkpoint",
    "coding",
    "ddp",
    "federated",
    "from_config",
    "gossip",
    "local",
    "observe",
    "ops",
]

"""What ranks make of their own and of others' parameters in an exchange."""

from distopt.gossip.mixing.a2cid2 import A2CiD2
from distopt.gossip.mixing.choco import Choco
from distopt.gossip.mixing.dpsgd import DPSGD
from distopt.gossip.mixing.gradient_tracking import GradientTracking
from distopt.gossip.mixing.mixer import Mixer
from distopt.gossip.mixing.noloco import NoLoCo
from distopt.gossip.mixing.push_sum import PushSum
from distopt.gossip.mixing.quasi_global import QuasiGlobalMomentum
from distopt.gossip.mixing.rule import Mixing, Surroundings

__all__ = [
    "DPSGD",
    "A2CiD2",
    "Choco",
    "GradientTracking",
    "Mixer",
    "Mixing",
    "NoLoCo",
    "PushSum",
    "QuasiGlobalMomentum",
    "Surroundings",
]

"""Gradient coding: an exact gradient step that does not wait for the slowest ranks."""

from distopt.coding.approximate import ApproximateCode, approximate, expander, least_squares, random_regular
from distopt.coding.code import CODES, Code
from distopt.coding.combine import combine
from distopt.coding.cyclic import CyclicCode, cyclic, cyclic_mds
from distopt.coding.heterogeneous import HeterogeneousCode, heterogeneous
from distopt.coding.parity import Disagreement, disagreement, fingerprint
from distopt.coding.placement import placement
from distopt.coding.repetition import RepetitionCode, binary, fractional

__all__ = [
    "CODES",
    "ApproximateCode",
    "Code",
    "CyclicCode",
    "Disagreement",
    "HeterogeneousCode",
    "RepetitionCode",
    "approximate",
    "binary",
    "combine",
    "cyclic",
    "cyclic_mds",
    "disagreement",
    "expander",
    "fingerprint",
    "fractional",
    "heterogeneous",
    "least_squares",
    "placement",
    "random_regular",
]

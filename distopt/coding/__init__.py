"""Gradient coding: an exact gradient step that does not wait for the slowest ranks."""

from distopt.coding.approximate import ApproximateCode, approximate, expander, least_squares, random_regular
from distopt.coding.code import CODES, Code
from distopt.coding.combine import combine
from distopt.coding.cyclic import CyclicCode, cyclic, cyclic_mds
from distopt.coding.heterogeneous import HeterogeneousCode, heterogeneous
from distopt.coding.one_round import OneRound, Uncoded
from distopt.coding.placement import placement
from distopt.coding.repetition import RepetitionCode, binary, fractional
from distopt.coding.scheme import Part, Run, Scheme, Task
from distopt.coding.stragglers import Arbitrary, Bursty, Limits, PerRound, StragglerModel

__all__ = [
    "CODES",
    "ApproximateCode",
    "Arbitrary",
    "Bursty",
    "Code",
    "CyclicCode",
    "HeterogeneousCode",
    "Limits",
    "OneRound",
    "Part",
    "PerRound",
    "RepetitionCode",
    "Run",
    "Scheme",
    "StragglerModel",
    "Task",
    "Uncoded",
    "approximate",
    "binary",
    "combine",
    "cyclic",
    "cyclic_mds",
    "expander",
    "fractional",
    "heterogeneous",
    "least_squares",
    "placement",
    "random_regular",
]

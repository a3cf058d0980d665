"""Gradient coding: an exact gradient step that does not wait for the slowest ranks."""

from distopt.coding.code import CODES, Code
from distopt.coding.one_round import OneRound, Uncoded
from distopt.coding.repetition import RepetitionCode, binary, fractional
from distopt.coding.scheme import Part, Run, Scheme, Task
from distopt.coding.stragglers import Arbitrary, Bursty, Limits, PerRound, StragglerModel

__all__ = [
    "CODES",
    "Arbitrary",
    "Bursty",
    "Code",
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
    "binary",
    "fractional",
]

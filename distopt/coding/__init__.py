"""Gradient coding: an exact gradient step that does not wait for the slowest ranks."""

from distopt.coding.code import CODES, Code
from distopt.coding.msgc import MSGC
from distopt.coding.one_round import OneRound, Uncoded
from distopt.coding.repetition import RepetitionCode, binary, fractional
from distopt.coding.scheme import Part, Run, Scheme, Task
from distopt.coding.sequential import SequentialCode
from distopt.coding.srsgc import SRSGC
from distopt.coding.stragglers import Arbitrary, Bursty, Limits, PerRound, StragglerModel

__all__ = [
    "CODES",
    "MSGC",
    "SRSGC",
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
    "SequentialCode",
    "StragglerModel",
    "Task",
    "Uncoded",
    "binary",
    "fractional",
]

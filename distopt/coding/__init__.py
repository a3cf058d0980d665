"""Gradient coding: an exact gradient step that does not wait for the slowest ranks."""

from distopt.coding.one_round import OneRound, Uncoded
from distopt.coding.scheme import Part, Run, Scheme, Task

__all__ = ["OneRound", "Part", "Run", "Scheme", "Task", "Uncoded"]

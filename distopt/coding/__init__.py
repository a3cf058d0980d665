"""Gradient coding: an exact gradient step that does not wait for the slowest ranks."""

from distopt.coding.code import CODES, Code
from distopt.coding.combine import combine
from distopt.coding.repetition import RepetitionCode, binary, fractional

__all__ = ["CODES", "Code", "RepetitionCode", "binary", "combine", "fractional"]

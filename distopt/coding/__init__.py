"""Gradient coding: an exact gradient step that does not wait for the slowest ranks."""

from distopt.coding.approximate import ApproximateCode, approximate, expander, least_squares, random_regular
from distopt.coding.attachment import CodedTraining
from distopt.coding.code import CODES, Code
from distopt.coding.combine import combine
from distopt.coding.configuration import GradientCoding
from distopt.coding.cyclic import CyclicCode, cyclic, cyclic_mds
from distopt.coding.data_parts import Batches, DataPart
from distopt.coding.heterogeneous import HeterogeneousCode, heterogeneous
from distopt.coding.msgc import MSGC
from distopt.coding.one_round import OneRound, Uncoded
from distopt.coding.parity import Disagreement, disagreement, fingerprint
from distopt.coding.placement import placement
from distopt.coding.planning import FAMILIES, Candidate, plan
from distopt.coding.repetition import RepetitionCode, binary, fractional
from distopt.coding.scheme import Run, Scheme, Task, Term
from distopt.coding.sequential import SequentialCode
from distopt.coding.simulation import Simulated, replay, simulate
from distopt.coding.srsgc import SRSGC
from distopt.coding.stopping import STOP_RULES, Decodable, Minimal, Paper, StopRule, stop_rule
from distopt.coding.stragglers import Arbitrary, Bursty, Limits, PerRound, StragglerModel
from distopt.coding.synthetic import Cluster
from distopt.coding.trace import Trace

__all__ = [
    "CODES",
    "FAMILIES",
    "MSGC",
    "SRSGC",
    "STOP_RULES",
    "ApproximateCode",
    "Arbitrary",
    "Batches",
    "Bursty",
    "Candidate",
    "Cluster",
    "Code",
    "CodedTraining",
    "CyclicCode",
    "DataPart",
    "Decodable",
    "Disagreement",
    "GradientCoding",
    "HeterogeneousCode",
    "Limits",
    "Minimal",
    "OneRound",
    "Paper",
    "PerRound",
    "RepetitionCode",
    "Run",
    "Scheme",
    "SequentialCode",
    "Simulated",
    "StopRule",
    "StragglerModel",
    "Task",
    "Term",
    "Trace",
    "Uncoded",
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
    "plan",
    "random_regular",
    "replay",
    "simulate",
    "stop_rule",
]

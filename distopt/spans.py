"""Spans that torch.profiler shows, named by family and phase: `distopt::ddp::select`.

Without a profiler a span costs some microseconds: docs/observability.md.
"""

from torch.profiler import record_function

PHASES = {
    "ddp": ("agree", "select", "launch", "exchange", "decode"),
    "coding": ("round", "gradient", "decode"),
    "gossip": ("exchange", "transfer", "average", "wait"),
    "local": ("select", "exchange", "wait", "apply"),
    "federated": ("train", "wait", "aggregate", "evaluate"),
    "batch": ("test",),
}


def name_of(family: str, phase: str) -> str:
    """What a profile calls a phase of a family."""
    assert phase in PHASES[family], f"{phase} is to be listed in PHASES"
    return f"distopt::{family}::{phase}"


def span(family: str, phase: str) -> record_function:
    """A context manager around a phase, for one use."""
    return record_function(name_of(family, phase))

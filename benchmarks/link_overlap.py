"""How much of an exchange the backward pass hides, from the spans of torch.profiler.

An exchange is under way while a collective runs (gloo's own spans) or a bucket is exchanged by a thread of its own
(`distopt::ddp::exchange`). Backward computes while the autograd engine evaluates a node other than AccumulateGrad,
where DDP copies gradients and calls the communication hook. The overlapped fraction is the part of the first during
which the second goes on.
"""

from collections.abc import Callable, Iterable
from typing import Any

Interval = tuple[float, float]  # begin and end, in microseconds

_NODE = "autograd::engine::evaluate_function"
_EXCHANGES = ("gloo:", "distopt::ddp::exchange")
_SPANS = ("distopt::", "gloo:")


def overlap(events: Iterable[Any]) -> dict[str, Any]:
    """The overlapped fraction and the time of each span, ms, summed over the events (torch.profiler's)."""
    events = list(events)
    computing = _intervals(events, lambda name: name.startswith(_NODE) and "AccumulateGrad" not in name)
    exchanging = _intervals(events, lambda name: name.startswith(_EXCHANGES))
    hidden = _length(_both(exchanging, computing))
    spans: dict[str, float] = {}
    for event in events:
        if event.name.startswith(_SPANS):
            spans[event.name] = spans.get(event.name, 0.0) + (event.time_range.end - event.time_range.start) / 1e3
    total = _length(exchanging)
    return {
        "exchange_ms": total / 1e3,
        "hidden_ms": hidden / 1e3,
        "overlapped_fraction": hidden / total if total else 0.0,
        "backward_ms": _length(computing) / 1e3,
        "spans_ms": dict(sorted(spans.items())),
    }


def _intervals(events: Iterable[Any], wanted: Callable[[str], bool]) -> list[Interval]:
    """The union of the events with a wanted name, as disjoint intervals in order."""
    return _union((event.time_range.start, event.time_range.end) for event in events if wanted(event.name))


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def _both(first: list[Interval], second: list[Interval]) -> list[Interval]:
    pairs = ((max(a, c), min(b, d)) for a, b in first for c, d in second)
    return _union((begin, end) for begin, end in pairs if begin < end)


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)

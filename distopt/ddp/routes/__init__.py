"""The ways in which selected entries reach the other ranks: a function each, with one signature."""

from collections.abc import Callable

from distopt.comm import Channels
from distopt.ddp.inflight import InFlight
from distopt.ddp.routes import allgather, balanced, hierarchical
from distopt.ddp.statistics import Statistics

Route = Callable[[InFlight, Channels, Statistics, Callable[[InFlight, Exception | None], None]], None]

# "whole" and "dense" have nothing, or nothing but a status, to gather.
ROUTES: dict[str, Route] = {
    "whole": allgather.send,
    "dense": allgather.send,
    "allgather": allgather.send,
    "balanced": balanced.send,
    "hierarchical": hierarchical.send,
}

__all__ = ["ROUTES", "Route"]

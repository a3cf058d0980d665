"""Who gets it: collectives on fixed-size tensors, and agreement between ranks without pickling anything."""

from distopt.comm.agreement import gather_json, raise_together
from distopt.comm.collectives import all_gather, all_reduce_sum
from distopt.comm.heartbeat import Heartbeat
from distopt.comm.rollcall import open_heartbeat
from distopt.comm.shutdown import await_at_exit

__all__ = [
    "Heartbeat",
    "all_gather",
    "all_reduce_sum",
    "await_at_exit",
    "gather_json",
    "open_heartbeat",
    "raise_together",
]

"""Who gets it: collectives on fixed-size tensors, messages between roles, groups of ranks; nothing is unpickled."""

from distopt.comm.abandon import end_when_stuck, leak_process_groups
from distopt.comm.address import Address, own_address, parse_address
from distopt.comm.agreement import agree, gather_json, raise_together
from distopt.comm.channels import Channels, open_channels
from distopt.comm.collectives import all_gather, all_reduce_sum, all_to_all, broadcast_from_first, reduce_to_first
from distopt.comm.gloo import GlooTransport
from distopt.comm.heartbeat import Heartbeat
from distopt.comm.in_process import InProcess
from distopt.comm.job import Job, find_job
from distopt.comm.lifetime import KeptUntilDone
from distopt.comm.link import Link, LinkModel, measure_link
from distopt.comm.message import Message, TensorSpec, frame_bytes
from distopt.comm.mpi import MPITransport
from distopt.comm.mpi_runtime import load_mpi
from distopt.comm.nodes import Nodes, Place, find_nodes
from distopt.comm.rollcall import open_heartbeat
from distopt.comm.sealed import Sealed
from distopt.comm.secret import agree_on_secret, read_secret
from distopt.comm.serial import SerialWorker
from distopt.comm.shutdown import await_at_exit, end_quietly
from distopt.comm.stopwatch import least_seconds
from distopt.comm.tcp import TCPPeer, TCPServer
from distopt.comm.transport import ReturningTransport, Transport

__all__ = [
    "Address",
    "Channels",
    "GlooTransport",
    "Heartbeat",
    "InProcess",
    "Job",
    "KeptUntilDone",
    "Link",
    "LinkModel",
    "MPITransport",
    "Message",
    "Nodes",
    "Place",
    "ReturningTransport",
    "Sealed",
    "SerialWorker",
    "TCPPeer",
    "TCPServer",
    "TensorSpec",
    "Transport",
    "agree",
    "agree_on_secret",
    "all_gather",
    "all_reduce_sum",
    "all_to_all",
    "await_at_exit",
    "broadcast_from_first",
    "end_quietly",
    "end_when_stuck",
    "find_job",
    "find_nodes",
    "frame_bytes",
    "gather_json",
    "leak_process_groups",
    "least_seconds",
    "load_mpi",
    "measure_link",
    "open_channels",
    "open_heartbeat",
    "own_address",
    "parse_address",
    "raise_together",
    "read_secret",
    "reduce_to_first",
]

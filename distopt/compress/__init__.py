"""What goes on the wire: rounding, index formats, the payload's layout, and what it all costs on the link."""

from distopt.compress.cost import (
    allgather_bytes,
    allreduce_bytes,
    alltoall_bytes,
    balanced_shares,
    break_even_density,
    break_even_ranks,
)
from distopt.compress.indices import INDEX_FORMATS, IndexFormat
from distopt.compress.payload import Header, PayloadLayout
from distopt.compress.rounding import WIRE_DTYPES, round_to_wire

__all__ = [
    "INDEX_FORMATS",
    "WIRE_DTYPES",
    "Header",
    "IndexFormat",
    "PayloadLayout",
    "allgather_bytes",
    "allreduce_bytes",
    "alltoall_bytes",
    "balanced_shares",
    "break_even_density",
    "break_even_ranks",
    "round_to_wire",
]

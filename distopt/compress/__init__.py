"""What goes on the wire: rounding, formats of positions and values, layouts of payloads, and what it costs."""

from distopt.compress.chunks import ChunkGroup, ChunkPayload, Chunks
from distopt.compress.cost import (
    allgather_bytes,
    allreduce_bytes,
    alltoall_bytes,
    balanced_shares,
    break_even_density,
    break_even_ranks,
)
from distopt.compress.formats import INDEX_FORMATS, VALUE_FORMATS
from distopt.compress.indices import IndexFormat
from distopt.compress.payload import Header, PayloadLayout
from distopt.compress.rounding import WIRE_DTYPES, round_to_wire
from distopt.compress.values import ValueFormat

__all__ = [
    "INDEX_FORMATS",
    "VALUE_FORMATS",
    "WIRE_DTYPES",
    "ChunkGroup",
    "ChunkPayload",
    "Chunks",
    "Header",
    "IndexFormat",
    "PayloadLayout",
    "ValueFormat",
    "allgather_bytes",
    "allreduce_bytes",
    "alltoall_bytes",
    "balanced_shares",
    "break_even_density",
    "break_even_ranks",
    "round_to_wire",
]

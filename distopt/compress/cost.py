"""What an exchange puts on the link, and whether sparse or dense is cheaper.

With density d, b bytes per sent entry, N ranks and M parameters, a ring all-reduce in fp32 sends 2 (N-1)/N 4 M bytes
per rank and an all-gather (N-1) d M b: their ratio is N d b / 8, so sparse stops paying at N = 8 / (d b) ranks.
"""


def allreduce_bytes(num_ranks: int, nbytes: int) -> int:
    """Bytes that each rank sends in a ring all-reduce of a tensor of `nbytes`."""
    return 2 * (num_ranks - 1) * nbytes // num_ranks


def allgather_bytes(num_ranks: int, nbytes: int) -> int:
    """Bytes that each rank sends in an all-gather to which it contributes `nbytes`."""
    return (num_ranks - 1) * nbytes


def sparse_is_cheaper(num_ranks: int, sparse_nbytes: int, dense_nbytes: int) -> bool:
    """Whether all-gathering `sparse_nbytes` per rank sends no more than all-reducing `dense_nbytes`."""
    return allgather_bytes(num_ranks, sparse_nbytes) <= allreduce_bytes(num_ranks, dense_nbytes)


def break_even_ranks(density: float, bytes_per_entry: float) -> float:
    """Number of ranks above which a dense fp32 ring all-reduce sends less: 8 / (d b)."""
    return 8.0 / (density * bytes_per_entry)

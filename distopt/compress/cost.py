"""What an exchange puts on the link, in bytes per rank, as formulas of sizes that everybody knows beforehand.

With density d, b bytes per sent entry, N ranks and M parameters, a ring all-reduce in fp32 sends 2 (N-1)/N 4 M bytes
per rank and an all-gather (N-1) d M b: their ratio is N d b / 8, so an all-gather stops paying at N = 8 / (d b) ranks.
The balanced exchange sends (N-1) (s + m) b with s = d M / N and m = 4 d M / N: about 5 d M b whatever N is.
"""

import math

ROOM = 4  # the owners send back this many times their share: the dropped rest waits, and with less too much waits


def allreduce_bytes(num_ranks: int, nbytes: int) -> int:
    """Bytes that each rank sends in a ring all-reduce of a tensor of `nbytes`."""
    return 2 * (num_ranks - 1) * nbytes // num_ranks


def allgather_bytes(num_ranks: int, nbytes: int) -> int:
    """Bytes that each rank sends in an all-gather to which it contributes `nbytes`."""
    return (num_ranks - 1) * nbytes


def alltoall_bytes(num_ranks: int, nbytes: int) -> int:
    """Bytes that each rank sends in an all-to-all with messages of `nbytes`; the one to itself does not travel."""
    return (num_ranks - 1) * nbytes


def balanced_shares(numel: int, count: int, num_ranks: int) -> tuple[int, int]:
    """Entries of one message in the two phases of the balanced exchange.

    Args:
        numel: Entries that are divided among the owners: owner j has j, j + N, j + 2 N, ...
        count: Entries that a rank selects in all, k.
        num_ranks: N.

    Returns:
        s = ceil(k / N), what a rank sends to each owner, and m = ceil(4 k / N), what an owner sends to all; neither
        more than every owner has. 0 and 0 if some owner has nothing.
    """
    available = numel // num_ranks
    return min(math.ceil(count / num_ranks), available), min(math.ceil(ROOM * count / num_ranks), available)


def break_even_ranks(density: float, bytes_per_entry: float) -> float:
    """Number of ranks above which a dense fp32 ring all-reduce sends less than an all-gather: 8 / (d b)."""
    return 8.0 / (density * bytes_per_entry)


def break_even_density(num_ranks: int, bytes_per_entry: float) -> float:
    """Density above which a dense fp32 ring all-reduce sends less than an all-gather: 8 / (N b), at most 1."""
    return min(1.0, 8.0 / (num_ranks * bytes_per_entry))

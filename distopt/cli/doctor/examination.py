"""All ranks of a job together: who is there, what each says of its host, and what the links between the hosts do.

One rank of each host measures; with one host, two of its ranks. Pairs take turns, so that no host has two measurements
at a time: N hosts need N - 1 rounds for N / 2 pairs each (the circle method of tournaments). Whatever a rank waits for
has an end, so there is an answer within the deadline also where hosts are cut off or never come.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from distopt.cli.doctor.facts import collect, probing_address
from distopt.cli.doctor.findings import judge
from distopt.cli.doctor.meeting import Meeting, Seat, find_seat, rank_keys
from distopt.cli.doctor.probe import ProbeServer, probe, reach
from distopt.errors import ConfigError

_CONNECT_S = 3.0  # hosts that can reach each other do so within a second
_PROBE_S = 6.0
_ROUND_S = _CONNECT_S + _PROBE_S + 3.0
_READ_S = 3.0


def examine(deadline_s: float) -> dict[str, Any]:
    """What was found, on rank 0; on the others only what rank 0 has made of it, {"findings": [...]}.

    Args:
        deadline_s: For all of it. Half of it is for ranks to come, the last quarter for the verdict.

    Returns:
        `size`, `missing` ranks, `ranks` (facts by rank), `pairs` (what was measured) and `findings`, as plain values.

    Raises:
        ConfigError: The launcher's variables are wrong, or this rank came when the others had begun.
        PeerLostError: Rank 0's host cannot be reached, or has gone.
    """
    seat = find_seat()
    own = collect(seat.master)
    with Meeting(seat, deadline_s=deadline_s) as meeting:
        return _examine(seat, own, meeting)


def _examine(seat: Seat, own: dict[str, Any], meeting: Meeting) -> dict[str, Any]:
    address = probing_address(own)
    with ProbeServer(address) as server:
        listening = {"address": address, "port": server.port, "token": server.token.hex()}
        meeting.tell(f"facts/{seat.rank}", {**own, "rank": seat.rank, "listening": listening})
        facts = _who_came(seat, meeting)
        pairs = _measured(seat, facts, meeting)
        meeting.tell(f"measured/{seat.rank}", pairs)
        if seat.rank:
            verdict: dict[str, Any] = meeting.ask("verdict", within_s=meeting.left_s)
            meeting.line_up("read", 1, within_s=0.0)
            return verdict
        told = meeting.collect(rank_keys("measured", facts), within_s=max(meeting.left_s - 1.0, 0.5))
        found = {
            "size": seat.size,
            "missing": sorted(set(range(seat.size)) - facts.keys()),
            "silent": sorted(facts.keys() - told.keys()),
            "ranks": {rank: {key: facts[rank][key] for key in facts[rank] if key != "listening"} for rank in facts},
            "pairs": [pair for rank in sorted(told) for pair in told[rank]],
        }
        found["findings"] = [dataclasses.asdict(finding) for finding in judge(found)]
        meeting.tell("verdict", {"findings": found["findings"]})
        # Where the store is this process's own it stays until all have read.
        meeting.line_up("read", len(told), within_s=_READ_S)
        return found


def _who_came(seat: Seat, meeting: Meeting) -> dict[int, dict[str, Any]]:
    """The facts of those that came in time, as rank 0 saw it."""
    if seat.rank == 0:
        facts = meeting.collect(rank_keys("facts", range(seat.size)), within_s=meeting.left_s / 2)
        meeting.tell("present", sorted(facts))
        return facts
    present = meeting.ask("present", within_s=meeting.left_s)
    if seat.rank not in present:
        raise ConfigError(
            f"all ranks must come within half of the deadline, rank {seat.rank} came later; start all at once, or give "
            "a longer --deadline"
        )
    return meeting.collect(rank_keys("facts", present), within_s=meeting.left_s)


def measurers(facts: dict[int, dict[str, Any]]) -> list[int]:
    """The ranks that measure: the first of each host; the first two where there is but one."""
    hosts: dict[str, int] = {}
    for rank in sorted(facts):
        hosts.setdefault(facts[rank]["host_id"], rank)
    return sorted(hosts.values()) if len(hosts) > 1 else sorted(facts)[:2]


def rounds(players: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """Every pair once, in rounds in which nobody is in two pairs."""
    seats: list[int | None] = [*players, *([None] if len(players) % 2 else [])]
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        together = zip(seats[:half], reversed(seats[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in together if a is not None and b is not None]
        seats = [seats[0], seats[-1], *seats[1:-1]]


def _measured(seat: Seat, facts: dict[int, dict[str, Any]], meeting: Meeting) -> list[dict[str, Any]]:
    """What this rank has measured, as the one that connects."""
    players = measurers(facts)
    if seat.rank not in players:
        return []
    found = []
    for number, pairs in enumerate(rounds(players)):
        meeting.line_up(f"round/{number}", len(players), within_s=_ROUND_S)  # without those that are gone
        in_time = meeting.left_s > meeting.deadline_s / 4
        found += [_of_pair(seat.rank, pair, facts, in_time=in_time) for pair in pairs if seat.rank in pair]
    return found


def _of_pair(own: int, pair: tuple[int, int], facts: dict[int, dict[str, Any]], *, in_time: bool) -> dict[str, Any]:
    """The lower rank measures, the higher one only tries whether it gets there."""
    other = pair[1] if own == pair[0] else pair[0]
    at = facts[other]["listening"]
    where = (at["address"], at["port"], bytes.fromhex(at["token"]))
    result: dict[str, Any] = {
        "from": own, "to": other, "address": at["address"], "error": None, "measured": in_time,
    }  # fmt: skip
    if not in_time:
        return result
    try:
        result["connect_s"] = reach(*where, timeout_s=_CONNECT_S)
        if own == pair[0]:
            result |= dataclasses.asdict(probe(*where, timeout_s=_PROBE_S))
    except OSError as error:
        result["error"] = str(error) or type(error).__name__
    return result

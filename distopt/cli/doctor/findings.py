"""What follows from what was found: which problems will break or slow the job, and what to do. Asks nobody."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from distopt.comm.address import is_loopback

INCOMPLETE, PROBLEM, ADVICE = "incomplete", "problem", "advice"

_LITTLE_MEMORY_BYTES = 1 << 30  # a Python with torch alone takes a quarter of it
_SLOW = 4.0  # times slower than the median of the pairs
_SKEW_S = 1.0
_FILES_PER_RANK = 8  # connections of gloo's groups, each with some for its own use
_FILES_OF_PYTHON = 256


@dataclass(frozen=True)
class Finding:
    """Something to know.

    Attributes:
        severity: "incomplete" (not everybody could be examined), "problem" (breaks the job) or "advice" (slows it, or
            will be missed later).
        said: What was found, with the hosts it is about.
        remedy: What to do.
    """

    severity: str
    said: str
    remedy: str


def status(findings: list[dict[str, Any]]) -> int:
    """The exit status for scripts: 0 if there is at most advice, 1 with a problem, 2 if not all could be examined."""
    severities = {finding["severity"] for finding in findings}
    return 2 if INCOMPLETE in severities else 1 if PROBLEM in severities else 0


def judge(found: dict[str, Any]) -> list[Finding]:
    """The findings, the gravest first; see `examine` for what is found."""
    findings = [
        *_absent(found),
        *_versions(found["ranks"]),
        *_addresses(found["ranks"]),
        *_links(found),
        *_clocks(found),
        *_resources(found["ranks"]),
    ]
    order = (INCOMPLETE, PROBLEM, ADVICE)
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def name(rank: int, ranks: dict[int, dict[str, Any]]) -> str:
    """How a rank is called: with its host, where that is known."""
    return f"rank {rank} ({ranks[rank]['host']})" if rank in ranks else f"rank {rank}"


def _absent(found: dict[str, Any]) -> Iterator[Finding]:
    if found["missing"]:
        who = ", ".join(map(str, found["missing"]))
        yield Finding(
            INCOMPLETE,
            f"rank {who} of {found['size']} did not come",
            "see the output of its host: it has not started, or cannot reach MASTER_ADDR:MASTER_PORT",
        )
    if found["silent"]:
        who = ", ".join(name(rank, found["ranks"]) for rank in found["silent"])
        yield Finding(INCOMPLETE, f"{who} came and then fell silent", "see the output of that host")
    left_out = [pair for pair in found["pairs"] if not pair["measured"]]
    if left_out:
        yield Finding(
            INCOMPLETE, f"{len(left_out)} directions between hosts were not tried in time", "give a longer --deadline"
        )
    if found["size"] == 1:
        yield Finding(
            ADVICE,
            "this is a job of one process: nothing between hosts was examined",
            "start it as the job is started: torchrun ... -m distopt.cli doctor",
        )


def _versions(ranks: dict[int, dict[str, Any]]) -> Iterator[Finding]:
    rules = {
        "distopt": (PROBLEM, lambda text: text),
        "torch": (PROBLEM, lambda text: text.partition("+")[0]),  # a build for GPUs and one for CPUs talk
        "python": (PROBLEM, lambda text: text.rpartition(".")[0]),
        "numpy": (ADVICE, lambda text: text),
    }
    for package, (severity, counted) in rules.items():
        by_version = _grouped(ranks, lambda facts, p=package, c=counted: c(facts["versions"][p]))
        if len(by_version) > 1:
            yield Finding(
                severity,
                f"{package} differs: {_shown(by_version, ranks)}",
                f"install the same {package} on every host",
            )
    by_kernels = _grouped(ranks, lambda facts: facts["kernels"])
    if "reference" in by_kernels:
        where = _hosts(by_kernels["reference"], ranks)
        yield Finding(
            ADVICE,
            f"no native kernels on {where}: selection is slower there, and the others wait",
            "install a compiler and build distopt again, see distopt info",
        )


def _addresses(ranks: dict[int, dict[str, Any]]) -> Iterator[Finding]:
    several = len({facts["host_id"] for facts in ranks.values()}) > 1
    told: set[str] = set()
    for facts in ranks.values():
        if facts["host_id"] in told:
            continue
        told.add(facts["host_id"])
        gloo, host = facts["gloo_address"], facts["host"]
        known = ", ".join(
            f"{each['name']} ({each['address']})"
            for each in facts["interfaces"]
            if each["address"] and not is_loopback(each["address"])
        )
        if gloo is None:
            yield Finding(
                PROBLEM,
                f"{host}: {facts['gloo_how']}",
                f"name one that is there: {known or 'this host has none but the loopback'}",
            )
        elif several and is_loopback(gloo):
            yield Finding(
                PROBLEM,
                f"{host}: gloo gives out {gloo}, {facts['gloo_how']}; no other host can reach that",
                f"set GLOO_SOCKET_IFNAME there to the common network: {known or 'this host has none'}",
            )
    used = {
        facts["host"]: each["mtu"]
        for facts in ranks.values()
        for each in facts["interfaces"]
        if each["address"] is not None and each["address"] == facts["gloo_address"] and each["mtu"]
    }
    if len(set(used.values())) > 1:
        yield Finding(
            ADVICE,
            "the MTU differs: " + ", ".join(f"{mtu} on {host}" for host, mtu in used.items()),
            "set one MTU on the network that all use, or large packets are lost without a word",
        )


def _links(found: dict[str, Any]) -> Iterator[Finding]:
    ranks = found["ranks"]
    failed = [pair for pair in found["pairs"] if pair["error"] is not None]
    working = {(pair["from"], pair["to"]) for pair in found["pairs"] if pair["error"] is None and pair["measured"]}
    tried: dict[int, int] = defaultdict(int)
    lost: dict[int, int] = defaultdict(int)
    for pair in found["pairs"]:
        for end in (pair["from"], pair["to"]):
            tried[end] += pair["measured"]
            lost[end] += pair["error"] is not None
    for pair in failed:
        back = " (the other way works)" if (pair["to"], pair["from"]) in working else ""
        yield Finding(
            PROBLEM,
            f"{name(pair['from'], ranks)} cannot reach {name(pair['to'], ranks)} at {pair['address']}: "
            f"{pair['error']}{back}",
            "let TCP pass between them on all ports, or name their common network in GLOO_SOCKET_IFNAME",
        )
    for rank in sorted(lost):
        if len(ranks) > 2 and lost[rank] == tried[rank] > 2:
            yield Finding(
                PROBLEM,
                f"{name(rank, ranks)} is cut off: nobody reaches it, and it reaches nobody",
                "see to its cable, its firewall, and the interface that GLOO_SOCKET_IFNAME names there",
            )
    rates: dict[tuple[int, int], float] = {}
    for pair in found["pairs"]:
        if "latency_s" in pair:
            rates[pair["from"], pair["to"]] = pair["send_bandwidth"]
            rates[pair["to"], pair["from"]] = pair["receive_bandwidth"]
    usual = median(rates.values()) if len(rates) > 2 else 0.0
    for (start, end), rate in rates.items():
        if rate * _SLOW < usual:
            yield Finding(
                ADVICE,
                f"{name(start, ranks)} sends to {name(end, ranks)} {8e-6 * rate:,.0f} Mbit/s, where "
                f"{8e-6 * usual:,.0f} are usual here; a ring is as slow as its slowest link",
                "see to that link, or leave a host out",
            )


def _clocks(found: dict[str, Any]) -> Iterator[Finding]:
    for pair in found["pairs"]:
        offset_s = pair.get("clock_offset_s")
        if offset_s is not None and abs(offset_s) - pair["clock_uncertainty_s"] > _SKEW_S:
            ahead = "ahead of" if offset_s > 0 else "behind"
            yield Finding(
                ADVICE,
                f"the clock of {name(pair['to'], found['ranks'])} is {abs(offset_s):,.1f} s {ahead} that of "
                f"{name(pair['from'], found['ranks'])}",
                "let both ask a time server (chrony, systemd-timesyncd): logs and traces cannot be compared",
            )


def _resources(ranks: dict[int, dict[str, Any]]) -> Iterator[Finding]:
    for of_host in _grouped(ranks, lambda facts: facts["host_id"]).values():
        facts = ranks[of_host[0]]
        host, threads = facts["host"], sum(ranks[rank]["threads"] for rank in of_host)
        if threads > facts["cores"] and not all(ranks[rank]["gpus"] for rank in of_host):
            share = max(1, int(facts["cores"] / len(of_host)))
            yield Finding(
                ADVICE,
                f"{host}: {len(of_host)} ranks with {threads} threads together on {facts['cores']:g} cores",
                f"set OMP_NUM_THREADS={share}" + (", and start fewer ranks" if len(of_host) > facts["cores"] else ""),
            )
        if facts["memory_free_bytes"] < _LITTLE_MEMORY_BYTES * len(of_host):
            yield Finding(
                ADVICE,
                f"{host}: {facts['memory_free_bytes'] / 2**30:.1f} GiB of memory are free for {len(of_host)} ranks",
                "end what else runs there, or raise the limit of its control group",
            )
        needed = _FILES_OF_PYTHON + _FILES_PER_RANK * len(ranks)
        if 0 <= facts["open_files"] < needed:
            yield Finding(
                PROBLEM,
                f"{host}: a process may open {facts['open_files']} files, and {len(ranks)} ranks may need {needed}",
                f"ulimit -n {max(4096, needed)}",
            )


def _grouped(ranks: dict[int, dict[str, Any]], key: Any) -> dict[str, list[int]]:
    grouped: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        grouped.setdefault(key(ranks[rank]), []).append(rank)
    return grouped


def _hosts(some: list[int], ranks: dict[int, dict[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(ranks[rank]["host"] for rank in some))


def _shown(grouped: dict[str, list[int]], ranks: dict[int, dict[str, Any]]) -> str:
    return ", ".join(
        f"{value} on {_hosts(some, ranks)} (rank {', '.join(map(str, some))})" for value, some in grouped.items()
    )

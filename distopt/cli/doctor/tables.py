"""The examination for people: the hosts, the links between them, and what to do."""

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from distopt.cli.doctor.findings import name


def show(found: dict[str, Any]) -> Iterator[RenderableType]:
    """What is printed, in order."""
    yield _hosts(found["ranks"])
    if found["pairs"]:
        yield _links(found)
    if not found["findings"]:
        yield Text("Nothing is wrong.")
    for finding in found["findings"]:
        yield Text(f"{finding['severity'].upper()}: {finding['said']}\n    {finding['remedy']}")


def _hosts(ranks: dict[int, dict[str, Any]]) -> Table:
    made = Table(title="Hosts", title_justify="left")
    for heading in ("host", "ranks", "distopt", "torch", "Python", "kernels", "gloo's address", "cores", "free memory"):
        made.add_column(heading, overflow="fold")
    by_host: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        by_host.setdefault(ranks[rank]["host_id"], []).append(rank)
    for members in by_host.values():
        facts = ranks[members[0]]
        versions = facts["versions"]
        made.add_row(
            facts["host"],
            _ranks(members),
            versions["distopt"],
            versions["torch"],
            versions["python"],
            facts["kernels"],
            _address(facts),
            f"{facts['cores']:g}",
            f"{facts['memory_free_bytes'] / 2**30:.1f} GiB",
        )
    return made


def _links(found: dict[str, Any]) -> Table:
    made = Table(title="Links", title_justify="left")
    made.add_column("from")
    made.add_column("to")
    for heading in ("latency", "Mbit/s there", "Mbit/s back", "clock ahead by"):
        made.add_column(heading, justify="right")
    failed = {(pair["from"], pair["to"]) for pair in found["pairs"] if pair["error"] is not None}
    for pair in sorted(found["pairs"], key=lambda pair: (pair["from"], pair["to"])):
        if "latency_s" in pair:
            row = (
                f"{1e3 * pair['latency_s']:.2f} ms",
                f"{8e-6 * pair['send_bandwidth']:,.0f}",
                f"{8e-6 * pair['receive_bandwidth']:,.0f}",
                f"{1e3 * pair['clock_offset_s']:,.2f} ± {1e3 * pair['clock_uncertainty_s']:.2f} ms",
            )
        elif (pair["from"], pair["to"]) in failed:
            row = ("cannot reach", "", "", "")
        else:
            continue  # the other direction has the figures
        made.add_row(name(pair["from"], found["ranks"]), name(pair["to"], found["ranks"]), *row)
    return made


def _address(facts: dict[str, Any]) -> str:
    """The address that gloo gives out, with the interface that has it."""
    address = facts["gloo_address"]
    names = [each["name"] for each in facts["interfaces"] if address is not None and each["address"] == address]
    return f"{address} ({names[0]})" if names else address or "none"


def _ranks(members: list[int]) -> str:
    whole = members == list(range(members[0], members[-1] + 1)) and len(members) > 2
    return f"{members[0]} to {members[-1]}" if whole else ", ".join(map(str, members))

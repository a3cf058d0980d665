"""What is concluded from what was found, and the exit status."""

import copy
import io

import pytest
from rich.console import Console

from distopt.cli.doctor import judge, show, status
from distopt.cli.doctor.examination import measurers, rounds
from distopt.cli.doctor.facts import probing_address

HOSTS = 3


def facts(rank):
    return {
        "rank": rank,
        "host": f"host{rank}",
        "host_id": str(rank),
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "distopt": "0.1.0", "numpy": "2.1.0"},
        "kernels": "avx2",
        "interfaces": [
            {"name": "lo", "address": "127.0.0.1", "up": True, "mtu": 65536, "mbit_per_s": None},
            {"name": "eth0", "address": f"10.0.0.{rank}", "up": True, "mtu": 1500, "mbit_per_s": 1000},
        ],
        "gloo_address": f"10.0.0.{rank}",
        "gloo_how": "GLOO_SOCKET_IFNAME=eth0",
        "routed_address": f"10.0.0.{rank}",
        "cores": 4.0,
        "threads": 1,
        "gpus": 0,
        "memory_bytes": 1 << 35,
        "memory_free_bytes": 1 << 34,
        "memory_limit_bytes": None,
        "open_files": 1024,
    }


def pair(first, second, **changes):
    measured = {
        "latency_s": 1e-4, "send_bandwidth": 1e8, "receive_bandwidth": 1e8, "connect_s": 1e-4, "clock_offset_s": 0.0,
        "clock_uncertainty_s": 1e-4,
    }  # fmt: skip
    base = {"from": first, "to": second, "address": f"10.0.0.{second}", "error": None, "measured": True}
    return base | (measured if first < second else {}) | changes


@pytest.fixture
def found():
    pairs = [pair(a, b) for a in range(HOSTS) for b in range(HOSTS) if a != b]
    return {"size": HOSTS, "missing": [], "silent": [], "ranks": {r: facts(r) for r in range(HOSTS)}, "pairs": pairs}


def said(found):
    findings = judge(found)
    return [(each.severity, each.said) for each in findings], status([vars(each) for each in findings])


def test_sound_hosts(found):
    assert said(found) == ([], 0)


def change(found, rank, **values):
    found["ranks"][rank] |= values


def other_version(package, version):
    return lambda found: found["ranks"][2]["versions"].update({package: version})


def lose(*ways):
    def lost(found):
        found["pairs"] = [
            pair(p["from"], p["to"], error="timed out") if (p["from"], p["to"]) in ways else p for p in found["pairs"]
        ]
        for p in found["pairs"]:
            if p["error"]:
                p.pop("latency_s", None)

    return lost


@pytest.mark.parametrize(
    ("wrong", "severity", "text", "code"),
    [
        (
            other_version("torch", "2.12.0"),
            "problem",
            "torch differs: 2.13.0 on host0, host1 (rank 0, 1), 2.12.0 on",
            1,
        ),
        (other_version("torch", "2.13.0+cu130"), None, "", 0),
        (other_version("distopt", "0.2.0"), "problem", "distopt differs", 1),
        (other_version("python", "3.12.1"), "problem", "python differs: 3.11 on host0, host1 (rank 0, 1), 3.12", 1),
        (other_version("python", "3.11.9"), None, "", 0),
        (other_version("numpy", "2.0.0"), "advice", "numpy differs", 0),
        (lambda f: change(f, 1, kernels="reference"), "advice", "no native kernels on host1", 0),
        (
            lambda f: change(f, 1, gloo_address="127.0.1.1", gloo_how="why"),
            "problem",
            "gloo gives out 127.0.1.1, why",
            1,
        ),
        (lambda f: change(f, 1, gloo_address=None, gloo_how="GLOO_SOCKET_IFNAME=ib9"), "problem", "host1: GLOO_SO", 1),
        (lambda f: f["ranks"][1]["interfaces"][1].update(mtu=9000), "advice", "MTU differs: 1500 on host0, 9000 on", 0),
        (
            lose((0, 2)),
            "problem",
            "rank 0 (host0) cannot reach rank 2 (host2) at 10.0.0.2: timed out (the other way",
            1,
        ),
        (lose((0, 2), (2, 0), (1, 2), (2, 1)), "problem", "rank 2 (host2) is cut off: nobody reaches it", 1),
        (
            lambda f: f["pairs"][0].update(receive_bandwidth=1e7),
            "advice",
            "rank 1 (host1) sends to rank 0 (host0) 80 ",
            0,
        ),
        (
            lambda f: f["pairs"][1].update(clock_offset_s=-7.5),
            "advice",
            "rank 2 (host2) is 7.5 s behind that of rank 0",
            0,
        ),
        (lambda f: f["pairs"][1].update(clock_offset_s=9, clock_uncertainty_s=9), None, "", 0),
        (lambda f: change(f, 0, threads=5), "advice", "host0: 1 ranks with 5 threads together on 4 cores", 0),
        (lambda f: change(f, 0, threads=5, gpus=1), None, "", 0),
        (
            lambda f: change(f, 2, memory_free_bytes=1 << 29),
            "advice",
            "host2: 0.5 GiB of memory are free for 1 ranks",
            0,
        ),
        (lambda f: change(f, 2, open_files=128), "problem", "host2: a process may open 128 files", 1),
        (lambda f: change(f, 2, open_files=-1), None, "", 0),  # no limit
        (lambda f: f.update(missing=[3], size=4), "incomplete", "rank 3 of 4 did not come", 2),
        (lambda f: f.update(silent=[1]), "incomplete", "rank 1 (host1) came and then fell silent", 2),
        (lambda f: f["pairs"][5].update(measured=False), "incomplete", "1 directions between hosts were not tried", 2),
    ],
)
def test_what_is_wrong_is_named_with_its_hosts(found, wrong, severity, text, code):
    wrong(found)
    findings, exit_status = said(found)
    assert exit_status == code
    assert [(of, each) for of, each in findings if of == severity and text in each] or not severity
    assert severity is not None or findings == []


def test_the_gravest_comes_first_and_all_is_printed(found):
    lose((0, 1))(found)
    change(found, 2, threads=9)
    found["missing"] = [7]
    findings = judge(found)
    assert [each.severity for each in findings] == ["incomplete", "problem", "advice"]
    console = Console(width=200, record=True, quiet=False, file=io.StringIO())
    for part in show(found | {"findings": [vars(each) for each in findings]}):
        console.print(part)
    text = console.export_text()
    assert "cannot reach" in text
    assert "INCOMPLETE: rank 7 of 3 did not come" in text
    assert all(f"host{rank}" in text for rank in range(HOSTS))


@pytest.mark.parametrize("number", [2, 3, 4, 7, 8])
def test_every_pair_meets_once_and_nobody_is_in_two_at_a_time(number):
    players = [3 * each for each in range(number)]
    held = list(rounds(players))
    met = [each for one in held for each in one]
    assert sorted(met) == [(a, b) for i, a in enumerate(players) for b in players[i + 1 :]]
    for one in held:
        taking_part = [rank for each in one for rank in each]
        assert len(taking_part) == len(set(taking_part))


def test_who_measures_and_where(found):
    ranks = found["ranks"]
    ranks[3] = copy.deepcopy(ranks[1])
    assert measurers(ranks) == [0, 1, 2]
    assert measurers(dict.fromkeys((1, 3, 5), ranks[1])) == [1, 3]
    assert probing_address(ranks[1]) == "10.0.0.1"
    assert probing_address(ranks[1] | {"gloo_address": "127.0.1.1", "routed_address": "10.9.9.9"}) == "10.9.9.9"
    assert probing_address(ranks[1] | {"gloo_address": None, "routed_address": None}) == "127.0.0.1"

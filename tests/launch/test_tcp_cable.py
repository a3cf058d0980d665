"""The TCP transport on two hosts when a cable is pulled: nothing ends a connection then but the silence."""

import subprocess
import sys
import time

import pytest

from netns import DEADLINE_S, NAME, REAL, cluster, needs_namespaces

SECRET = "0123456789abcdef0123456789abcdef"
CODE = """
import os, sys, time
import torch
from distopt.comm import TCPPeer, TCPServer, read_secret

common = dict(size=2, max_frame_bytes=1 << 20, secret=read_secret(), silence_s=2.0)
is_server, busy = sys.argv[1] == "server", sys.argv[2] == "busy"
if is_server:
    transport = TCPServer("10.88.0.1:9000", **common)
else:
    transport = TCPPeer("10.88.0.1:9000", rank=1, patience_s=90.0, **common)
other = 1 if is_server else 0
frame = torch.zeros(1 << 16, dtype=torch.uint8)
heard = set()  # on which of the connections

def wait(condition):
    while not condition():
        if busy and is_server:
            transport.send(other, frame)  # something always waits to be acknowledged
        if transport.receive(0.05) is not None:
            heard.add(transport.connections(other))

for count in (1, 2):
    wait(lambda: transport.connections(other) == count)
    transport.send(other, frame)
    wait(lambda: is_server or count in heard)
    print("connected", flush=True)
    if count == 1:
        wait(lambda: transport.lost == {other} or transport.connections(other) > 1)
        print("lost", flush=True)
if not is_server:
    transport.close(5.0)
else:
    wait(lambda: transport.lost == {other})
    transport.close(5.0)
"""


@pytest.fixture(scope="module")
def hosts():
    made = cluster("up", 2, "1gbit")
    assert made.returncode == 0, made.stderr
    yield
    cluster("down")


def start(host, folder, role, load):
    with (folder / f"{role}.log").open("w") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", f"distopt-{NAME}-{host}", sys.executable, "-c", CODE, role, load],
            env={**REAL, "DISTOPT_JOB_SECRET": SECRET, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


@needs_namespaces
@pytest.mark.job
@pytest.mark.parametrize("load", ["idle", "busy"])
def test_a_pulled_cable_is_noticed_at_both_ends_and_the_peer_comes_back(hosts, tmp_path, load):
    running = [start(1, tmp_path, "server", load), start(2, tmp_path, "peer", load)]

    def said(role):
        return (tmp_path / f"{role}.log").read_text().split("\n")[:-1]

    def wait_for(*words):
        end = time.monotonic() + DEADLINE_S
        while any(said(role)[: len(words)] != list(words) for role in ("server", "peer")):
            assert time.monotonic() < end, (said("server"), said("peer"))
            time.sleep(0.05)

    try:
        wait_for("connected")
        assert cluster("link", 2, "unplugged").returncode == 0
        wait_for("connected", "lost")
        assert cluster("link", 2, "up").returncode == 0
        wait_for("connected", "lost", "connected")
        assert [process.wait(DEADLINE_S) for process in running] == [0, 0], (said("server"), said("peer"))
    finally:
        cluster("link", 2, "up")
        for process in running:
            process.kill()
            process.wait()

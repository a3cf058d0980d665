"""TCP between processes that are killed, frozen and started again."""

import contextlib
import os
import signal
import socket
import subprocess

import pytest
import torch

from distopt.comm import TCPPeer, TCPServer
from stars import SECRET, close, wait_until

pytestmark = pytest.mark.job

SIZE = 4
LONGEST = 1 << 20
HEAD = """
import os, signal, sys, time
import torch
from distopt.comm import TCPPeer, TCPServer

address, rank = sys.argv[1], int(sys.argv[2])
secret, size, longest = b"a secret of a test, and long enough", 4, 1 << 20

def frame(*values):
    return torch.tensor(values, dtype=torch.uint8)
"""
PEER = (
    HEAD
    + """
transport = TCPPeer(address, rank=rank, size=size, max_frame_bytes=longest, secret=secret, patience_s=60.0)
transport.send(0, torch.tensor([os.getpid()]).view(torch.uint8))
count = 1
while (got := transport.receive(30.0)) is not None:
    if got[1].numel() > 1:
        transport.send(0, got[1])
    elif got[1].tolist() == [0]:
        break
    elif got[1].tolist() == [1]:  # says how often it has been connected
        transport.send(0, frame(transport.connections(0)))
    elif got[1].tolist() == [2]:  # leaves a child that holds what this process held
        if os.fork() == 0:
            time.sleep(20.0)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
transport.close(10.0)
"""
)
SERVER = (
    HEAD
    + """
transport = TCPServer(address, size=size, max_frame_bytes=longest, secret=secret)
while (got := transport.receive(60.0)) is not None:
    transport.send(got[0], got[1])
"""
)


def frame(*values):
    return torch.tensor(values, dtype=torch.uint8)


def receive(end):
    got = end.receive(30.0)
    assert got is not None, "nothing has arrived"
    return got[0], got[1].tolist()


def process_of(server):
    """The rank of a peer that has come, and its process."""
    source, got = server.receive(30.0)
    return source, int(got.view(torch.int64))


def is_frozen(pid):
    with open(f"/proc/{pid}/status") as status:
        return "State:\tT" in status.read()


def freeze(pid):
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: is_frozen(pid))


@pytest.fixture
def start(warm_python):
    scripts = []

    def begin(code, address, rank=0):
        scripts.append(warm_python.start(code, address, rank))
        return scripts[-1]

    yield begin
    for script in scripts:
        script.kill()
        script.wait()


@pytest.fixture
def server():
    made = TCPServer("127.0.0.1:0", size=SIZE, max_frame_bytes=LONGEST, secret=SECRET, max_pending_bytes=4 * LONGEST)
    yield made
    made.close(1.0)


def test_a_killed_peer_is_noticed_the_others_go_on_and_a_new_one_takes_its_place(server, start):
    scripts = {rank: start(PEER, server.address, rank) for rank in (1, 2)}
    processes = dict(process_of(server) for _ in range(2))
    assert set(processes) == {1, 2}
    server.send(1, torch.zeros(LONGEST, dtype=torch.uint8))  # on its way
    os.kill(processes[1], signal.SIGKILL)
    wait_until(lambda: server.lost == {1})
    while server.receive(0.1) is not None:
        pass
    server.send(1, frame(1))
    server.send(2, frame(2, 3))
    assert receive(server) == (2, [2, 3])
    start(PEER, server.address, 1)
    rank, process = process_of(server)
    assert rank == 1
    assert process != processes[1]
    assert server.lost == frozenset()
    assert (server.connections(1), server.connections(2), server.connections(3)) == (2, 1, 0)
    server.send(1, frame(1))
    assert receive(server) == (1, [1])
    server.send(2, frame(0))
    assert scripts[2].wait(20.0) == 0
    wait_until(lambda: server.lost == {2})
    assert not server.refused


def test_a_child_of_a_killed_peer_does_not_keep_its_connection(server, start):
    start(PEER, server.address, 1)
    process_of(server)
    server.send(1, frame(2))
    wait_until(lambda: server.lost == {1}, timeout_s=10.0)


def test_peers_outlive_a_killed_server_and_find_the_next_at_its_address(start):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    script = start(SERVER, address)
    peers = [
        TCPPeer(address, rank=rank, size=SIZE, max_frame_bytes=LONGEST, secret=SECRET, connect_timeout_s=30.0)
        for rank in (1, 2, 3)
    ]
    try:
        for life in (1, 2, 3):
            for peer in peers:
                wait_until(lambda peer=peer, life=life: peer.connections(0) == life)
                assert peer.lost == frozenset()
                peer.send(0, frame(life, peer.rank))
                assert receive(peer) == (0, [life, peer.rank])
            os.kill(script.pid, signal.SIGKILL)
            script.wait()
            wait_until(lambda: all(peer.lost == {0} for peer in peers))
            for peer in peers:
                peer.send(0, frame(99))  # nobody is there: it does not arrive later
                assert (peer.pending_bytes(0), peer.receive(0.0)) == (0, None)
            if life < 3:
                script = start(SERVER, address)
    finally:
        close(peers, 1.0)


def test_a_frozen_peer_holds_up_nobody_and_gets_through_when_it_is_back(server, start):
    for rank in (1, 2):
        start(PEER, server.address, rank)
    processes = dict(process_of(server) for _ in range(2))
    freeze(processes[1])
    large = torch.zeros(LONGEST, dtype=torch.uint8)
    most = 0
    for number in range(100):
        server.send(1, large)
        most = max(most, server.pending_bytes(1))
        if number % 10 == 0:
            server.send(2, frame(2, number))
            assert receive(server) == (2, [2, number])
        if server.refused:
            break
    assert server.refused == {"slow reader": 1}  # too much waits for it
    assert most <= 6 * LONGEST + (8 << 20), "what waits for a peer is not bounded"
    assert server.lost == {1}
    os.kill(processes[1], signal.SIGCONT)
    wait_until(lambda: server.connections(1) == 2)
    while server.receive(0.2) is not None:  # what it read before, it sends back
        pass
    server.send(1, frame(1))
    assert receive(server) == (1, [2])


def test_a_frozen_server_is_waited_for(start):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    script = start(SERVER, address)
    peer = TCPPeer(address, rank=1, size=SIZE, max_frame_bytes=LONGEST, secret=SECRET, connect_timeout_s=30.0)
    try:
        freeze(script.pid)
        for number in range(3):
            peer.send(0, torch.full((LONGEST,), number, dtype=torch.uint8))
        assert peer.receive(0.2) is None
        os.kill(script.pid, signal.SIGCONT)
        for number in range(3):
            got = peer.receive(30.0)
            assert got is not None
            assert got[1].numel() == LONGEST
            assert bool((got[1] == number).all())
        assert peer.connections(0) == 1
    finally:
        peer.close(1.0)


def test_a_script_that_ends_without_a_close_loses_nothing(server, start):
    code = HEAD + (
        "transport = TCPPeer(address, rank=rank, size=size, max_frame_bytes=longest, secret=secret)\n"
        "for number in range(40): transport.send(0, torch.full((longest,), number, dtype=torch.uint8))\n"
    )
    code += "import distopt.comm.tcp.end as end\nend._EXIT_S = 60.0\n"
    script = start(code, server.address, 1)
    wait_until(lambda: server.connected == {1}, timeout_s=60.0)
    with contextlib.suppress(subprocess.TimeoutExpired):
        script.wait(1.0)  # it cannot end: the server takes 4 MiB unless they are received
    for number in range(40):
        source, got = server.receive(30.0)
        assert source == 1
        assert bool((got == number).all())
    assert script.wait(20.0) == 0


def test_the_memory_of_a_server_does_not_grow_with_what_is_announced(start):
    code = HEAD + (
        "import struct\n"
        "transport = TCPServer(address, size=size, max_frame_bytes=longest, secret=secret)\n"
        "print(transport.address, flush=True)\n"
        "def peak(): return int(next(l for l in open('/proc/self/status') if l.startswith('VmPeak')).split()[1])\n"
        "transport.receive(30.0)\n"
        "before = peak()\n"
        "transport.send(1, frame(1))\n"
        "while not transport.refused: time.sleep(0.01)\n"
        "assert transport.refused == {'too long': 1}, transport.refused\n"
        "assert peak() - before < 100_000, (before, peak())\n"
    )
    script = start(code, "127.0.0.1:0")
    wait_until(lambda: ":" in script._written()[0], timeout_s=30.0)
    address = script._written()[0].strip()
    peer = TCPPeer(address, rank=1, size=SIZE, max_frame_bytes=2**31, secret=SECRET)  # it may: the server may not
    try:
        peer.send(0, frame(1))
        assert receive(peer) == (0, [1])
        peer.send(0, torch.empty(2**31, dtype=torch.uint8))
        assert script.wait(60.0) == 0, script._written()
    finally:
        peer.close(0.0)

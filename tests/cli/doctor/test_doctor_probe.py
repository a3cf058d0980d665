"""A probe over a real connection: clocks that are apart, a host that does not answer, strangers."""

import socket
import time

import pytest

from distopt.cli.doctor import facts
from distopt.cli.doctor.meeting import Seat, find_seat
from distopt.cli.doctor.probe import ProbeServer, probe, reach
from distopt.errors import ConfigError


def test_clocks_that_are_apart_are_found_within_what_is_said():
    with ProbeServer("127.0.0.1", now=lambda: time.time() - 12.5) as server:
        found = probe("127.0.0.1", server.port, server.token, timeout_s=60, now=time.time)
    assert abs(found.clock_offset_s + 12.5) <= found.clock_uncertainty_s + 1e-6
    assert found.clock_uncertainty_s == found.latency_s
    assert found.latency_s > 0
    assert min(found.send_bandwidth, found.receive_bandwidth) > 1e6  # the loopback


def test_a_host_that_does_not_answer_is_given_up():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(TimeoutError):
            reach("127.0.0.1", silent.getsockname()[1], b"x" * 16, timeout_s=0.2)
        port = silent.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        reach("127.0.0.1", port, b"x" * 16, timeout_s=5)


def test_who_does_not_know_the_token_gets_nothing():
    with ProbeServer("127.0.0.1") as server, pytest.raises(ConnectionError):
        reach("127.0.0.1", server.port, bytes(16), timeout_s=60)


@pytest.mark.parametrize("request_", [b"q" + bytes(8), b"r" + (1 << 40).to_bytes(8, "little"), b"s" + b"\xff" * 8])
def test_a_request_that_is_none_ends_the_connection(request_):
    with ProbeServer("127.0.0.1") as server, socket.create_connection(("127.0.0.1", server.port), 60) as stranger:
        stranger.sendall(server.token + request_)
        assert stranger.recv(1) == b""


MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
TORCH = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "7"}


@pytest.mark.parametrize(
    ("environ", "seat"),
    [
        ({}, Seat()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Seat()),
        (TORCH, Seat(rank=1, size=2, master="a", port=7, serves=False)),
        (TORCH | {"RANK": "0"}, Seat(rank=0, size=2, master="a", port=7, serves=True)),
        (TORCH | {"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}, Seat(size=2, master="a", port=7, serves=False)),
        (MPI | {"MASTER_ADDR": "a", "MASTER_PORT": "7"}, Seat(rank=1, size=2, master="a", port=7, serves=False)),
    ],
)
def test_what_the_launcher_says(environ, seat):
    assert find_seat(environ) == seat


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        (TORCH | {"RANK": "2"}, "RANK must be in 0 to 1, got 2"),
        (TORCH | {"WORLD_SIZE": "two"}, "WORLD_SIZE must be a number, got 'two'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR must be an address of rank 0's host"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT must be a number, got None"),
        (TORCH | {"MASTER_PORT": "99999"}, "MASTER_PORT must be a port, 1 to 65535, got 99999"),
    ],
)
def test_a_launcher_that_says_too_little(environ, said):
    with pytest.raises(ConfigError, match=said):
        find_seat(environ)


def test_the_limits_of_a_control_group_count(monkeypatch, tmp_path):
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text(f"{1 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{1 << 19}\n")
    monkeypatch.setattr(facts, "_CGROUP", tmp_path)
    assert facts.cores() == 0.5
    assert facts.memory()["memory_free_bytes"] == 1 << 19
    assert facts.memory()["memory_limit_bytes"] == 1 << 20
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert facts.cores() >= 1
    assert facts.memory()["memory_limit_bytes"] is None
    assert facts.memory()["memory_free_bytes"] > 1 << 20


def test_what_gloo_will_give_out(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert facts.gloo_address() == ("127.0.0.1", "GLOO_SOCKET_IFNAME=lo")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nothing0")
    assert facts.gloo_address() == (None, "GLOO_SOCKET_IFNAME=nothing0, which has no IPv4 address here")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(facts.socket, "gethostname", lambda: "no-such-host.invalid")
    address, how = facts.gloo_address()
    assert address == "127.0.0.1"
    assert "the host name no-such-host.invalid means no address of this host" in how

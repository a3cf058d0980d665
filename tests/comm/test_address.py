import socket

import pytest

from distopt.comm import TCPPeer, TCPServer, own_address, parse_address
from distopt.comm.address import is_loopback, keep_watch
from distopt.errors import ConfigError
from stars import SECRET


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:9000", "127.0.0.1", 9000),
        (" node-7.example:1 ", "node-7.example", 1),
        ("localhost:0", "localhost", 0),
        ("[::1]:65535", "::1", 65535),
        ("[fe80::1%eth0]:9", "fe80::1%eth0", 9),
    ],
)
def test_an_address_reads_as_it_was_written(text, host, port):
    address = parse_address(text)
    assert address == (host, port)
    assert str(address) == text.strip()


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "must be 'host:port'"),
        ("host", "must be 'host:port'"),
        (":9000", "must be 'host:port'"),
        ("a b:9000", "must be 'host:port'"),
        ("tcp://host:9000", "must be 'host:port'"),
        ("[::1:9000", "must be 'host:port'"),
        ("[]:9000", "must be 'host:port'"),
        ("::1:9000", "stands in brackets"),
        ("[127.0.0.1]:9000", "stands in brackets"),
        ("host:", "a port must be"),
        ("host:65536", "a port must be"),
        ("host:-1", "a port must be"),
        ("host:http", "a port must be"),
        ("host:٣", "a port must be"),
        ("host:1_0", "a port must be"),
        ("host:" + "0" * 5000, "a port must be"),
        (9000, "must be text"),
        (None, "must be text"),
    ],
)
def test_what_is_no_address_is_told_so(text, rule):
    with pytest.raises(ConfigError, match=rule):
        parse_address(text)


def test_loopback_is_told_from_the_rest():
    assert [is_loopback(host) for host in ("127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "fe80::1%lo", "::ffff:10.0.0.1")] == [False] * 5


def server(listen, secret=SECRET):
    return TCPServer(listen, size=2, max_frame_bytes=100, secret=secret)


def test_an_address_in_use_names_the_port_and_what_to_do():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf":{port}: the port is in use; .*ss -ltnp 'sport = :{port}'"):
            server(f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("listen", "told"),
    [
        ("192.0.2.1:0", "not an address of this machine; give one that `ip address` lists"),
        ("no-such-host.invalid:0", "the host is not known"),
        ("a" * 70 + ".invalid:0", "the host is not known"),
    ],
)
def test_a_host_that_is_not_this_machine_is_refused(listen, told):
    with pytest.raises(ConfigError, match=told):
        server(listen)


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"])
def test_without_a_secret_nobody_outside_is_heard(listen):
    with pytest.raises(ConfigError, match=r"without a job secret .* DISTOPT_JOB_SECRET .*token_hex"):
        server(listen, secret=None)


def test_without_a_secret_nobody_outside_is_spoken_to():
    with pytest.raises(ConfigError, match=r"without a job secret .* got 192\.0\.2\.1:9"):
        TCPPeer("192.0.2.1:9", rank=1, size=2, max_frame_bytes=100)


def test_a_server_hears_its_own_interface_only():
    made = server("127.0.0.2:0")
    try:
        assert made.address.host == "127.0.0.2"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", made.address.port)).close()
    finally:
        made.close(1.0)


def test_the_kernel_watches_over_idle_and_stuck_connections():
    left, right = socket.socket(), socket.socket()
    with left, right:
        keep_watch(left, 20.0)
        assert left.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        idle, step, probes = (
            left.getsockopt(socket.IPPROTO_TCP, what)
            for what in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert idle + probes * step == 20
        assert left.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20000


def test_the_own_address_is_that_on_the_way_to_the_others(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    asked = []

    class Probe(socket.socket):
        def connect(self, address):
            asked.append(address[0])
            super().connect(("127.0.0.1", address[1]))

    monkeypatch.setattr(socket, "socket", Probe)
    assert own_address("192.0.2.7") == "127.0.0.1"
    assert asked == ["192.0.2.7"]
    assert own_address(None) == "127.0.0.1"


def test_the_interface_that_gloo_is_told_to_use_comes_first(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,eth7")
    assert own_address("192.0.2.7") == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none7")
    with pytest.raises(OSError, match="No such device"):
        own_address("127.0.0.1")

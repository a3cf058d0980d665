"""TCP in one process: who may come in, what is refused, and a man in the middle. See test_tcp_processes for deaths."""

import contextlib
import os
import socket
import struct
import threading
import time

import pytest
import torch

from distopt.comm import TCPPeer, TCPServer
from distopt.comm.session import Header, Session, seal
from distopt.comm.tcp import handshake
from distopt.comm.tcp.connection import Connection
from distopt.comm.tcp.handshake import Deadline
from distopt.errors import ConfigError, PeerLostError
from meddler import DOWN, UP, Meddler, flipped, read
from stars import SECRET, close, peer_of, tcp, wait_until

OTHER_SECRET = b"the secret of another job altogether"
SECRETS = pytest.mark.parametrize("secret", [None, SECRET], ids=["open", "secret"])


def frame(*values):
    return torch.tensor(values, dtype=torch.uint8)


def receive(end):
    got = end.receive(20.0)
    assert got is not None, "nothing has arrived"
    return got[0], got[1].tolist()


@pytest.fixture(autouse=True)
def _nothing_is_left():
    descriptors = len(os.listdir("/proc/self/fd"))
    yield
    wait_until(lambda: not [thread.name for thread in threading.enumerate() if thread.name.startswith("distopt-tcp")])
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors)


@pytest.fixture
def made():
    """Ends that are closed after the test, the last first."""
    ends = []
    yield ends
    close(ends, 1.0)


@pytest.fixture
def server(made):
    """A server of three ranks that has a secret."""
    made.append(TCPServer("127.0.0.1:0", size=3, max_frame_bytes=1000, secret=SECRET, handshake_s=5.0))
    return made[0]


def raw(server):
    """A connection of somebody who knows nothing."""
    stream = socket.create_connection(server.address)
    stream.settimeout(20.0)
    return stream


def ends(stream):
    """Whether the other side has ended this connection."""
    with contextlib.suppress(ConnectionError):
        while stream.recv(4096):
            pass
    return True


# -- arguments and wrong servers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"size": 1}, "size must be an integer of at least 2, got 1"),
        ({"max_frame_bytes": 0}, "max_frame_bytes must be"),
        ({"max_pending_bytes": 0}, "max_pending_bytes must be"),
        ({"silence_s": 0.0}, "silence_s must be a positive number"),
        ({"handshake_s": float("inf")}, "handshake_s must be a positive number"),
        ({"secret": b"short"}, "at least 16 bytes, got 5"),
        ({"secret": "a text is not bytes"}, "must be bytes, got str"),
        ({"rank": 0}, "rank must be an integer of at least 1"),
        ({"rank": 3}, "rank must be from 1 to size - 1 = 2, got 3"),
        ({"connect_timeout_s": 0.0}, "connect_timeout_s must be"),
        ({"patience_s": -1.0}, "patience_s must be"),
        ({"server": "127.0.0.1:0"}, "must be from 1 to 65535"),
    ],
)
def test_wrong_arguments_are_named(change, told):
    options = {"size": 3, "max_frame_bytes": 100, "secret": SECRET, **change}
    if not {"rank", "connect_timeout_s", "patience_s", "server"} & set(change):
        with pytest.raises(ConfigError, match=told):
            TCPServer("127.0.0.1:0", **options)
    options = {"server": "127.0.0.1:9", "rank": 1, **options}
    with pytest.raises(ConfigError, match=told):
        TCPPeer(options.pop("server"), **options)


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_a_server_that_is_not_there_is_waited_for_and_then_named():
    address = f"127.0.0.1:{closed_port()}"
    with pytest.raises(PeerLostError, match=rf"{address} for 0\.4 s: .*refused\. Start the server") as error:
        TCPPeer(address, rank=1, size=2, max_frame_bytes=100, connect_timeout_s=0.4)
    assert error.value.ranks == (0,)


def test_a_host_that_nobody_knows_is_named():
    with pytest.raises(PeerLostError, match=r"no-such-host\.invalid:9000 for 0\.2 s"):
        TCPPeer("no-such-host.invalid:9000", rank=1, size=2, max_frame_bytes=100, connect_timeout_s=0.2)


def test_a_server_may_come_later(made):
    port = closed_port()
    threading.Timer(
        0.3,
        lambda: made.insert(0, TCPServer(f"127.0.0.1:{port}", size=2, max_frame_bytes=100)),
    ).start()
    made.append(TCPPeer(f"127.0.0.1:{port}", rank=1, size=2, max_frame_bytes=100, connect_timeout_s=30.0))
    made[1].send(0, frame(1))
    assert receive(made[0]) == (1, [1])


def answering(listener, data):
    with contextlib.suppress(OSError):
        while True:
            stream, _ = listener.accept()
            with stream:
                stream.sendall(data)
                if data:
                    stream.recv(1000)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"HTTP/1.0 400 Bad Request\r\n\r\n" + b" " * 80, "not a server of distopt"),
        (b"220 hello\r\n", "does not answer as a server of this job"),
        (b"", "."),
    ],
)
def test_another_kind_of_server_is_no_server(data, told):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answering, args=(listener, data))
        thread.start()
        with pytest.raises(PeerLostError, match=told):
            TCPPeer(
                f"127.0.0.1:{listener.getsockname()[1]}",
                rank=1,
                size=2,
                max_frame_bytes=100,
                connect_timeout_s=0.5,
            )
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def test_one_that_accepts_and_says_nothing_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(PeerLostError, match=r"the time for the handshake is over|timed out"):
            TCPPeer(address, rank=1, size=2, max_frame_bytes=100, connect_timeout_s=0.6, handshake_s=0.2)


def test_an_attempt_that_hangs_can_be_closed():
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as waiting:
        for _ in range(4):  # the queue of the listener is full: further connections are not even refused
            stream = waiting.enter_context(socket.socket())
            stream.setblocking(False)
            stream.connect_ex(listener.getsockname())
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(PeerLostError, match="timed out"):
            TCPPeer(address, rank=1, size=2, max_frame_bytes=100, connect_timeout_s=0.5)


@SECRETS
def test_ipv6(made, secret):
    try:
        server = TCPServer("[::1]:0", size=2, max_frame_bytes=100, secret=secret)
    except ConfigError as error:
        pytest.skip(f"no IPv6 here: {error}")
    made.append(server)
    assert str(server.address).startswith("[::1]:")
    made.append(peer_of(server, 1, secret=secret))
    made[1].send(0, frame(7))
    assert receive(made[0]) == (1, [7])


# -- who comes in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server_has", "peer_has", "told"),
    [
        (SECRET, OTHER_SECRET, "another job secret"),
        (SECRET, None, "it has a job secret, and this process has none"),
        (None, SECRET, "it has no job secret"),
    ],
)
def test_who_lacks_the_secret_stays_outside_and_is_told_at_once(made, server_has, peer_has, told, caplog):
    server = TCPServer("127.0.0.1:0", size=2, max_frame_bytes=100, secret=server_has)
    made.append(server)
    with pytest.raises(PeerLostError, match=told):
        peer_of(server, 1, secret=peer_has, connect_timeout_s=0.3)
    assert server.connected == frozenset()
    assert set(server.refused) == {"unauthenticated"}
    warned = [record.getMessage() for record in caplog.records if "no connection" in record.getMessage()]
    assert sum(told in said for said in warned) == 1, warned


def test_a_job_of_another_size_is_an_error_at_once(server):
    with pytest.raises(ConfigError, match="the server has a job of size 3, rank 1 one of 4"):
        TCPPeer(str(server.address), rank=1, size=4, max_frame_bytes=1000, secret=SECRET)
    wait_until(lambda: server.refused == {"wrong size": 1})


def hello(secret, *, magic=b"DTCP", version=1, rank=1, size=3):
    fields = (magic, version, secret is not None, rank, size, os.urandom(32))
    return handshake._sealed(secret, "hello", b"", handshake._HELLO, fields)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (hello(SECRET, rank=0), "wrong rank"),
        (hello(SECRET, rank=3), "wrong rank"),
        (hello(SECRET, rank=2**32 - 1), "wrong rank"),
        (hello(SECRET, size=2), "wrong size"),
        (hello(SECRET, version=2), "other version"),
        (hello(SECRET, magic=b"HTTP"), "garbage"),
        (hello(OTHER_SECRET), "unauthenticated"),
        (hello(None), "unauthenticated"),
        (flipped(hello(SECRET), 8), "unauthenticated"),
        (b"GET / HTTP/1.1\r\n" * 5, "garbage"),
        (bytes(80), "garbage"),
    ],
    ids=[
        "the server's rank", "rank 3 of 3", "the largest rank", "a smaller job", "version 2", "another magic",
        "another secret", "no secret", "a flipped bit", "a browser", "zeros",
    ],  # the nonces are new in each process, which must all name the tests the same
)  # fmt: skip
def test_a_wrong_hello_is_refused_and_counted(server, said, reason):
    with raw(server) as stream:
        stream.sendall(said)
        assert ends(stream)
    wait_until(lambda: server.refused == {reason: 1})
    assert server.connected == frozenset()


def test_other_versions_are_told_of_by_their_name(monkeypatch, server):
    monkeypatch.setattr(handshake, "_VERSION", 9)
    said = hello(SECRET, version=1)
    with raw(server) as stream:
        stream.sendall(said)
        answer = read(stream, 80)
    assert handshake._ANSWER.unpack(answer)[:3] == (b"DTCP", 9, handshake.Verdict.OTHER_VERSION)
    assert "install the same distopt" in handshake._hint(handshake.Verdict.OTHER_VERSION, 9, True)


def test_who_leaves_or_dawdles_in_the_handshake_is_counted(made):
    server = TCPServer("127.0.0.1:0", size=2, max_frame_bytes=100, secret=SECRET, handshake_s=0.3)
    made.append(server)
    raw(server).close()
    wait_until(lambda: server.refused == {"ended early": 1})
    with raw(server) as stream:
        stream.sendall(hello(SECRET)[:79])  # and not the last
        assert ends(stream)
    wait_until(lambda: server.refused == {"ended early": 1, "too slow": 1})


def test_only_the_handshake_has_a_deadline(made):
    server = TCPServer("127.0.0.1:0", size=2, max_frame_bytes=100, secret=SECRET, handshake_s=0.5)
    made.append(server)
    made.append(peer_of(server, 1, secret=SECRET, handshake_s=0.5))
    time.sleep(1.0)
    made[1].send(0, frame(1))
    assert receive(server) == (1, [1])
    assert server.connections(1) == made[1].connections(0) == 1


def test_a_byte_now_and_then_buys_no_time(made):
    server = TCPServer("127.0.0.1:0", size=2, max_frame_bytes=100, secret=SECRET, handshake_s=0.3)
    made.append(server)
    said = 0
    with raw(server) as stream, contextlib.suppress(ConnectionError):
        for byte in hello(SECRET):
            stream.sendall(bytes([byte]))
            said += 1
            time.sleep(0.1)
    assert said < 80, "whoever always says something may stay as long as he likes"
    wait_until(lambda: server.refused == {"too slow": 1})


def test_a_wrong_confirmation_and_records_without_the_key_are_refused(server, made):
    made.append(peer_of(server, 2, secret=SECRET))
    with raw(server) as stream:
        stream.sendall(hello(SECRET))
        read(stream, 80)
        stream.sendall(bytes(32))
        assert ends(stream)
    wait_until(lambda: server.refused == {"unauthenticated": 1})
    for data, reason in (
        (b"\x80\x02}." + os.urandom(60), "garbage"),  # such as a pickle
        (seal(None, Header(1, 0, 1, 3), memoryview(b"abc")) + b"abc", "unknown session"),
    ):
        before = server.refused[reason]
        with raw(server) as stream:
            handshake.ask(stream, Deadline(10), rank=1, size=3, secret=SECRET)
            stream.sendall(data)
            assert ends(stream)
        wait_until(lambda reason=reason, before=before: server.refused[reason] == before + 1)
    made[1].send(0, frame(2))
    assert receive(server) == (2, [2])


@pytest.mark.parametrize("announced", [1001, 2**31, 2**40, 2**63, 2**64 - 1])
@SECRETS
def test_who_announces_too_much_is_cut_off_before_any_of_it_is_taken(made, secret, announced):
    server = TCPServer("127.0.0.1:0", size=3, max_frame_bytes=1000, secret=secret)
    made.append(server)
    with raw(server) as stream:
        session = handshake.ask(stream, Deadline(10), rank=1, size=3, secret=secret).outgoing
        wait_until(lambda: server.connected == {1})
        header = bytearray(session.seal(1, memoryview(b"")))
        struct.pack_into("<Q", header, 24, announced)
        allocated = []
        real, torch.empty = torch.empty, lambda *size, **options: allocated.append(size) or real(*size, **options)
        try:
            stream.sendall(header)
            assert ends(stream)
            wait_until(lambda: server.refused == {"too long": 1})
        finally:
            torch.empty = real
        assert not allocated
    assert server.lost == {1}
    made.append(peer_of(server, 1, secret=secret))
    made[1].send(0, frame(3))
    assert receive(server) == (1, [3])


def test_strangers_are_few_and_keep_nobody_out(server, made):
    with contextlib.ExitStack() as crowd:
        strangers = [crowd.enter_context(raw(server)) for _ in range(300)]
        wait_until(lambda: server.refused["too many"] == 300 - 64 - 3)
        wait_until(lambda: sum(thread.name == "distopt-tcp-read" for thread in threading.enumerate()) <= 64 + 3)
        made.append(peer_of(server, 1, secret=SECRET))
        made[1].send(0, frame(1))
        assert receive(server) == (1, [1])
        assert ends(strangers[0])
    wait_until(lambda: server.refused["ended early"] == 64 + 3 - 1)  # the peer took the place of one more
    assert server.refused["too many"] == 300 - 64 - 3 + 1


def test_a_crowd_from_one_host_does_not_push_out_another(server):
    with contextlib.ExitStack() as crowd:
        patient = crowd.enter_context(socket.create_connection(server.address, source_address=("127.0.0.2", 0)))
        patient.settimeout(20.0)
        for _ in range(200):
            crowd.enter_context(raw(server))
        wait_until(lambda: server.refused["too many"] == 201 - 64 - 3)
        patient.sendall(hello(SECRET))
        assert len(read(patient, 80)) == 80


# -- coming back -----------------------------------------------------------------------------------------------------


@SECRETS
def test_a_peer_comes_back_by_itself_and_what_was_on_its_way_is_gone(made, secret):
    server = TCPServer("127.0.0.1:0", size=2, max_frame_bytes=100, secret=secret)
    made.append(server)
    with Meddler(server.address) as middle:
        peer = TCPPeer(middle.address, rank=1, size=2, max_frame_bytes=100, secret=secret)
        made.append(peer)
        for round_ in range(3):
            count = server.connections(1)
            peer.send(0, frame(round_, 1))
            assert receive(server) == (1, [round_, 1])
            server.send(1, frame(round_, 2))
            assert receive(peer) == (0, [round_, 2])
            assert peer.connections(0) == round_ + 1
            middle.cut()
            wait_until(lambda round_=round_: peer.connections(0) == round_ + 2)
            wait_until(lambda count=count: server.connections(1) == count + 1)
            assert (server.connected, peer.connected) == ({1}, {0})
            assert server.lost == peer.lost == frozenset()


def test_a_peer_that_is_ended_again_and_again_comes_ever_more_seldom(made):
    server = TCPServer("127.0.0.1:0", size=2, max_frame_bytes=100, secret=SECRET)
    peer = peer_of(server, 1, secret=SECRET, max_frame_bytes=101)
    made += [server, peer]
    for count in range(1, 6):
        wait_until(lambda count=count: peer.connections(0) == count)
        pause_s = peer._pause_s
        peer.send(0, torch.zeros(101, dtype=torch.uint8))
        wait_until(lambda count=count: server.refused == {"too long": count})
        wait_until(lambda pause_s=pause_s: peer._pause_s > pause_s)


def test_patience_ends(made):
    server = TCPServer("127.0.0.1:0", size=2, max_frame_bytes=100)
    peer = peer_of(server, 1, patience_s=0.4)
    made += [server, peer]
    server.close(5.0)
    with pytest.raises(PeerLostError, match=r"has not reached the server at .* for 0\.4 s"):
        peer.receive(None)
    for call in (lambda: peer.send(0, frame(1)), lambda: peer.probe(0), lambda: peer.receive(0.0)):
        with pytest.raises(PeerLostError):
            call()
    assert peer.lost == {0}


def test_a_server_that_is_back_with_another_job_is_an_error(made):
    first = TCPServer("127.0.0.1:0", size=2, max_frame_bytes=100)
    peer = peer_of(first, 1)
    made.append(peer)
    first.close(5.0)
    assert peer.lost in ({0}, frozenset())
    made.insert(0, TCPServer(str(first.address), size=5, max_frame_bytes=100))
    with pytest.raises(ConfigError, match="size 5"):
        peer.receive(20.0)


def test_frames_to_who_is_not_there_are_dropped(made):
    server = TCPServer("127.0.0.1:0", size=2, max_frame_bytes=100)
    made.append(server)
    server.send(1, frame(1))
    assert (server.pending_bytes(1), server.connections(1), server.lost) == (0, 0, frozenset())
    made.append(peer_of(server, 1))
    server.send(1, frame(2))
    assert receive(made[1]) == (0, [2])


def test_with_the_secret_the_newest_has_the_rank_and_the_other_is_told(server, made):
    made += [peer_of(server, 1, secret=SECRET), peer_of(server, 1, secret=SECRET)]
    with pytest.raises(ConfigError, match=r"another process has connected .* as rank 1 .*; give each process"):
        made[1].receive(20.0)
    made[2].send(0, frame(2))
    assert receive(server) == (1, [2])
    server.send(1, frame(3))
    assert receive(made[2]) == (0, [3])
    assert server.connections(1) == 2
    assert not server.refused


def test_without_a_secret_the_first_keeps_the_rank(made):
    server, first = tcp(2)
    made += [server, first]
    with pytest.raises(PeerLostError, match="another process is connected as this rank"):
        peer_of(server, 1, connect_timeout_s=0.3)
    assert set(server.refused) == {"rank taken"}
    first.send(0, frame(1))
    assert receive(server) == (1, [1])
    first.close(5.0)
    made.append(peer_of(server, 1))
    assert server.connections(1) == 2


def test_of_two_who_come_at_once_without_a_secret_one_has_the_rank(made):
    server = TCPServer("127.0.0.1:0", size=3, max_frame_bytes=100)
    made.append(server)
    with raw(server) as first, raw(server) as second:
        for stream in (first, second):
            stream.sendall(hello(None))
            assert len(read(stream, 80)) == 80
        first.sendall(bytes(32))
        wait_until(lambda: server.connected == {1})
        second.sendall(bytes(32))
        assert ends(second)
        assert server.connections(1) == 1
        first.sendall(seal(None, Header(1, 0, 1, 3), memoryview(b"abc")) + b"abc")
        assert receive(server) == (1, list(b"abc"))


class Reluctant:
    """A socket that takes few bytes at first."""

    def __init__(self, stream, num_bytes):
        self._stream, self._num_bytes = stream, num_bytes

    def sendmsg(self, parts):
        return self._stream.send(b"".join(parts)[: self._num_bytes])

    def __getattr__(self, name):
        return getattr(self._stream, name)


@pytest.mark.parametrize("num_bytes", [1, 63, 64, 65, 164])
def test_a_record_is_whole_however_little_the_system_takes_at_once(num_bytes):
    ours, theirs = socket.socketpair()
    limits = {"max_frame_bytes": 1000, "max_pending_bytes": None}
    writing = Connection(Reluctant(ours, num_bytes), Session(SECRET), Session(SECRET), **limits)
    reading = Connection(theirs, Session(SECRET), Session(SECRET), **limits)
    try:
        for value in range(3):
            writing.send(1, torch.full((100,), value, dtype=torch.uint8))
        assert [reading.read()[1].tolist() for _ in range(3)] == valid_frames(3, 100)
    finally:
        writing.close()
        reading.close()


def valid_frames(count, num_bytes):
    return [[number] * num_bytes for number in range(count)]


def test_one_who_is_not_read_from_waits_and_loses_nothing(made):
    server, peer = tcp(2, max_frame_bytes=100_000, max_pending_bytes=400_000)
    made += [server, peer]
    sent = 0
    while sent < 1000 and peer.pending_bytes(0) < 250_000:  # until the kernel's buffers are full as well
        peer.send(0, torch.full((100_000,), sent % 251, dtype=torch.uint8))
        sent += 1
        time.sleep(0.002)
    assert sent < 1000, "the server takes whatever comes"
    assert server._inbox._waiting_bytes[1] <= 400_000
    for number in range(sent):
        source, got = server.receive(20.0)
        assert source == 1
        assert bool((got == number % 251).all())
    assert peer.connections(0) == 1


# -- a man in the middle ---------------------------------------------------------------------------------------------


def converse(server_and_meddle, count=5, timeout_s=0.3):
    """What the server was given of `count` frames of a peer through a meddler, and the server, closed."""
    server = TCPServer("127.0.0.1:0", size=2, max_frame_bytes=1000, secret=SECRET)
    got = []
    with Meddler(server.address, server_and_meddle) as middle:
        peer = TCPPeer(middle.address, rank=1, size=2, max_frame_bytes=1000, secret=SECRET)
        try:
            for number in range(count):
                peer.send(0, frame(*[number] * 50))
                while arrived := server.receive(timeout_s if number == count - 1 else 0.02):
                    got.append(arrived[1].tolist())
        finally:
            close([server, peer], 0.0)
    return got, server


def valid(count):
    return valid_frames(count, 50)


def test_a_relay_changes_nothing():
    got, server = converse(lambda connection, direction, number, data: [data])
    assert got == valid(5)
    assert not server.refused


@pytest.mark.parametrize("at", [*range(0, 64, 3), 63, 64, 90, 113])
def test_one_changed_bit_of_a_record_is_enough(at):
    def meddle(connection, direction, number, data):
        return [flipped(data, at, bit=at % 8)] if (connection, direction, number) == (0, UP, 4) else [data]

    got, server = converse(meddle)
    assert got[:2] == valid(5)[:2]
    assert all(frame in valid(5) for frame in got), "something else than was sent has been delivered"
    assert [2] * 50 not in got
    length_has_grown = at in range(24, 32) and not server.refused  # then the rest of it is still waited for
    assert length_has_grown or sum(server.refused.values()) == 1


@pytest.mark.parametrize(("direction", "number"), [(UP, 0), (DOWN, 0), (UP, 1), (DOWN, 1)])
@pytest.mark.parametrize("part", [0.1, 0.3, 0.5, 0.99])
def test_one_changed_bit_of_the_handshake_is_enough_and_the_next_attempt_is_good(direction, number, part):
    def meddle(connection, way, index, data):
        meddles = (connection, way, index) == (0, direction, number)
        return [flipped(data, int(part * len(data)))] if meddles else [data]

    got, server = converse(meddle, count=2)
    assert got == valid(2)
    assert server.connections(1) == 1 + (number == 1 and direction == DOWN)  # the welcome is said when it counts


def meddle_with(first, then):
    """Holds record `first` back until the one behind it comes, and says `then(both)` instead."""
    held = []

    def meddle(connection, direction, number, data):
        if connection or direction == DOWN:
            return [data]
        if number == first:
            held.append(data)
            return []
        return then(held[0], data) if number == first + 1 else [data]

    return meddle


@pytest.mark.parametrize(
    ("then", "reason", "delivered"),
    [
        (lambda a, b: [b], "missing", {0}),  # dropped
        (lambda a, b: [b, a], "missing", {0}),  # in another order
        (lambda a, b: [a, a, b], "replayed", {0, 1}),
        (lambda a, b: [a, b, a], "replayed", {0, 1, 2}),
    ],
)
def test_records_that_are_dropped_doubled_or_out_of_order_end_the_connection(then, reason, delivered):
    got, server = converse(meddle_with(3, then), count=3)
    assert server.refused == {reason: 1}
    assert {values[0] for values in got} == delivered


def test_what_was_said_in_another_connection_or_to_another_is_refused(made):
    server = TCPServer("127.0.0.1:0", size=2, max_frame_bytes=1000, secret=SECRET)
    made.append(server)
    with Meddler(server.address) as middle:
        peer = TCPPeer(middle.address, rank=1, size=2, max_frame_bytes=1000, secret=SECRET)
        made.append(peer)
        peer.send(0, frame(1))
        assert receive(server) == (1, [1])
        server.send(1, frame(2))
        assert receive(peer) == (0, [2])
        middle.cut()
        wait_until(lambda: peer.connections(0) == 2)
        old_up, old_down = middle.messages(0, UP)[2:], middle.messages(0, DOWN)[1:]
        assert len(old_up) == 1
        assert len(old_down) == 2
        middle.say(1, UP, old_up[0])
        wait_until(lambda: server.refused == {"unknown session": 1})
        wait_until(lambda: peer.connections(0) == 3)
        middle.say(2, UP, middle.messages(2, DOWN)[1])  # its own words come back to the server
        wait_until(lambda: server.refused == {"unknown session": 2})
        wait_until(lambda: peer.connections(0) == 4)
        middle.say(3, DOWN, old_down[1])
        wait_until(lambda: peer.refused == {"unknown session": 1})
        wait_until(lambda: peer.connections(0) == 5)
        assert server.receive(0.1) is None
        assert peer.receive(0.0) is None


def test_a_recorded_handshake_lets_nobody_in_and_disturbs_nobody(made):
    server = TCPServer("127.0.0.1:0", size=2, max_frame_bytes=1000, secret=SECRET)
    made.append(server)
    with Meddler(server.address) as middle:
        peer = TCPPeer(middle.address, rank=1, size=2, max_frame_bytes=1000, secret=SECRET)
        made.append(peer)
        recorded = middle.messages(0, UP)
        for attempt in range(3):
            with raw(server) as stream:
                for data in recorded:
                    stream.sendall(data)
                assert ends(stream)
            wait_until(lambda attempt=attempt: server.refused == {"unauthenticated": attempt + 1})
        peer.send(0, frame(1))
        assert receive(server) == (1, [1])
        assert server.connections(1) == peer.connections(0) == 1


def test_a_handshake_that_was_held_back_does_not_end_a_newer_connection(made):
    release, held = threading.Event(), threading.Event()

    def meddle(connection, direction, number, data):
        if (connection, direction, number) == (0, UP, 1):
            middle.streams[0][0].shutdown(socket.SHUT_RDWR)  # the peer believes it is over and comes again
            held.set()
            release.wait(20.0)
        return [data]

    server = TCPServer("127.0.0.1:0", size=2, max_frame_bytes=1000, secret=SECRET, handshake_s=20.0)
    made.append(server)
    with Meddler(server.address, meddle) as middle:
        peer = TCPPeer(middle.address, rank=1, size=2, max_frame_bytes=1000, secret=SECRET)
        made.append(peer)
        assert held.is_set()
        release.set()
        wait_until(lambda: not middle._threads[1].is_alive())
        peer.send(0, frame(1))
        assert receive(server) == (1, [1])
        assert server.connections(1) == peer.connections(0) == 1

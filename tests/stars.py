"""Transports in one process for tests: a server and its peers, by name of the kind."""

import contextlib
import time

from distopt.comm import InProcess, Sealed, TCPPeer, TCPServer

SECRET = b"a secret of a test, and long enough"
LARGE = 1 << 24
KINDS = ("in process", "sealed in process", "tcp", "tcp with a secret", "sealed tcp")


def tcp(size, secret=None, max_frame_bytes=LARGE + 64, **options):
    server = TCPServer("127.0.0.1:0", size=size, max_frame_bytes=max_frame_bytes, secret=secret, **options)
    ends = [server]
    try:
        ends.extend(peer_of(server, rank, secret=secret, **options) for rank in range(1, size))
    except BaseException:
        close(ends)
        raise
    return ends


def peer_of(server, rank, secret=None, **options):
    options = {"connect_timeout_s": 20.0, "max_frame_bytes": server.max_frame_bytes, **options}
    return TCPPeer(str(server.address), rank=rank, size=server.size, secret=secret, **options)


def close(ends, timeout_s=5.0):
    for end in reversed(ends):
        end.close(timeout_s)


@contextlib.contextmanager
def star(kind, size):
    """The ends in rank order, closed in the end."""
    secret = SECRET if "secret" in kind else None
    ends = tcp(size, secret) if "tcp" in kind else InProcess.connect(size)
    if kind.startswith("sealed"):
        ends = [Sealed(end, SECRET) for end in ends]
    try:
        yield ends
    finally:
        close(ends)


def wait_until(condition, timeout_s=20.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.005)

"""Addresses "host:port", and the sockets that listen and connect there.

Limits: Linux. TCP keeps asking an idle other side whether it is there, and gives a connection up on which that machine
has been silent, or has taken nothing, for so long as is said here; for a process that is only stopped the kernel
answers.
"""

import errno
import fcntl
import ipaddress
import os
import socket
import struct
from typing import NamedTuple

from distopt.errors import ConfigError

_BACKLOG = 128
_SIOCGIFADDR = 0x8915  # asks an interface for its address
_PROBES = 3  # unanswered ones before TCP gives an idle connection up


class Address(NamedTuple):
    """Where a server listens; as text again "host:port", with brackets around an IPv6 address."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """The address that is written as "host:port", "[IPv6 address]:port" for IPv6.

    Raises:
        ConfigError: It is not written so, or the port is not in 0 to 65535.
    """
    if not isinstance(text, str):
        raise ConfigError(f"an address must be text like 'host:port', got {text!r}")
    host, colon, port = text.strip().rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not colon or not host or any(sign in host for sign in "[]/ \t\n"):
        raise ConfigError(
            f"an address must be 'host:port' or '[IPv6 address]:port', got {text!r}; name the host, for a server one "
            "of this machine's own addresses, such as 192.0.2.7:9000"
        )
    if bracketed != (":" in host):
        raise ConfigError(f"an IPv6 address stands in brackets and no other, got {text!r}; write '[::1]:9000'")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise ConfigError(f"a port must be a number from 0 to 65535, got {port!r} in {text!r}; write 'host:9000'")
    return Address(host, int(port))


def own_address(towards: str | None) -> str:
    """The IPv4 address by which others reach this machine.

    That of the interface `GLOO_SOCKET_IFNAME`, the first where it names several, if it is set; else the one on the way
    to that host, and the loopback's where there is none to go by.

    Raises:
        OSError: There is no such interface, or no way to that host.
    """
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if interface:
        return interface_address(interface)
    if towards is None:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))  # sends nothing: it asks for the way there
        return str(probe.getsockname()[0])


def interface_address(name: str) -> str:
    """The IPv4 address of one of this machine's interfaces.

    Raises:
        OSError: There is no such interface, or it has none.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", name.encode()[:15])
        return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])


def is_loopback(host: str) -> bool:
    """Whether this numeric address is reached only from the machine itself."""
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def open_listener(address: Address, *, needs_loopback: bool) -> socket.socket:
    """A socket that listens on this interface and no other; with port 0 on a port of the system's choice.

    Args:
        address: Of this machine.
        needs_loopback: Refuses what other machines could reach.

    Raises:
        ConfigError: It is no address of this machine, or is in use, or others could reach it and must not.
    """
    try:
        found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot listen on {address}: the host is not known ({error}); give an address") from error
    family, kind, protocol, _, place = found[0]
    if needs_loopback and not is_loopback(str(place[0])):
        raise ConfigError(need_of_secret(address))
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a server that ended linger
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(place)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {address}: {_why_not(error, address)}") from error
    except BaseException:
        listener.close()
        raise
    return listener


def need_of_secret(address: Address) -> str:
    """What is wrong with an address that other machines can reach, in a job without a secret."""
    return (
        f"without a job secret TCP stays on this machine (127.0.0.1, [::1]), got {address}; give all processes of the "
        "job the same one in DISTOPT_JOB_SECRET or DISTOPT_JOB_SECRET_FILE, made with "
        'python -c "import secrets; print(secrets.token_hex(32))"'
    )


def keep_watch(connection: socket.socket, silence_s: float) -> None:
    """Lets the kernel end this connection after the other side has been silent, or has taken nothing, for so long."""
    step_s = max(1, round(silence_s / (_PROBES + 1)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, step_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, step_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, round(silence_s * 1000)))


def _why_not(error: OSError, address: Address) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"the port is in use; end the process that listens there (ss -ltnp 'sport = :{address.port}' names it), or "
            "take another port (0: the system chooses one)"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return "the host is not an address of this machine; give one that `ip address` lists"
    if error.errno == errno.EACCES:
        return "the system does not allow it; take a port above 1023"
    return f"{error.strerror}; give another address"

"""A transport on plain TCP sockets: a server, rank 0, and peers that come and go.

A group of gloo or MPI ranks fails as a whole when one of them dies. Here the server outlives its peers, and they
outlive it: a peer whose connection breaks, or whose server is gone, connects again by itself, with pauses that grow and
are random, until its patience ends. `lost` is who is not connected now; see `ReturningTransport` for what a return
means. Peers talk to the server only.

With a job secret every connection begins with a mutual proof that both ends have it, and every record is authenticated
under keys of that connection (`handshake.py`, `distopt.comm.session`); what does not authenticate ends its connection
and is counted in `refused`. Without a secret the transport works on the loopback interface only.

Who connects with the secret as a rank that is connected already takes its place: the connection that is there may be a
dead one that nobody has noticed. If a process is still at its other end it is told, and raises `ConfigError` instead of
coming back. Without a secret the first one keeps the rank while it is connected.

Each connection has a thread that reads and one that writes, so one that is slow keeps no other waiting. Connections
that have not shown who they are yet are few and have little time; when there are too many, the oldest of the host that
has most of them is ended.

Limits: Linux. Nothing is encrypted. A process that is stopped counts as connected, until more waits for it than may.
"""

from distopt.comm.tcp.peer import TCPPeer
from distopt.comm.tcp.server import TCPServer

__all__ = ["TCPPeer", "TCPServer"]

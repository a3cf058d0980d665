"""What roles (master and worker, server and client) talk through: frames of bytes from any rank to any other.

A transport only carries. Who may speak, what a frame means, how many may be on their way and when to give up is for
the roles. Implementations: `InProcess` (queues, for tests and simulation), `GlooTransport`, `MPITransport`, and
`TCPServer` with `TCPPeer`, where peers come and go; `Sealed` authenticates what another transport carries.
"""

from typing import Protocol, runtime_checkable

from torch import Tensor


class Transport(Protocol):
    """Frames between `size` ranks; this end is `rank`. Every method may be called from any thread.

    A frame is a 1-D contiguous uint8 CPU tensor. Frames from one rank to another arrive in order; there is no order
    between ranks.
    """

    @property
    def rank(self) -> int:
        """This end."""

    @property
    def size(self) -> int:
        """Number of ends."""

    @property
    def lost(self) -> frozenset[int]:
        """Ranks whose connection is known to be gone; they come back in a `ReturningTransport` only."""

    @property
    def closed(self) -> bool:
        """Whether `close` was called here: nothing will be received any more."""

    def send(self, destination: int, frame: Tensor) -> None:
        """Queues a frame and returns at once. The frame must not be changed any more; to a lost rank it is dropped.

        Raises:
            ConfigError: There is no such rank, or the frame is longer than the transport carries.
        """

    def receive(self, timeout_s: float | None) -> tuple[int, Tensor] | None:
        """The next frame from any rank, with its source; None after `timeout_s`, or when this end is closed.

        A receiver's buffer may be longer than the frame that was sent: the frame itself must say where it ends.
        """

    def pending_bytes(self, destination: int) -> int:
        """Bytes queued or on their way that the other end has not taken yet."""

    def probe(self, destination: int) -> None:
        """Sends an empty frame unless something is on its way already, so that a silent rank's death is noticed."""

    def close(self, timeout_s: float) -> None:
        """Lets the others take what is queued, for at most `timeout_s`, and ends. May be called twice."""


@runtime_checkable
class ReturningTransport(Transport, Protocol):
    """A transport whose ranks may come back after they were lost, as the same process or as another.

    What was on its way when a connection ended is gone, in both directions, and what is sent until the next one is
    dropped. A rank that is back is in `lost` no more; who may have been lost and be back again between two looks at
    `lost` is told by `connections`, so a role that has to say something to every connection compares that.
    """

    def connections(self, rank: int) -> int:
        """How often that rank has been connected: 0 until it comes, one more each time that it comes back."""

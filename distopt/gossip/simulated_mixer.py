"""The exchange among simulated nodes: a product with the round's matrix."""

from collections.abc import Callable

import torch
from torch import Tensor

from distopt.gossip.codec import Codec
from distopt.gossip.graph import Graph
from distopt.gossip.mixing.mixer import Mixer
from distopt.gossip.topology import Topology


class SimulatedMixer:
    """See `Mixer`. Row i is node i's.

    Args:
        graph: Of the round.
        device: Of the rows.

    Attributes:
        bytes_sent: By all nodes together.
    """

    def __init__(self, graph: Graph, device: torch.device) -> None:
        self._weights = torch.from_numpy(graph.weights.copy()).to(device)
        self._messages = sum(len(graph.receivers(rank)) for rank in range(graph.num_ranks))
        self.squares = self._weights.square().sum(1)
        self.bytes_sent = 0

    def mix(self, *rows: Tensor, by_squares: Tensor | None = None) -> tuple[Tensor, ...]:
        """See `Mixer.mix`."""
        sent = rows if by_squares is None else (*rows, by_squares)
        self.bytes_sent += self._messages * sum(each.nbytes // len(each) for each in sent)
        mixed = tuple(_product(self._weights, each) for each in rows)
        return mixed if by_squares is None else (*mixed, _product(self._weights.square(), by_squares))

    def mix_(self, rows: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """See `Mixer.mix_`."""
        mixed, *rest = self.mix(rows, *others)
        rows.copy_(mixed)
        return tuple(rest)

    def mix_coded(self, rows: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
        """See `Mixer.mix_coded`."""
        width = rows.shape[1]
        self.bytes_sent += self._messages * codec.num_bytes(width)
        decoded = torch.stack([codec.decode(codec.encode(row), width, rows.dtype) for row in rows])
        return decoded, _product(self._weights, decoded)


class SimulatedExchange:
    """Rounds one after the other.

    Args:
        topology: Of the nodes.
        num_nodes: n.
        device: Of the rows.

    Attributes:
        round: Number of the next.
        bytes_sent: By all nodes together.
    """

    def __init__(self, topology: Topology, num_nodes: int, device: torch.device) -> None:
        self._topology, self._num_nodes, self._device = topology, num_nodes, device
        self.round = self.bytes_sent = 0

    def perform(self, act: Callable[[Mixer], None]) -> None:
        """Calls it with the next round's exchange."""
        mixer = SimulatedMixer(self._topology.graph(self._num_nodes, self.round), self._device)
        act(mixer)
        self.round += 1
        self.bytes_sent += mixer.bytes_sent


def _product(weights: Tensor, rows: Tensor) -> Tensor:
    wide = torch.promote_types(rows.dtype, torch.float32)
    return (weights.to(wide) @ rows.to(wide)).to(rows.dtype)

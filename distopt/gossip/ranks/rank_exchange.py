"""The exchanges of gossip among the ranks that are there: a mixer on the crew's graph for each round."""

from collections.abc import Callable

from distopt.comm.crew.assembly import Crew
from distopt.comm.crew.exchange import Exchange
from distopt.comm.crew.staging import Staging
from distopt.gossip.mixing.mixer import Mixer
from distopt.gossip.ranks.rank_mixer import RankMixer
from distopt.gossip.topology import Topology


class RankExchange:
    """See the module.

    Args:
        exchange: Of this rank.
        topology_of: The topology of a crew's members, as that of their places.
        patience_s: For a connected member to say something.

    Attributes:
        bytes_sent: By this rank, in exchanges.
    """

    def __init__(
        self, exchange: Exchange, topology_of: Callable[[tuple[int, ...]], Topology], patience_s: float
    ) -> None:
        self._exchange, self._topology_of, self._patience_s = exchange, topology_of, patience_s
        self._staging = Staging()
        self._found: tuple[tuple[int, ...], Topology] | None = None
        self.bytes_sent = 0

    def perform(self, act: Callable[[Mixer], None]) -> None:
        """One exchange: `act` with the round's mixer; see `Exchange.perform`."""
        self._exchange.perform(lambda crew, round_: self._mixed(act, crew, round_))

    def _mixed(self, act: Callable[[Mixer], None], crew: Crew, round_: int) -> None:
        graph = self._topology(crew.members).graph(len(crew.members), round_)
        mixer = RankMixer(crew.group, crew.place, graph, round_, self._staging, self._patience_s)
        try:
            act(mixer)
        finally:
            self.bytes_sent += mixer.bytes_sent

    def _topology(self, members: tuple[int, ...]) -> Topology:
        if self._found is None or self._found[0] != members:
            self._found = members, self._topology_of(members)
        return self._found[1]

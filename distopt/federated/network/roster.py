"""The sites of a federated service: who has said hello, whom each hosts, and who can be given work.

A site that does not fit, because it means another job or hosts somebody else's clients, is refused and told why.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distopt.comm import Transport
from distopt.federated.data import ClientData
from distopt.federated.network import letters
from distopt.federated.network.facts import difference, sample_difference
from distopt.federated.network.journal import hosted
from distopt.federated.network.letters import SERVER, Failed, Hello, Letter, Ready, Refusal, Welcome

_log = logging.getLogger("distopt")
_PROBE_S = 1.0  # how often silent sites are probed
_QUIET_S = 30.0  # a site that is not asked for anything hears so often that the server is there
OTHER_SESSION = "another session"  # a reason to refuse


@dataclass
class Site:
    """What the server knows of one.

    Attributes:
        rank: Its, or its leader's.
        hosts: Its clients.
        ready: Whether it can be given work.
        connection: How often it had connected when it said so.
        told_s: When it was told something last.
    """

    rank: int
    hosts: frozenset[int]
    ready: bool = False
    connection: int = 0
    told_s: float = field(default_factory=time.monotonic)


class Roster:
    """See the module.

    Args:
        transport: To the sites.
        facts: Of the job, see `facts_of`.
        settings: What sites that were not told otherwise take over.
        num_clients: N.
        data: The clients' data, where the server has them.

    Attributes:
        session: Of the server since `open`.
        refused: What was not of a site of this job, by reason.
        refusals: The latest reason of each rank.
        bytes_sent: In frames.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        facts: Mapping[str, Any],
        settings: Mapping[str, Any],
        num_clients: int,
        data: ClientData | None,
    ) -> None:
        self.session = ""
        self.refused: Counter[str] = Counter()
        self.refusals: dict[int, str] = {}
        self.bytes_sent = 0
        self._transport = transport
        self._facts, self._settings = facts, settings
        self._num_clients, self._data = num_clients, data
        self._version = 0
        self._sites: dict[int, Site] = {}
        self._host_of: dict[int, int] = {}
        self._probed_s = 0.0
        self._warned: set[tuple[int, str]] = set()

    def open(self, version: int) -> None:
        """A new session, which begins at this version: all sites have to say hello again."""
        self.session, self._version = os.urandom(8).hex(), version
        self._sites, self._host_of = {}, {}

    @property
    def ready(self) -> list[int]:
        """Ranks of the sites that can be given work."""
        return [rank for rank in self._sites if self.is_ready(rank)]

    def is_ready(self, rank: int) -> bool:
        """Whether a site can be given work."""
        site = self._sites.get(rank)
        return site is not None and site.ready and rank not in self._transport.lost and self._is_here(site)

    @property
    def unhosted(self) -> list[int]:
        """Clients that no site has said to host."""
        return sorted(set(range(self._num_clients)) - set(self._host_of))

    def host_of(self, client: int) -> int | None:
        """The rank of the site that hosts it and can be given work; None if there is none."""
        rank = self._host_of.get(client)
        return rank if rank is not None and self.is_ready(rank) else None

    def hosts(self, rank: int, client: int) -> bool:
        """Whether that is the client's site."""
        return self._host_of.get(client) == rank

    def tell(self, rank: int, letter: Letter) -> None:
        """Sends a letter."""
        frame = letters.encode(letter)
        self.bytes_sent += frame.numel()
        if rank in self._sites:
            self._sites[rank].told_s = time.monotonic()
        self._transport.send(rank, frame)

    def tell_all(self, letter: Letter) -> None:
        """Sends a letter to all that have said hello and are not lost."""
        for rank in self._sites:
            if rank not in self._transport.lost:
                self.tell(rank, letter)

    def refuse(self, rank: int, reason: str, why: object = "") -> None:
        """Counts what is not taken, and says so once for each rank and reason."""
        self.refused[reason] += 1
        if (rank, reason) not in self._warned:
            self._warned.add((rank, reason))
            _log.warning("refused a message of rank %d (%s) %s", rank, reason, why)

    def refused_in_round(self) -> Counter[str]:
        """What a round's row counts, which begins anew: not what was meant for a server before this one.

        That would make the history of a server that was killed and started again another one.
        """
        counted, self.refused = self.refused, Counter()
        if others := counted.pop(OTHER_SESSION, 0):
            self.refused[OTHER_SESSION] = others
        return counted

    def greet(self, hello: Hello) -> None:
        """Welcomes a site, or refuses it. One that is in this session already is only heard."""
        if hello.session == self.session and hello.sender in self._sites:
            self._sites[hello.sender].connection = self.connections(hello.sender)
            return
        reason = self._why_not(hello)
        if reason is not None:
            self.refusals[hello.sender] = reason
            self.refuse(hello.sender, "not of this job", reason)
            self.tell(hello.sender, Refusal(sender=SERVER, session=self.session, reason=reason))
            return
        self.refusals.pop(hello.sender, None)
        self._forget(hello.sender)
        self._sites[hello.sender] = Site(
            hello.sender, frozenset(hello.hosts), connection=self.connections(hello.sender)
        )
        self._host_of.update(dict.fromkeys(hello.hosts, hello.sender))
        self.tell(
            hello.sender,
            Welcome(sender=SERVER, session=self.session, version=self._version, settings=self._settings),
        )

    def take_ready(self, letter: Ready) -> None:
        """The site is."""
        if letter.session == self.session and letter.sender in self._sites:
            site = self._sites[letter.sender]
            if not site.ready:
                _log.info("rank %d takes part with %s", letter.sender, hosted(sorted(site.hosts)))
            site.ready = True

    def take_failure(self, letter: Failed) -> None:
        """The site does not go on."""
        if letter.sender in self._sites and letter.session == self.session:
            self.refusals[letter.sender] = letter.reason
            self._forget(letter.sender)
            _log.warning("the site of rank %d does not take part any more: %s", letter.sender, letter.reason)

    def look_after(self) -> None:
        """Finds out, now and then, whether silent sites are lost, and lets those hear something that wait long."""
        now = time.monotonic()
        if now - self._probed_s < _PROBE_S:
            return
        self._probed_s = now
        for rank, site in self._sites.items():
            if rank in self._transport.lost:
                continue
            self._transport.probe(rank)
            if now - site.told_s > _QUIET_S and not self._transport.pending_bytes(rank):
                self.tell(rank, letters.Saving(sender=SERVER, session=self.session, version=None))

    def _forget(self, rank: int) -> None:
        if (site := self._sites.pop(rank, None)) is not None:
            for client in site.hosts:
                if self._host_of.get(client) == rank:  # another one may have come for it meanwhile
                    del self._host_of[client]

    def _is_here(self, site: Site) -> bool:
        """Whether it has not been lost since it said hello; who comes back says hello again."""
        return self.connections(site.rank) == site.connection

    def connections(self, rank: int) -> int:
        """How often a rank has connected, where ranks can come back; else always 0."""
        connections = getattr(self._transport, "connections", None)
        return 0 if connections is None else int(connections(rank))

    def _why_not(self, hello: Hello) -> str | None:
        site = f"rank {hello.sender}"
        if hello.hosts and max(hello.hosts) >= self._num_clients:
            return (
                f"hosts must be clients from 0 to {self._num_clients - 1}, got {max(hello.hosts)} on {site}; give the "
                "server the right number of clients"
            )
        if not hello.hosts:
            return (
                f"there must be at least one client for each site, got none for {site}; start at most "
                f"{self._num_clients} sites, or say whom each hosts with hosts="
            )
        if (different := difference(self._facts, hello.facts, site)) is not None:
            return different
        if self._data is not None:
            found = sample_difference(self._data, hello.hosts, hello.samples, site)
            if found is not None:
                return found
        for client in hello.hosts:
            other = self._host_of.get(client)
            if other not in (None, hello.sender) and other not in self._transport.lost:
                return (
                    f"each client must be hosted by one site, got client {client} of ranks {other} and {hello.sender}"
                )
        return None

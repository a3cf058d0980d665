"""Which node of Flower's is which client: each is asked once, and says its number and whether the job fits it."""

import logging
from collections.abc import Set

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from distopt.errors import CompatibilityError, PeerLostError, StateMismatchError
from distopt.integrations.flower.app import ACTION
from distopt.integrations.flower.client_memory import NEVER
from distopt.integrations.flower.mail import Answer, Clock, Mail
from distopt.integrations.flower.records import ROUND

_log = logging.getLogger("distopt")


class Roll:
    """The nodes that are there.

    Args:
        mail: For the questions.
        grid: Of Flower's, which knows the nodes.
        question: What each node is asked, see `add_client`.
        num_clients: How many are registered.
        connect_s: How long to wait for nodes.
        clock: The real one, but in tests.
        remember: The clients that must still have what they kept in an earlier run.
    """

    def __init__(
        self,
        mail: Mail[int],
        grid: Grid,
        *,
        question: ConfigRecord,
        num_clients: int,
        connect_s: float,
        clock: Clock,
        remember: Set[int] = frozenset(),
    ) -> None:
        self._mail, self._grid, self._question = mail, grid, question
        self._num_clients = num_clients
        self._connect_s, self._clock = connect_s, clock
        self._remember = remember
        self._client_of: dict[int, int] = {}  # node, client
        self._asked: set[int] = set()

    @property
    def node_of(self) -> dict[int, int]:
        """The node of each client that is there; of two nodes that say the same, the one that came last."""
        return {client: node for node, client in self._client_of.items()}

    def gather(self) -> None:
        """Waits until all clients are there.

        Raises:
            CompatibilityError: A client cannot take part in this job, and says why.
            PeerLostError: Some are missing; names them.
        """
        until = self._clock.monotonic() + self._connect_s
        while True:
            self._look(fail=True)
            missing = sorted(set(range(self._num_clients)) - set(self.node_of))
            if not missing:
                return
            if self._clock.monotonic() >= until:
                raise PeerLostError(self._who_is_missing(missing), missing)
            self._mail.pause(until)

    def refresh(self) -> dict[int, int]:
        """The node of each client that is there now. Waits only where nobody is.

        Raises:
            PeerLostError: Nobody has come back in time.
        """
        self._look(fail=False)
        until = self._clock.monotonic() + self._connect_s
        while not self._client_of:
            if self._clock.monotonic() >= until:
                raise PeerLostError(
                    f"there must be clients, got none for {self._connect_s:g} s: all nodes are gone; start them again, "
                    "and go on from the checkpoint if there is one"
                )
            self._mail.pause(until)
            self._look(fail=False)
        return self.node_of

    def _look(self, *, fail: bool) -> None:
        here = set(self._grid.get_node_ids())
        self._asked &= here
        self._client_of = {node: client for node, client in self._client_of.items() if node in here}
        new = sorted(here - self._asked)
        self._asked |= here
        content = RecordDict({ROUND: self._question})
        messages = [
            (node, Message(content, dst_node_id=node, message_type=f"query.{ACTION}", ttl=self._connect_s))
            for node in new
        ]
        for answer in [*self._mail.send(messages, self._connect_s), *self._mail.collect()]:
            problem = self._enter(answer)
            if problem is not None:
                if fail:
                    raise problem
                _log.warning("a node is left out: %s", problem)

    def _enter(self, answer: Answer[int]) -> Exception | None:
        if answer.message is None and answer.may_work_later:
            self._asked.discard(answer.about)  # it is asked once more, if it is still there
            _log.warning("node %d has not said which client it is: %s", answer.about, answer.why)
            return None
        if answer.message is None:
            return CompatibilityError(
                f"every node must be able to say which client it is, got from one: {answer.why}; make its app with "
                "client_app or add_client"
            )
        said = answer.message.content.config_records.get(ROUND, ConfigRecord())
        if "problem" in said:
            return CompatibilityError(
                f"every client must be able to take part, got a problem of one: {said['problem']!s}"
            )
        client = said.get("client")
        if not isinstance(client, int) or not 0 <= client < self._num_clients:
            return CompatibilityError(f"a node must say which client it is, got {client!r}; use add_client in its app")
        if client in self._remember and said.get("answered") == NEVER:
            return StateMismatchError(
                f"client {client} must still have what it kept before the server's checkpoint, got nothing; give "
                "client_app a folder from the first round on, or begin anew without the checkpoint"
            )
        self._client_of.pop(answer.about, None)
        self._client_of[answer.about] = client  # at the end: of two nodes with one number the last one counts
        return None

    def _who_is_missing(self, missing: list[int]) -> str:
        have = sorted(self._client_of.values())
        twice = sorted({client for client in have if have.count(client) > 1})
        listed = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        return (
            f"there must be a node for each of the {self._num_clients} clients, got {len(set(have))} in "
            f"{self._connect_s:g} s: nobody is client {listed}"
            + (f", and several nodes say that they are client {', '.join(map(str, twice))}" if twice else "")
            + '; start the missing ones with flower-supernode --node-config "partition-id=..." or '
            f"--federation-config 'num-supernodes={self._num_clients}', or wait longer with connect_s"
        )

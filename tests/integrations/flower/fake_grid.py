"""Flower without Flower's processes: nodes that are function calls, and a clock that jumps."""

from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


class JumpingClock:
    """A `Clock` that only sleeping moves."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class FakeGrid(Grid):
    """Nodes that answer after some seconds of a clock.

    Args:
        app: Theirs.
        clients: "partition-id" of each node.
        clock: Says what time it is.
        seconds: seconds(client) of one work.
        run_config: The same for all.
    """

    def __init__(self, app, clients, *, clock=None, seconds=lambda client: 0.0, run_config=None):
        self.app, self.clock, self.seconds = app, clock or JumpingClock(), seconds
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # as Flower's processes do
        self.contexts = {}
        self.run_config = run_config or {}
        self.gone = set()
        self.asked = []
        self._due = {}
        for client in clients:
            self.join(client)

    def join(self, client):
        """A node more; its id is none of a client's numbers."""
        node = 1000 + 7 * len(self.contexts)
        config = {} if client is None else {"partition-id": client}
        self.contexts[node] = Context(1, node, config, RecordDict(), self.run_config)
        return node

    def set_run(self, run):
        raise NotImplementedError

    run = property(set_run)
    create_message = set_run

    def get_node_ids(self):
        return [node for node in reversed(self.contexts) if node not in self.gone]  # in an order that means nothing

    def push_messages(self, messages):
        ids = []
        for message in messages:
            key = str(uuid4())
            message.metadata.__dict__["_message_id"] = key
            node = message.metadata.dst_node_id
            if node in self.gone:
                continue
            client = self.contexts[node].node_config.get("partition-id")
            train = message.metadata.message_type.startswith("train")
            if train:
                self.asked.append(client)
            self._due[key] = self.clock.now + (self.seconds(client) if train else 0.0), message
            ids.append(key)
        return ids

    def pull_messages(self, message_ids):
        due = sorted((self._due[key][0], key) for key in message_ids if key in self._due)
        return [self._answer(self._due.pop(key)[1]) for when, key in due if when <= self.clock.now + 1e-9]

    def _answer(self, message):
        node = message.metadata.dst_node_id
        if node in self.gone:
            return Message(Error(5, "Node Unavailable"), reply_to=message)
        try:
            return self.app(message, self.contexts[node])
        except Exception as error:  # as Flower does
            return Message(Error(2, f"{type(error).__name__}: {error}"), reply_to=message)

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        self.push_messages(messages)
        self.clock.now += timeout or 0.0
        return self.pull_messages([message.metadata.message_id for message in messages])

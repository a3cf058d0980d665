"""A site whose server is gone in a task, and back: it says so at once, and drops what nobody waits for."""

import threading
from types import SimpleNamespace

import pytest
import torch

from distopt.comm import InProcess
from distopt.federated import FederatedAlgorithm
from distopt.federated.messages import Broadcast, Reply
from distopt.federated.network import letters
from distopt.federated.network.journal import Journal
from distopt.federated.network.letters import Answer, End, Hello, Ready, Task, Welcome
from distopt.federated.network.site import Site


class Returning:
    """An end whose connection ends and begins again when a test says so."""

    def __init__(self, end):
        self._end, self.count = end, 1

    def __getattr__(self, name):
        return getattr(self._end, name)

    def connections(self, rank):
        return self.count


class Trainer:
    """Answers with zeros; `then` happens while a client is trained."""

    uplink = None
    algorithm = FederatedAlgorithm.from_dict({"algorithm": "fedau"})
    layout = SimpleNamespace(num_elements=3, num_trained=3, dtype=torch.float64)

    def __init__(self, then):
        self._then, self.trained = then, []

    def train(self, broadcast, clients):
        self.trained += clients
        self._then(clients[0])
        (client,) = clients
        delta = torch.zeros(3, dtype=torch.float64)
        version = broadcast.version
        return [Reply(client=client, version=version, num_samples=1, num_steps=1, tensors={"delta": delta})]


def heard(server):
    """The next letter but the last, in the order in which they came."""
    got = server.receive(10.0)
    assert got is not None
    return letters.decode(got[1])


@pytest.mark.parametrize("with_file", [False, True])
def test_who_finds_a_new_connection_in_a_task_says_hello_and_answers_nothing_of_the_old_one(tmp_path, with_file):
    server, end = InProcess.connect(2)
    site_end = Returning(end)

    def then(client):
        if client == 1:
            site_end.count = 2

    trainer = Trainer(then)
    journal = Journal({}, tmp_path / "site.pt" if with_file else None)
    site = Site(
        site_end, hosts=[0, 1, 2], samples=[1, 1, 1], facts={}, build=lambda settings: (trainer, journal), wait_s=30.0,
        patience_s=30.0, may_return=True,
    )  # fmt: skip
    found = []
    thread = threading.Thread(target=lambda: found.append(site.take_part()), daemon=True)
    thread.start()

    def tell(letter):
        server.send(1, letters.encode(letter))

    assert isinstance(heard(server), Hello)
    tell(Welcome(sender=0, session="first", version=0, settings={}))
    assert heard(server) == Ready(sender=1, session="first")
    broadcast = Broadcast(version=0, model=torch.zeros(3, dtype=torch.float64), extras={})
    task = Task(sender=0, session="first", saved=0, overrules=False, clients=[0, 1, 2], broadcast=broadcast)
    tell(task)
    if not with_file:
        answer = heard(server)
        assert isinstance(answer, Answer)
        assert answer.reply.client == 0
    again = heard(server)
    assert isinstance(again, Hello), again
    assert again.session == "first"
    assert isinstance(heard(server), Ready)
    tell(Welcome(sender=0, session="second", version=0, settings={}))
    assert heard(server) == Ready(sender=1, session="second")
    tell(End(sender=0, session="second"))
    thread.join(10)
    assert trainer.trained == [0, 1]
    assert found[0].overruled == 2
    assert server.receive(0.0) is None

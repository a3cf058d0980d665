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


def begun(server, site_end, trainer, journal):
    """What the site returns, once it has ended, its thread, and how to tell it something."""
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
    return found, thread, tell


def task(version, clients, *, session="first", overrules=False):
    broadcast = Broadcast(version=version, model=torch.zeros(3, dtype=torch.float64), extras={})
    return Task(sender=0, session=session, saved=0, overrules=overrules, clients=clients, broadcast=broadcast)


@pytest.mark.parametrize("overrules", [True, False])
def test_a_newer_task_overrules_the_one_at_work_where_the_server_says_so(overrules):
    server, end = InProcess.connect(2)
    at_work, go_on = threading.Event(), threading.Event()

    def then(client):
        at_work.set()
        assert go_on.wait(10)

    trainer = Trainer(then)
    found, thread, tell = begun(server, Returning(end), trainer, Journal({}))
    tell(task(0, [0, 1, 2], overrules=overrules))
    assert at_work.wait(10)
    tell(task(1, [1], overrules=overrules))
    tell(task(2, [2], overrules=overrules))
    tell(End(sender=0, session="first")) if overrules else None
    go_on.set()
    if not overrules:
        assert [heard(server).reply.version for _ in range(5)] == [0, 0, 0, 1, 2]
        tell(End(sender=0, session="first"))
    thread.join(10)
    assert trainer.trained == ([0] if overrules else [0, 1, 2, 1, 2])
    assert found[0].overruled == (3 if overrules else 0)


def test_what_is_said_in_another_session_is_not_followed():
    server, end = InProcess.connect(2)
    trainer = Trainer(lambda client: None)
    found, thread, tell = begun(server, Returning(end), trainer, Journal({}))
    tell(task(0, [0], session="another"))
    tell(End(sender=0, session="another", reason="of somebody else"))
    tell(task(0, [1]))
    tell(End(sender=0, session="first"))
    thread.join(10)
    assert found[0].refused == {"another session": 2}
    assert 0 not in trainer.trained


@pytest.mark.parametrize("with_file", [False, True])
def test_who_finds_a_new_connection_in_a_task_says_hello_and_answers_nothing_of_the_old_one(tmp_path, with_file):
    server, end = InProcess.connect(2)
    site_end = Returning(end)

    def then(client):
        if client == 1:
            site_end.count = 2

    trainer = Trainer(then)
    journal = Journal({}, tmp_path / "site.pt" if with_file else None)
    found, thread, tell = begun(server, site_end, trainer, journal)
    tell(task(0, [0, 1, 2]))
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

"""Who hosts whom, as sites come, are lost and come again."""

import dataclasses

import pytest

from distopt.comm import InProcess
from distopt.federated.network import letters
from distopt.federated.network import roster as module
from distopt.federated.network.letters import Failed, Hello, Ready, Saving
from distopt.federated.network.roster import Roster


class Lossy:
    """An end whose others are lost and come back when a test says so."""

    def __init__(self, end):
        self._end, self.lost, self.count = end, frozenset(), {}

    def __getattr__(self, name):
        return getattr(self._end, name)

    def connections(self, rank):
        return self.count.get(rank, 1)


@pytest.fixture
def begun():
    end, *sites = InProcess.connect(4)
    transport = Lossy(end)
    roster = Roster(transport, facts={}, settings={}, num_clients=6, data=None)
    roster.open(0)
    return transport, roster, sites


def hello(rank, *hosts, session=""):
    return Hello(sender=rank, session=session, hosts=hosts, samples=[1] * len(hosts), facts={})


def come(roster, rank, *hosts):
    roster.greet(hello(rank, *hosts))
    roster.take_ready(Ready(sender=rank, session=roster.session))


def hosts(roster):
    return [roster.host_of(client) for client in range(6)]


def test_a_client_has_one_site(begun):
    _, roster, sites = begun
    come(roster, 1, 0, 1)
    come(roster, 2, 1, 2)
    assert hosts(roster) == [1, 1, None, None, None, None]
    told = letters.decode(sites[1].receive(1.0)[1])
    assert "each client must be hosted by one site, got client 1 of ranks 1 and 2" in told.reason
    assert roster.refused == {"not of this job": 1}


def test_who_comes_for_a_lost_sites_clients_keeps_them_whatever_becomes_of_it(begun):
    transport, roster, _ = begun
    come(roster, 1, 0, 1)
    transport.lost = frozenset({1})
    come(roster, 2, 1, 2)
    transport.lost, transport.count = frozenset(), {1: 2}
    roster.greet(dataclasses.replace(hello(1, 0, 1), session=roster.session))
    assert hosts(roster) == [1, 2, 2, None, None, None]
    roster.take_failure(Failed(sender=1, session=roster.session, reason="no more"))
    assert hosts(roster) == [None, 2, 2, None, None, None]
    roster.take_failure(Failed(sender=2, session=roster.session, reason="no more"))
    assert roster.unhosted == list(range(6))


def test_who_is_back_is_given_nothing_before_it_says_hello(begun):
    transport, roster, _ = begun
    come(roster, 1, 0)
    transport.count = {1: 2}
    assert roster.ready == []
    roster.greet(dataclasses.replace(hello(1, 0), session=roster.session))
    assert roster.ready == [1]


def test_a_site_that_is_not_asked_for_anything_hears_that_the_server_is_there(begun, monkeypatch):
    _, roster, sites = begun
    come(roster, 1, 0)
    sites[0].receive(1.0)  # the welcome
    roster.look_after()
    assert sites[0].receive(0.0) is None
    monkeypatch.setattr(module, "_PROBE_S", -1.0)
    monkeypatch.setattr(module, "_QUIET_S", -1.0)
    roster.look_after()
    assert letters.decode(sites[0].receive(1.0)[1]) == Saving(sender=0, session=roster.session, version=None)

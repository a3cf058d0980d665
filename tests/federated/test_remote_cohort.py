"""Server and sites over queues in one process: the simulation's history and model to the bit, and what is refused."""

import dataclasses
import re
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_algorithm_laws import NOISELESS
from torch import nn

from distopt.comm import InProcess
from distopt.errors import CompatibilityError, ConfigError, DistoptError, PeerLostError, StateMismatchError
from distopt.federated import (
    AfterArrivals,
    Bernoulli,
    ClientData,
    DirichletPartition,
    FederatedAlgorithm,
    IIDPartition,
    LocalTraining,
    Service,
    Simulation,
    Synchronous,
    UplinkCompression,
    serve,
    take_part,
)
from distopt.federated.functional import cross_entropy
from distopt.federated.network import letters
from distopt.federated.network.letters import Answer, Hello, Ready, Task

CLIENTS, SITES, ROUNDS = 12, 3, 4
DEADLINE_S = 120.0
_rng = np.random.default_rng(0)
INPUTS = torch.from_numpy(_rng.standard_normal((200, 6)))
LABELS = (INPUTS[:, 0] > 0).long() + (INPUTS[:, 1] > 0).long()
WAITING = {name: each for name, each in NOISELESS.items() if each.pacing == Synchronous()}


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


def data():
    parts = DirichletPartition(alpha=0.3, min_samples=0).split(LABELS.numpy(), CLIENTS - 1, 1)
    return ClientData((INPUTS, LABELS), [*parts, np.empty(0, dtype=np.int64)])  # one has nothing


def evaluate(model):
    return {"accuracy": (model(INPUTS).argmax(1) == LABELS).double().mean()}


def settings(algorithm, **changed):
    return {
        "model": build(),
        "clients": data(),
        "algorithm": algorithm,
        "local": LocalTraining(steps=3, batch_size=8, lr=0.1, max_norm=5.0),
        "participation": Bernoulli(probability=0.6),
        "evaluate": evaluate,
        "seed": 5,
        **changed,
    }


class Sites:
    """Threads that take part, and what became of each."""

    def __init__(self, ends, changed):
        self.found = {}
        self.threads = []
        for end in ends:  # models are built here: threads share torch's random numbers
            own = {"model": build(), "clients": data(), "transport": end, **changed.get(end.rank, {})}
            thread = threading.Thread(target=self._run, args=(end.rank, own), daemon=True)
            self.threads.append(thread)

    def start(self):
        for thread in self.threads:
            thread.start()

    def _run(self, rank, own):
        try:
            self.found[rank] = take_part(**own)
        except Exception as error:
            self.found[rank] = error

    def join(self):
        for thread in self.threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
        return self.found


def served(algorithm, rounds=ROUNDS, *, sites=SITES, site=None, **changed):
    server, *ends = InProcess.connect(1 + sites)
    took = Sites(ends, site or {})
    made = settings(algorithm, **changed)
    took.start()
    with Service(**made, transport=server, wait_s=DEADLINE_S) as service:
        history = service.run(rounds)
    return made["model"], history, took.join()


def vector(model):
    return torch.cat([t.detach().reshape(-1) for t in model.state_dict().values() if t.is_floating_point()])


@pytest.mark.parametrize("uplink", [None, UplinkCompression(density=0.3)], ids=["whole", "compressed"])
@pytest.mark.parametrize("name", WAITING)
def test_it_is_the_simulation_to_the_bit(name, uplink):
    algorithm = WAITING[name]
    model, history, found = served(algorithm, uplink=uplink)
    made = settings(algorithm, uplink=uplink)
    simulated = Simulation(**made, mode="loop").run(ROUNDS)
    assert history == simulated
    assert torch.equal(vector(model), vector(made["model"]))
    passes = 2 if "fedspeed" in name else 1  # of a step; the server counts steps
    assert passes * model[1].num_batches_tracked == made["model"][1].num_batches_tracked > 0
    assert [found[rank].hosts for rank in (1, 2, 3)] == [(0, 3, 6, 9), (1, 4, 7, 10), (2, 5, 8, 11)]
    assert sum(each.replies for each in found.values()) == sum(len(row["participants"]) for row in history)


def test_a_site_may_have_its_own_clients_data_alone_and_take_over_what_the_server_says():
    whole = data()
    hosts = {1: [3, 0, 7], 2: [1, 2, 4, 5, 6, 8, 9, 10, 11]}

    def own(listed):
        keep = np.concatenate([whole.parts[client] for client in listed])
        ends = np.cumsum([len(whole.parts[client]) for client in listed])
        parts = np.split(np.arange(len(keep)), ends[:-1])
        return {"clients": ClientData(tuple(t[torch.from_numpy(keep)] for t in whole.tensors), parts), "hosts": listed}

    algorithm = NOISELESS["scaffold"]
    site = {rank: own(listed) for rank, listed in hosts.items()}
    model, history, found = served(algorithm, sites=2, site=site, clients=None, num_clients=CLIENTS)
    made = settings(algorithm)
    assert history == Simulation(**made, mode="loop").run(ROUNDS)
    assert torch.equal(vector(model), vector(made["model"]))
    assert [found[rank].hosts for rank in (1, 2)] == [tuple(hosts[1]), tuple(hosts[2])]


class Changed:
    """An end that changes what is sent, or what has come; else as the real one."""

    def __init__(self, end, sent=lambda frame: [frame], came=lambda frame: frame):
        self._end, self._sent, self._came = end, sent, came

    def __getattr__(self, name):
        return getattr(self._end, name)

    def send(self, destination, frame):
        for each in self._sent(frame):
            self._end.send(destination, each)

    def receive(self, timeout_s):
        got = self._end.receive(timeout_s)
        return None if got is None else (got[0], self._came(got[1]))


def with_room_behind(frame):
    return torch.cat([frame, torch.ones(1000, dtype=torch.uint8)])


@pytest.mark.parametrize("came", [lambda frame: frame, with_room_behind], ids=["exact", "in longer buffers"])
def test_what_travels_is_counted(came):
    server, end = (Changed(end, came=came) for end in InProcess.connect(2))
    took = Sites([end], {})
    made = settings(NOISELESS["fedau"])
    took.start()
    with Service(**made, transport=server) as service:
        service.run(2)
    site = took.join()[1]
    assert (site.bytes_sent, site.bytes_received) == (service.bytes_received, service.bytes_sent)
    assert site.replies == sum(len(row["participants"]) for row in service.history)


def test_what_was_meant_for_a_server_before_this_one_is_counted_but_not_in_the_history():
    def twice(frame):
        letter = letters.decode(frame)
        before = [letters.encode(dataclasses.replace(letter, session="0" * 16))] if isinstance(letter, Answer) else []
        return [*before, frame]

    server, end = InProcess.connect(2)
    took = Sites([Changed(end, sent=twice)], {})
    made = settings(NOISELESS["scaffold"])
    took.start()
    with Service(**made, transport=server) as service:
        history = service.run(ROUNDS)
    took.join()
    assert service.refused == {"another session": sum(len(row["participants"]) for row in history)}
    assert history == Simulation(**settings(NOISELESS["scaffold"]), mode="loop").run(ROUNDS)


# -- not waiting for everybody -----------------------------------------------------------------------------------------

HASTY = {name: each for name, each in NOISELESS.items() if isinstance(each.pacing, AfterArrivals)}
ROUNDS_OF = {name: 40 if each.pacing.count > 1 else 200 for name, each in HASTY.items()}


@pytest.mark.parametrize("name", HASTY)
def test_algorithms_that_do_not_wait_learn_on_a_real_clock(name):
    alike = {"clients": ClientData.split((INPUTS, LABELS), IIDPartition(), CLIENTS)}  # whoever is faster
    site = dict.fromkeys(range(1, 1 + SITES), alike)
    local = LocalTraining(steps=3, batch_size=8, lr=0.1, max_norm=5.0, drop_last=True)
    changed = {"participation": None, "evaluate_every": 1000, "local": local, **alike}
    model, history, found = served(HASTY[name], ROUNDS_OF[name], site=site, **changed)
    count = HASTY[name].pacing.count
    assert {len(row["participants"]) for row in history} == {count}
    times = [row["time_s"] for row in history]
    assert times == sorted(times)
    assert times[0] > 0
    assert history.last("accuracy") > 0.5
    assert sum(each.replies for each in found.values()) >= ROUNDS_OF[name] * count
    assert not torch.equal(vector(model), vector(build()))


def test_fedfix_ends_a_round_when_the_interval_does():
    seconds = 0.2
    algorithm = FederatedAlgorithm.from_dict({"algorithm": "fedfix", "interval_s": seconds})
    _, history, _ = served(algorithm, 5, participation=None)
    times = [row["time_s"] for row in history]
    assert all(time >= (number + 1) * seconds for number, time in enumerate(times))
    assert sum(len(row["participants"]) for row in history) >= CLIENTS


def test_a_synchronous_history_has_no_times():
    assert all("time_s" not in row for row in served(NOISELESS["fedau"], 1)[1])


# -- what does not fit -------------------------------------------------------------------------------------------------


def wider():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 3)).double()


def fewer():
    whole = data()
    return ClientData(whole.tensors, [*whole.parts[:4], whole.parts[4][1:], *whole.parts[5:]])


def refused(site, **changed):
    """What the server and the sites raise."""
    server, *ends = InProcess.connect(3)
    took = Sites(ends, site)
    made = settings(NOISELESS["fedau"], **changed)
    took.start()
    with pytest.raises(DistoptError) as raised, Service(**made, transport=server, wait_s=DEADLINE_S) as service:
        service.run(1)
    return str(raised.value), took.join()


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (
            lambda: {"model": wider()},
            r"got 0.weight \[8, 6\] torch.float64 trained and 0.weight \[9, 6\] torch.float64 trained as number 1 of",
        ),
        (lambda: {"model": build().float()}, r"got 0.weight \[8, 6\] torch.float64 .* and 0.weight .* torch.float32"),
        (lambda: {"seed": 4}, "seed must be the same on the server and on rank 2, got 5 and 4"),
        (lambda: {"local": LocalTraining(steps=4)}, "lr of local|batch_size of local|steps of local"),
        (lambda: {"algorithm": NOISELESS["fedvarp"]}, "algorithm of algorithm must be the same .* 'fedau' and 'fedv"),
        (lambda: {"uplink": UplinkCompression()}, "uplink must be the same on the server and on rank 2, got None and"),
        (lambda: {"clients": fewer()}, "data must be the same on the server and on rank 2"),
        (lambda: {"clients": fewer(), "hosts": list(range(1, CLIENTS, 2))}, "data must be the same"),
        (lambda: {"hosts": [0, 1]}, "each client must be hosted by one site, got client 0 of ranks"),
    ],
)  # fmt: skip
def test_a_site_of_another_job_is_told_in_what_it_differs(own, said):
    server, found = refused({2: own()})
    assert isinstance(found[2], DistoptError), found
    assert re.search(said, f"{found[1]} {found[2]}")
    assert re.search(said, server)
    assert "cannot take part" in server
    assert isinstance(found[1], DistoptError)  # it does not wait for a job that will not begin


def test_frozen_values_are_compared():
    def frozen(value):
        model = build()
        model[0].requires_grad_(False).weight.fill_(value)
        return model

    server, found = refused({1: {"model": frozen(1.0)}, 2: {"model": frozen(2.0)}}, model=frozen(1.0))
    assert "frozen tensors must be the same on the server and on rank 2" in server
    assert "load the same pretrained values on every process" in str(found[2])


def test_samples_are_compared_where_a_site_has_only_its_own():
    whole = data()
    hosts = list(range(1, CLIENTS, 2))
    parts = [whole.parts[client] for client in hosts]
    parts[2] = parts[2][1:]
    own = {"hosts": hosts, "clients": ClientData(whole.tensors, parts)}
    server, _ = refused({2: own})
    assert "client 5 must have as many samples on the server as on rank 2" in server


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"clients": None}, "one of clients and num_clients must be given, got none"),
        ({"num_clients": 3}, "num_clients must be 12 beside these clients, got 3"),
        ({"algorithm": "fedau"}, "algorithm must be of FederatedAlgorithm, got 'fedau'"),
        ({"deadline_s": 0}, "deadline_s must be a number of seconds above 0, got 0"),
        ({"exclude": ("1.*",)}, "all float tensors must be averaged in a service, got '1.running_mean'|got '1.weight'"),
        ({"listen": "127.0.0.1:0"}, "one of transport and listen says how processes talk"),
        ({"listen": "127.0.0.1:0", "transport": "auto"}, "sites must be given for a job by TCP, got None"),
        ({"listen": "127.0.0.1:0", "transport": "auto", "sites": 13}, "one site for each of the 12 clients, got 13"),
        ({"listen": "nowhere", "transport": "auto", "sites": 1}, "an address must be 'host:port'"),
        ({"checkpoint_every": 2}, "needs a file"),
        ({"fewest_sites": 2}, "fewest_sites must be at most the job's 1 sites, got 2"),
        ({"transport": "auto"}, "this process belongs to no job"),
    ],
)
def test_bad_settings_of_a_server_are_refused(changed, said):
    server = InProcess.connect(2)[0]
    with pytest.raises(DistoptError, match=said):
        Service(**{**settings(NOISELESS["fedau"]), "transport": server, **changed})


BY_TCP = {"server": "127.0.0.1:9", "transport": "auto", "sites": 2, "rank": 1}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hosts": []}, "hosts must be different clients, at least one, got"),
        ({"hosts": [1, 1]}, "hosts must be different clients"),
        ({"hosts": [12]}, "hosts must be clients from 0 to 11, got 12"),
        ({"patience_s": -1.0}, "patience_s must be a number of seconds above 0"),
        ({"server": "127.0.0.1:9", "transport": "auto", "sites": 2}, "rank must be given beside server="),
        ({"server": "127.0.0.1:9", "transport": "auto", "sites": 2, "rank": 3}, "rank must be from 1 to size - 1"),
        (
            {"server": "127.0.0.1:9", "transport": "auto", "sites": 2, "rank": 1, "ranks_per_site": 2},
            "must be 1 beside",
        ),
        (
            {"server": "127.0.0.1:9", "transport": "auto", "sites": 2, "rank": 1, "wait_s": 0.3},
            "has not reached the serv",
        ),
        ({"wait_s": 0.3}, "the server, rank 0, has said nothing for 0.3 s; does it call serve"),
    ],
)
def test_bad_settings_of_a_site_are_refused(changed, said):
    end = InProcess.connect(3)[1]
    with pytest.raises(DistoptError, match=said):
        take_part(**{"model": build(), "clients": data(), "transport": end, **changed})


def test_roles_are_checked():
    server, *ends = InProcess.connect(2)
    with pytest.raises(ConfigError, match="got take_part on rank 0; call serve there"):
        take_part(model=build(), clients=data(), transport=server)
    with pytest.raises(ConfigError, match="got serve on rank 1 of 2; call take_part there"):
        serve(rounds=1, **settings(NOISELESS["fedau"]), transport=ends[0])
    with pytest.raises(ConfigError, match="a server and at least one site, got 1 process"):
        serve(rounds=1, **settings(NOISELESS["fedau"]), transport=InProcess.connect(1)[0])
    with pytest.raises(ConfigError, match=r"the 1 ranks beside the server must be a multiple of ranks_per_site, 2"):
        serve(rounds=1, **settings(NOISELESS["fedau"]), transport=server, ranks_per_site=2)
    many = InProcess.connect(CLIENTS + 2)
    with pytest.raises(ConfigError, match="at most one site for each of the 12 clients, got 13; start fewer"):
        take_part(model=build(), clients=data(), transport=many[1])


def test_sites_that_do_not_come_are_named():
    server, *_ = InProcess.connect(3)
    made = settings(NOISELESS["fedau"])
    with (
        pytest.raises(PeerLostError, match=r"2 sites must be ready within 0.3 s, got 0; missing are ranks 1, 2"),
        Service(**made, transport=server, wait_s=0.3) as service,
    ):
        service.run(1)


@pytest.mark.parametrize(("name", "most"), [("fedau", 2), ("fedbuff", ROUNDS)])
def test_a_site_that_never_answers_is_asked_twice_by_who_waits_and_its_newer_tasks_overrule(name, most):
    server, end = InProcess.connect(2)
    hello = Hello(sender=1, hosts=list(range(CLIENTS)), samples=[1] * CLIENTS, facts={})
    end.send(0, letters.encode(hello))
    changed = {"clients": None, "num_clients": CLIENTS, "participation": None, "deadline_s": 0.2}
    made = settings(NOISELESS[name], **changed)

    def is_ready():
        end.send(0, letters.encode(Ready(sender=1, session=letters.decode(end.receive(20.0)[1]).session)))

    thread = threading.Thread(target=is_ready, daemon=True)
    thread.start()
    with Service(**made, transport=server, wait_s=DEADLINE_S) as service:
        service.run(ROUNDS)
    came = [letters.decode(frame) for _, frame in iter(lambda: end.receive(0.0), None)]
    tasks = [letter for letter in came if isinstance(letter, Task)]
    assert len(tasks) == most
    assert {task.overrules for task in tasks} == {name == "fedau"}


def test_a_job_whose_sites_are_all_gone_ends():
    server, end = InProcess.connect(2)
    took = Sites([end], {})
    made = settings(NOISELESS["fedau"])
    took.start()
    with (
        pytest.raises(PeerLostError, match="all sites are gone after 2 rounds; start them again, with the server"),
        Service(**made, transport=server, progress=lambda row: end.die() if row["round"] == 2 else None) as service,
    ):
        service.run(5)
    end.close()
    assert "the transport of the site on rank 1 was closed while it takes part" in str(took.join()[1])


def test_by_tcp_one_is_waited_for_until_the_deadline():
    begun = []

    def fails(model, batch):
        if torch.is_grad_enabled() and begun:
            raise KeyError("nothing more")
        return cross_entropy(model, batch)

    made = settings(NOISELESS["fedau"], participation=None)
    own = {"model": build(), "clients": data(), "loss": fails}
    with Service(**made, listen="127.0.0.1:0", sites=1, deadline_s=0.5, progress=begun.append) as service:
        by_tcp = {"transport": "auto", "server": service.address, "rank": 1, "sites": 1}
        took = Sites([SimpleNamespace(rank=1)], {1: {**own, **by_tcp}})
        took.start()
        with pytest.raises(PeerLostError, match=r"all sites are gone after \d rounds \(rank 1: KeyError: .*again$"):
            service.run(5)
    assert isinstance(took.join()[1], KeyError)


def test_a_port_in_use_is_said_to_be():
    made = settings(NOISELESS["fedau"])
    with Service(**made, listen="127.0.0.1:0", sites=1) as service:
        with pytest.raises(ConfigError, match="in use"):
            Service(**settings(NOISELESS["fedau"]), listen=service.address, sites=1)
        assert service.address.startswith("127.0.0.1:")


def test_a_site_that_cannot_compute_its_clients_says_so_before_the_first_round():
    def fails(model, batch):
        raise KeyError("nothing here")

    server, found = refused({2: {"loss": fails}})
    assert "rank 2 cannot take part: ConfigError: loss(model, batch) must be computable, got KeyError" in server
    assert isinstance(found[2], ConfigError)


def test_a_service_that_runs_does_not_go_back(tmp_path):
    server, end = InProcess.connect(2)
    took = Sites([end], {})
    made = settings(NOISELESS["fedau"], checkpoint=tmp_path / "run.pt", checkpoint_every=1)
    took.start()
    with Service(**made, transport=server) as service:
        service.run(2)
        with pytest.raises(ConfigError, match="resume must come before run, got it after round 2"):
            service.resume()
        assert len(service.run(3)) == 3
    assert took.join()[1].tasks == 3


def test_a_checkpoint_of_a_simulation_is_none_of_a_service(tmp_path):
    made = settings(NOISELESS["fedau"])
    job = Simulation(**made, mode="loop", checkpoint=tmp_path / "run.pt")
    job.save()
    server = InProcess.connect(2)[0]
    with (
        pytest.raises(StateMismatchError, match="agree in mode, got 'loop' then and 'network' now"),
        Service(**settings(NOISELESS["fedau"]), transport=server, checkpoint=tmp_path / "run.pt") as service,
    ):
        service.resume()


def test_a_site_that_is_refused_by_tcp_may_come_again_as_the_right_one():
    made = settings(NOISELESS["fedau"])
    own = {"clients": data(), "sites": 1, "rank": 1, "wait_s": DEADLINE_S}
    right, wrong = build(), build()
    with Service(**made, listen="127.0.0.1:0", sites=1, wait_s=DEADLINE_S) as service:
        served = threading.Thread(target=service.run, args=(ROUNDS,), daemon=True)
        served.start()
        with pytest.raises(CompatibilityError, match="seed must be the same on the server and on rank 1, got 5 and 6"):
            take_part(model=wrong, seed=6, server=service.address, **own)
        joined = threading.Thread(
            target=take_part, kwargs={"model": right, "server": service.address, **own}, daemon=True
        )
        joined.start()
        served.join(DEADLINE_S)
        assert not served.is_alive()
    joined.join(DEADLINE_S)
    assert service.refused == {"not of this job": 1}
    expected = settings(NOISELESS["fedau"])
    rows = Simulation(**expected, mode="loop").run(ROUNDS).rows
    assert [{**row, "refused": 0} for row in service.history] == rows
    assert torch.equal(vector(made["model"]), vector(expected["model"]))

"""A profile shows each family's phases by the names that distopt.spans lists, and no others."""

import functools
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import distopt
from distopt import spans
from distopt.federated import ClientData, FedAvg, Simulation


def names_in(work):
    """Which spans of distopt appear while it works, in all threads; its operators have no family in their names."""
    config = torch.profiler._ExperimentalConfig(profile_all_threads=True)
    with profile(activities=[ProfilerActivity.CPU], experimental_config=config) as profiled:
        work()
    return {event.name for event in profiled.events() if re.match("distopt::.*::", event.name)}


def linear():
    torch.manual_seed(0)
    model = nn.Linear(40, 20)
    return model, functools.partial(torch.optim.SGD, lr=0.1)


def ddp_spans(algorithm):
    model, make = linear()
    model = DistributedDataParallel(model)
    optimizer = make(model.parameters())
    with algorithm.attach(model, optimizer):

        def work():
            for _ in range(2):
                model(torch.ones(4, 40)).square().mean().backward()
                optimizer.step()

        return names_in(work)


def gossip_spans(exchange):
    model, make = linear()
    optimizer = make(model.parameters())
    with distopt.Gossip(topology="complete", exchange=exchange).attach(model, optimizer) as attached:

        def work():
            for _ in range(2):
                model(torch.ones(4, 40)).square().mean().backward()
                optimizer.step()
            attached.flush()

        return names_in(work)


def local_spans(overlap):
    model, make = linear()
    optimizer = make(model.parameters())
    with distopt.SparseLoCo(inner_steps=2, overlap=overlap).attach(model, optimizer) as attached:

        def work():
            for _ in range(2):
                model(torch.ones(4, 40)).square().mean().backward()
                optimizer.step()
            attached.flush()

        return names_in(work)


def coding_spans(master):
    model, make = linear()
    optimizer = make(model.parameters())
    coding = distopt.GradientCoding(stragglers=1, master=master)
    with coding.attach(model, optimizer) as coded:

        def work():
            for _ in coded.steps(2):
                coded.backward(lambda part: (model(torch.ones(4, 40)).square().sum(), 4))
                optimizer.step()

        return names_in(work)


def named(family, *phases):
    return {spans.name_of(family, phase) for phase in phases}


@pytest.mark.parametrize(
    ("algorithm", "phases"),
    [
        (distopt.DGC(density=0.05), ("agree", "select", "launch", "decode")),
        (distopt.TopK(density=0.05, exchange="balanced"), ("agree", "select", "launch", "exchange", "decode")),
    ],
)
def test_ddp(ranks, algorithm, phases):
    for found in ranks(2)(ddp_spans, algorithm):
        assert found == named("ddp", *phases)


@pytest.mark.parametrize(("exchange", "more"), [("synchronous", ()), ("overlapped", ("wait",))])
def test_gossip(ranks, exchange, more):
    for found in ranks(2)(gossip_spans, exchange):
        assert found == named("gossip", "exchange", "transfer", "average", *more)


@pytest.mark.parametrize("overlap", [0, 1])
def test_local(ranks, overlap):
    for found in ranks(2)(local_spans, overlap):
        assert found == named("local", "select", "exchange", "apply", "wait")


def test_coding(ranks):
    master, *workers = ranks(3)(coding_spans, "first")
    assert master == named("coding", "round", "decode")
    for found in workers:
        assert found == named("coding", "gradient")


def test_coding_with_a_sharded_master(ranks):
    for found in ranks(2)(coding_spans, "sharded"):
        assert found == named("coding", "round", "gradient", "decode")


def test_federated():
    parts = [np.arange(6), np.arange(6, 12)]
    clients = ClientData((torch.randn(12, 4), torch.zeros(12, dtype=torch.int64)), parts)
    simulation = Simulation(
        model=nn.Linear(4, 2), clients=clients, algorithm=FedAvg(), evaluate=lambda model: {"answer": 1.0}
    )
    assert names_in(lambda: simulation.run(2)) == named("federated", "train", "aggregate", "evaluate")

"""Each algorithm, client and server together, against a few lines of numpy written from its equations."""

import math

import numpy as np
import pytest
import torch
from least_squares import (
    FULL,
    INPUTS,
    LR,
    NUM_CLIENTS,
    NUM_SAMPLES,
    NUM_STEPS,
    NUM_VALUES,
    PARTIAL,
    START,
    TARGETS,
    Job,
    gradient,
)

from distopt.federated import (
    MIFA,
    AverageAll,
    FedAU,
    FedAvg,
    FedDyn,
    FederatedAlgorithm,
    FedNova,
    FedProx,
    FedSpeed,
    FedVarp,
    FisherAveraging,
    KnownParticipation,
    PlainStep,
    Reply,
    Scaffold,
    Server,
    ServerAdagrad,
    ServerAdam,
    ServerMomentum,
    ServerYogi,
)

N = NUM_CLIENTS
SAME_STEPS = (3,) * N
SAME_SAMPLES = (20,) * N
PROBABILITIES = (0.5, 0.9, 0.25, 1.0, 0.125)


def local(i, x, direction=lambda g, y: g(y), num_steps=NUM_STEPS):
    """y of client i, where direction(g, y) is the gradient of a step with the minibatch gradient g."""
    y = x.copy()
    for k in range(num_steps[i]):
        y = y - LR * direction(lambda z, k=k: gradient(i, k, z), y)
    return y


def fisher(i, y):
    """The mean squared gradient of the client's samples, one by one."""
    squares = [
        (2 * inputs * (inputs @ y - target)) ** 2
        for k in range(NUM_STEPS[i])
        for inputs, target in zip(INPUTS[i, k], TARGETS[i, k], strict=True)
    ]
    return np.mean(squares, axis=0)


def fisher_averaging(floor):
    def models(rounds):
        x = START.copy()
        for clients in rounds:
            ys = [local(i, x) for i in clients]
            lam = [
                share * np.maximum(fisher(i, y), floor)
                for share, i, y in zip(shares(clients), clients, ys, strict=True)
            ]
            if clients:
                x = sum(each * y for each, y in zip(lam, ys, strict=True)) / sum(lam)
            yield x

    return models


def zeros():
    return np.zeros((N, NUM_VALUES))


def shares(clients):
    total = sum(NUM_SAMPLES[i] for i in clients)
    return [NUM_SAMPLES[i] / total for i in clients]


def averaging(weights, direction=lambda x: lambda g, y: g(y)):
    """x+ = x + sum w_i (y_i - x), as a function of the rounds."""

    def models(rounds):
        x = START.copy()
        for clients in rounds:
            x = x + sum(
                (w * (local(i, x, direction(x)) - x) for w, i in zip(weights(clients), clients, strict=True)),
                start=np.zeros(NUM_VALUES),
            )
            yield x

    return models


def with_server_optimizer(kind, eta, tau=1e-3, b1=0.9, b2=0.99):
    def models(rounds):
        x, m, v = START.copy(), np.zeros(NUM_VALUES), np.full(NUM_VALUES, tau**2)
        for clients in rounds:
            if clients:
                delta = sum(q * (local(i, x) - x) for q, i in zip(shares(clients), clients, strict=True))
                if kind == "momentum":
                    m = b1 * m + delta
                    x = x + eta * m
                else:
                    m = b1 * m + (1 - b1) * delta
                    square = delta**2
                    if kind == "adagrad":
                        v = v + square
                    if kind == "adam":
                        v = b2 * v + (1 - b2) * square
                    if kind == "yogi":
                        v = v - (1 - b2) * square * np.sign(v - square)
                    x = x + eta * m / (np.sqrt(v) + tau)
            yield x

    return models


def fednova(rounds):
    x = START.copy()
    for clients in rounds:
        p = shares(clients) if clients else []
        effective = sum(q * NUM_STEPS[i] for q, i in zip(p, clients, strict=True))
        x = x + effective * sum(q * (local(i, x) - x) / NUM_STEPS[i] for q, i in zip(p, clients, strict=True))
        yield x


def scaffold(eta):
    def models(rounds):
        x, c, own = START.copy(), np.zeros(NUM_VALUES), zeros()
        for clients in rounds:
            ys, before = {}, own.copy()
            for i in clients:
                ys[i] = local(i, x, lambda g, y, drift=c - before[i]: g(y) + drift)
                own[i] = before[i] - c + (x - ys[i]) / (NUM_STEPS[i] * LR)
            if clients:
                x = x + eta * np.mean([ys[i] - x for i in clients], axis=0)
            c = c + (own - before).sum(axis=0) / N
            yield x

    return models


def feddyn(a):
    def models(rounds):
        x, h, ghat = START.copy(), np.zeros(NUM_VALUES), zeros()
        for clients in rounds:
            ys = [local(i, x, lambda g, y, x=x, own=ghat[i]: g(y) - own + a * (y - x)) for i in clients]
            for i, y in zip(clients, ys, strict=True):
                ghat[i] -= a * (y - x)
            if clients:
                h = h - a / N * sum(y - x for y in ys)
                x = np.mean(ys, axis=0) - h / a
            yield x

    return models


def fedspeed(rho=0.1, alpha=1.0, lam=10.0, everybody=False):
    def models(rounds):
        x, ghat = START.copy(), zeros()

        def direction(i):
            def mixed(g, y):
                g1 = g(y)
                g2 = g(y + rho * g1 / np.linalg.norm(g1))
                return (1 - alpha) * g1 + alpha * g2 - ghat[i] + (y - x) / lam

            return mixed

        for clients in rounds:
            ys = [local(i, x, direction(i)) for i in clients]
            for i, y in zip(clients, ys, strict=True):
                ghat[i] -= (y - x) / lam
            if clients and everybody:
                x = np.mean(ys, axis=0) - lam * ghat.mean(axis=0)
            elif clients:
                x = np.mean([y - lam * ghat[i] for i, y in zip(clients, ys, strict=True)], axis=0)
            yield x

    return models


def omegas(rounds, cutoff):
    """The weights that each round uses."""
    intervals, waited, omega = [0] * N, [0] * N, [1.0] * N
    for clients in rounds:
        yield list(omega)
        for n in range(N):
            waited[n] += 1
            if n in clients or waited[n] == cutoff:
                omega[n] = (intervals[n] * omega[n] + waited[n]) / (intervals[n] + 1) if intervals[n] else waited[n]
                intervals[n] += 1
                waited[n] = 0


def fedau(cutoff, weighting="uniform"):
    def models(rounds):
        x, heard = START.copy(), set()
        for clients, omega in zip(rounds, omegas(rounds, cutoff), strict=True):
            heard |= set(clients)
            mean = np.mean([NUM_SAMPLES[i] for i in heard])
            step = np.zeros(NUM_VALUES)
            for i in clients:
                n_times_q = NUM_SAMPLES[i] / mean if weighting == "samples" else 1.0
                step = step + n_times_q * omega[i] * (local(i, x) - x) / N
            x = x + step
            yield x

    return models


def fedvarp(rounds):
    x, h = START.copy(), zeros()
    for clients in rounds:
        if clients:
            deltas = {i: local(i, x) - x for i in clients}
            x = x + np.mean([deltas[i] - h[i] for i in clients], axis=0) + h.mean(axis=0)
            for i in clients:
                h[i] = deltas[i]
        yield x


def mifa(rounds):
    x, latest = START.copy(), zeros()
    for clients in rounds:
        if clients:
            for i in clients:
                latest[i] = local(i, x) - x
            x = x + latest.mean(axis=0)
        yield x


def uniform(clients):
    return [1 / len(clients)] * len(clients) if clients else []


def by_samples(clients):
    return shares(clients) if clients else []


PAIRS = {
    "fedavg": (FedAvg(), averaging(by_samples)),
    "fedavg uniform": (FedAvg(weighting="uniform"), averaging(uniform)),
    "fedavg half": (FedAvg(server_lr=0.5), averaging(lambda s: [q / 2 for q in by_samples(s)])),
    "fedavgm": (
        FedAvg(server_optimizer=ServerMomentum(momentum=0.7), server_lr=0.8),
        with_server_optimizer("momentum", 0.8, b1=0.7),
    ),
    "fedadam": (FedAvg(server_optimizer=ServerAdam()), with_server_optimizer("adam", 0.01)),
    "fedyogi": (
        FedAvg(server_optimizer=ServerYogi(tau=0.1, beta1=0.5, beta2=0.7), server_lr=0.1),
        with_server_optimizer("yogi", 0.1, 0.1, 0.5, 0.7),
    ),
    "fedadagrad": (
        FedAvg(server_optimizer=ServerAdagrad(beta1=0.0), server_lr=0.1),
        with_server_optimizer("adagrad", 0.1, b1=0.0),
    ),
    "fedprox": (FedProx(mu=0.7), averaging(by_samples, lambda x: lambda g, y: g(y) + 0.7 * (y - x))),
    "fednova": (FedNova(), fednova),
    "scaffold": (Scaffold(), scaffold(1.0)),
    "scaffold half": (Scaffold(server_lr=0.5), scaffold(0.5)),
    "feddyn": (FedDyn(alpha=0.3), feddyn(0.3)),
    "fedspeed": (FedSpeed(), fedspeed()),
    "fedspeed mixed": (FedSpeed(rho=0.3, alpha=0.4, lambda_=2.0), fedspeed(0.3, 0.4, 2.0)),
    "fedspeed simulator": (FedSpeed(server="public-simulator", lambda_=2.0), fedspeed(lam=2.0, everybody=True)),
    "fedau": (FedAU(), fedau(50)),
    "fedau cutoff": (FedAU(cutoff=2), fedau(2)),
    "fedau without cutoff, samples": (FedAU(cutoff=math.inf, weighting="samples"), fedau(math.inf, "samples")),
    "known": (
        KnownParticipation(probability=PROBABILITIES),
        averaging(lambda s: [1 / (N * PROBABILITIES[i]) for i in s]),
    ),
    "average all": (AverageAll(server_lr=2.0), averaging(lambda s: [2 / N] * len(s))),
    "fedvarp": (FedVarp(), fedvarp),
    "mifa": (MIFA(), mifa),
    "fisher": (FisherAveraging(), fisher_averaging(1e-6)),
    "fisher with a high floor": (FisherAveraging(floor=20.0), fisher_averaging(20.0)),
}


@pytest.mark.parametrize("rounds", [PARTIAL, FULL], ids=["partial", "full"])
@pytest.mark.parametrize("name", PAIRS)
def test_algorithm_is_its_equations(name, rounds):
    algorithm, oracle = PAIRS[name]
    found, expected = Job(algorithm).run(rounds), np.stack(list(oracle(rounds)))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cutoff", [50, 2, math.inf])
def test_fedau_uses_the_weights_of_the_plain_loop_in_each_round(cutoff):
    job = Job(FedAU(cutoff=cutoff))
    for clients, omega in zip(PARTIAL, omegas(PARTIAL, cutoff), strict=True):
        assert job.state.memory.counters["participation"].weights.tolist() == omega
        job.round(clients)


PLAIN, UNIFORM = FedAvg(), FedAvg(weighting="uniform")
# Algorithm, the FedAvg that it is, in which rounds, with the same steps for all.
REDUCTIONS = {
    "fedprox, mu 0": (FedProx(mu=0), PLAIN, PARTIAL, False),
    "momentum 0": (FedAvg(server_optimizer=ServerMomentum(momentum=0)), PLAIN, PARTIAL, False),
    "plain step": (FedAvg(server_optimizer=PlainStep(), server_lr=1.0), PLAIN, PARTIAL, False),
    "fednova, same steps": (FedNova(), PLAIN, PARTIAL, True),
    "fedau, everybody": (FedAU(), UNIFORM, FULL, False),
    "fedau of samples, everybody": (FedAU(weighting="samples"), PLAIN, FULL, False),
    "fedau, cutoff 1": (FedAU(cutoff=1), AverageAll(), PARTIAL, False),
    "known, probability 1": (KnownParticipation(probability=1.0), AverageAll(), PARTIAL, False),
    "average all, everybody": (AverageAll(), UNIFORM, FULL, False),
    "fedvarp, everybody": (FedVarp(), UNIFORM, FULL, False),
    "mifa, everybody": (MIFA(), UNIFORM, FULL, False),
    "fedspeed of one gradient on the simulator is feddyn": (
        FedSpeed(rho=0, lambda_=4.0, server="public-simulator"),
        FedDyn(alpha=0.25),
        PARTIAL,
        False,
    ),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_special_case_reduces_to(name):
    algorithm, simpler, rounds, same_steps = REDUCTIONS[name]
    steps = SAME_STEPS if same_steps else NUM_STEPS
    found, expected = (Job(rule, num_steps=steps).run(rounds) for rule in (algorithm, simpler))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_fedspeeds_two_servers_are_one_under_full_participation_only():
    paper, simulator = FedSpeed(), FedSpeed(server="public-simulator")
    np.testing.assert_allclose(Job(paper).run(FULL), Job(simulator).run(FULL), rtol=1e-12, atol=1e-12)
    first_difference = Job(paper).run(PARTIAL) - Job(simulator).run(PARTIAL)
    assert np.abs(first_difference).max() > 1e-3


def test_fedspeed_takes_no_ascent_step_where_the_gradient_is_zero():
    kept = {"correction": torch.zeros(2, 3)}
    asked = []

    def gradient_at(displacement):
        asked.append(displacement)
        return torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]])

    direction = FedSpeed(rho=0.5).direction(gradient_at, torch.zeros(2, 3), kept, {})
    assert asked[0] is None
    torch.testing.assert_close(asked[1], torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.0, 0.4]]))
    assert direction.isfinite().all()


def test_scaffold_keeps_the_mean_of_the_clients_control_variates():
    job = Job(Scaffold())
    for clients in PARTIAL:
        job.round(clients)
        own = [job.kept[i]["control"] if i in job.kept else torch.zeros(NUM_VALUES) for i in range(N)]
        torch.testing.assert_close(job.broadcast.extras["control"], torch.stack(own).mean(0), rtol=1e-12, atol=1e-12)


def test_fedau_weighs_samples_with_the_mean_of_those_who_have_replied():
    job = Job(FedAU(weighting="samples"), num_samples=SAME_SAMPLES)
    uniform_job = Job(FedAU(), num_samples=SAME_SAMPLES)
    np.testing.assert_allclose(job.run(PARTIAL), uniform_job.run(PARTIAL), rtol=1e-12, atol=1e-12)


def moved_by(reply_values, algorithm, rounds_before, count):
    """How far one more round goes after `count` clients have joined a server of two; all deltas are of one element."""
    server = Server(algorithm, 1)
    state = server.begin(torch.zeros(1, dtype=torch.float64), 2)

    def replies(values):
        tensors = {c: {"delta": torch.tensor([v], dtype=torch.float64)} for c, v in values.items()}
        return [
            Reply(client=c, version=state.version, num_samples=1, num_steps=1, tensors=t) for c, t in tensors.items()
        ]

    for values in rounds_before:
        state, _ = server.step(state, replies(values))
    server.add_clients(state, count)
    before = state.model.item()
    state, _ = server.step(state, replies(reply_values))
    return state.model.item() - before


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        (AverageAll(), (1 + 4) / 4),
        (KnownParticipation(probability=0.5), 2 * (1 + 4) / 4),
        # Client 0 came in rounds 1 and 3 of three: intervals 1 and 2, so 1.5; the newcomer starts with 1.
        (FedAU(), (1.5 * 1 + 1 * 4) / 4),
        # The latest of clients 0 and 1 were 7 and 3.
        (FedVarp(), ((1 - 7) + 4) / 2 + (7 + 3) / 4),
        (MIFA(), (1 + 3 + 4) / 4),
        # All deltas of all rounds are 5, 3, 7, 1 and 4.
        (FedDyn(), (1 + 4) / 2 + (5 + 3 + 7 + 1 + 4) / 4),
        (FedSpeed(server="public-simulator"), (1 + 4) / 2 + (5 + 3 + 7 + 1 + 4) / 4),
        (FedSpeed(), (1 + 4) / 2),
    ],
    ids=lambda case: case.name if isinstance(case, FederatedAlgorithm) else "",
)
def test_clients_that_join_later_are_among_all_clients(algorithm, expected):
    history = [{0: 5.0}, {1: 3.0}, {0: 7.0}]
    assert moved_by({0: 1.0, 3: 4.0}, algorithm, history, 2) == pytest.approx(expected, rel=1e-12)


def test_scaffolds_control_variate_is_the_mean_of_those_who_joined_too():
    job = Job(Scaffold())
    job.run(PARTIAL)
    job.server.add_clients(job.state, 5)
    before = job.broadcast.extras["control"]
    torch.testing.assert_close(job.server.broadcast(job.state).extras["control"], before / 2, rtol=1e-12, atol=1e-12)

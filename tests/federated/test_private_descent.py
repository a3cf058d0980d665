"""DIFF2 and DP-GD: their equations in numpy, restarts, missed rounds, and the laws of all algorithms."""

import dataclasses
import io
import itertools
import json
import logging
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from distopt.errors import ConfigError, StateMismatchError
from distopt.federated import (
    DIFF2,
    DPGD,
    Broadcast,
    Client,
    ClientData,
    FederatedAlgorithm,
    Layout,
    Reply,
    Server,
    Simulation,
    TracedParticipation,
)
from distopt.federated.privacy.noise import NoiseSource

P, FEATURES, LR = 3, 4, 0.3
SIZES = (5, 9, 7)
_rng = np.random.default_rng(0)
X = [_rng.standard_normal((size, FEATURES)) for size in SIZES]
Y = [_rng.standard_normal(size) for size in SIZES]
START = _rng.standard_normal(FEATURES)
SETTINGS = {"lr": LR, "clip": 0.8, "rounds": 11, "num_clients": P, "fewest_samples": min(SIZES), "noise_seed": 0}
U = 1.25


def data():
    offsets = np.cumsum((0, *SIZES))
    parts = [np.arange(begin, end) for begin, end in itertools.pairwise(offsets)]
    tensors = torch.from_numpy(np.concatenate(X)), torch.from_numpy(np.concatenate(Y))
    return ClientData(tensors, parts)


def square(model, batch):
    return (model(batch[0]).squeeze(1) - batch[1]).square().mean()


def model():
    made = nn.Linear(FEATURES, 1, bias=False).double()
    with torch.no_grad():
        made.weight.copy_(torch.from_numpy(START)[None])
    return made


def simulation(algorithm, **settings):
    return Simulation(**{"model": model(), "clients": data(), "algorithm": algorithm, "loss": square, **settings})


def vector(made):
    return torch.cat([p.detach().reshape(-1) for p in made.parameters()]).numpy()


@pytest.fixture
def visible_noise(monkeypatch):
    """In place of noise its standard deviation, on every element; the purposes that were asked for."""
    purposes = []

    def add(self, values, std, *purpose):
        purposes.append(purpose)
        return values + std

    monkeypatch.setattr(NoiseSource, "add", add)
    return purposes


# -- the equations -----------------------------------------------------------------------------------------------------


def deviations(epsilon, delta, rounds, interval):
    """The sheet's s1 and s2."""
    alpha = 1 + math.ceil(2 * math.log(1 / delta) / epsilon)
    whole = (min(SIZES) * P) ** 2 * epsilon
    c1 = 4 * U if interval > 1 else 4
    restart = math.sqrt(c1 * alpha * math.ceil(rounds / interval) / whole)
    return restart, math.sqrt(4 * U / (U - 1) * alpha * rounds / whole)


def clipped(vectors, bound):
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors * np.minimum(1, bound / norms)


def gradients(p, x):
    return 2 * X[p] * (X[p] @ x - Y[p])[:, None]


def oracle(num_rounds, *, interval, clip, clip_difference, epsilon=3.0, delta=1e-5, rounds=11, missing=()):
    """The models of the rounds, where noise is its standard deviation; `missing` rounds do not count."""
    s1, s2 = deviations(epsilon, delta, rounds, interval)
    x, before, v, since = START.copy(), None, None, 0
    for r in range(num_rounds):
        if r in missing:
            since = 0
            yield x
            continue
        if since == 0:
            means = [clipped(gradients(p, x), clip).mean(0) for p in range(P)]
            v = np.mean(means, axis=0) + clip * s1
        else:
            distance = np.linalg.norm(x - before)
            bound = clip_difference * distance
            means = [clipped(gradients(p, x) - gradients(p, before), bound).mean(0) for p in range(P)]
            v = v + np.mean(means, axis=0) + bound * s2
        x, before = x - LR * v, x
        since = (since + 1) % interval
        yield x


@pytest.mark.parametrize("noise", ["central", "distributed"])
@pytest.mark.parametrize(("interval", "clip_difference"), [(1, 1.0), (4, 1.5), (4, 50.0), (100, 3.0)])
def test_each_round_is_the_paper_s(visible_noise, interval, clip_difference, noise):
    algorithm = DIFF2(interval=interval, clip_difference=clip_difference, noise=noise, **SETTINGS)
    job = simulation(algorithm)
    expected = oracle(11, interval=interval, clip=0.8, clip_difference=clip_difference)
    for round, x in enumerate(expected, 1):
        job.run(round)
        if noise == "distributed":  # every share has sqrt(P) times the deviation, all the same here
            continue
        np.testing.assert_allclose(vector(job.model), x, rtol=1e-11, atol=1e-11)
    kinds = {("diff2", r) if noise == "central" else ("diff2", r, p) for r in range(11) for p in range(P)}
    assert set(visible_noise) == kinds


def test_distributed_noise_is_as_large_on_the_mean_and_sqrt_p_times_as_large_on_each_message():
    settings = {**SETTINGS, "epsilon": 0.01, "noise": "distributed"}
    algorithm = DPGD(**settings)
    std = algorithm.clip_and_std(torch.zeros(1), None)[1]
    messages, means = [], []
    layout, made = Layout(model()), model()
    client = Client(algorithm=algorithm, loss=square, optimizer=None)
    for version in range(400):
        replies = []
        for p in range(P):
            _, reply = client.step(
                made,
                layout,
                {},
                Broadcast(version=version, model=torch.from_numpy(START)),
                (),
                client=p,
                num_samples=SIZES[p],
                samples=lambda p=p: [(torch.from_numpy(X[p]), torch.from_numpy(Y[p]))],
            )
            replies.append(reply.delta - torch.from_numpy(clipped(gradients(p, START), 0.8).mean(0)))
        messages += replies
        means.append(sum(replies) / P)
    assert float(torch.cat(messages).std()) == pytest.approx(std * math.sqrt(P), rel=0.05)
    assert float(torch.cat(means).std()) == pytest.approx(std, rel=0.08)


def test_dp_gd_is_diff2_that_always_restarts(visible_noise):
    descent, always = simulation(DPGD(**SETTINGS)), simulation(DIFF2(interval=1, clip_difference=9.0, **SETTINGS))
    assert descent.run(6) == always.run(6)
    assert vector(descent.model).tolist() == vector(always.model).tolist()


def test_the_previous_model_is_sent_except_to_restarts():
    sent = simulation(DIFF2(interval=3, **SETTINGS)).run(7)
    assert [row["bytes_down"] // (P * FEATURES * 8) for row in sent] == [1, 2, 2, 1, 2, 2, 1]
    assert {row["bytes_up"] for row in sent} == {P * FEATURES * 8}


# -- missed rounds -----------------------------------------------------------------------------------------------------


def trace(tmp_path, missing):
    lines = [",".join("0" if missing.get(r) == p else "1" for p in range(P)) for r in range(11)]
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(lines) + "\n")
    return TracedParticipation(path=str(path))


def test_a_missed_round_does_not_count_and_the_next_one_restarts(visible_noise, tmp_path, caplog):
    algorithm = DIFF2(interval=4, clip_difference=2.0, **SETTINGS)
    job = simulation(algorithm, participation=trace(tmp_path, {2: 1, 6: 0, 7: 2}))
    models = oracle(11, interval=4, clip=0.8, clip_difference=2.0, missing=(2, 6, 7))
    with caplog.at_level(logging.WARNING, "distopt"):
        for round, x in enumerate(models, 1):
            job.run(round)
            np.testing.assert_allclose(vector(job.model), x, rtol=1e-11, atol=1e-11)
    history = job.history
    assert {row["round"]: row["missed"] for row in history if "missed" in row} == {3: [1], 7: [0], 8: [2]}
    assert "round 3 of diff2 does not count, because client 1 gave no answer" in caplog.text
    restarts = [row["round"] for row in history if row["bytes_down"] <= P * FEATURES * 8]
    assert restarts == [1, 4, 8, 9]
    spent = [row["epsilon"] for row in history]
    assert spent[2] == spent[1] < spent[3]
    assert job.refused == {"too few replies": 6}


def test_with_distributed_noise_a_missed_round_is_counted(tmp_path):
    rows = simulation(DPGD(noise="distributed", **SETTINGS), participation=trace(tmp_path, {1: 1})).run(3).rows
    assert rows[0]["epsilon"] < rows[1]["epsilon"] < rows[2]["epsilon"]
    assert all(row["epsilon_to_server"] > row["epsilon"] for row in rows)


# -- laws --------------------------------------------------------------------------------------------------------------

ALGORITHMS = {
    "dp-gd": DPGD(**SETTINGS),
    "diff2": DIFF2(interval=3, **SETTINGS),
    "diff2 distributed": DIFF2(interval=3, noise="distributed", **SETTINGS),
    "diff2 accounted": DIFF2(interval=3, accountant="rdp", **SETTINGS),
}
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=list(ALGORITHMS))


def reply_of(client, version, **changes):
    random = torch.Generator().manual_seed(100 * version + client)
    fields = {"client": client, "version": version, "num_samples": SIZES[client % P], "num_steps": 1}
    tensors = {"delta": 0.1 * torch.randn(FEATURES, generator=random, dtype=torch.float64)}
    return Reply(**{**fields, "tensors": tensors, **changes})


def everybody(version):
    return [reply_of(client, version) for client in range(P)]


def begun(algorithm, rounds=4):
    server = Server(algorithm, FEATURES)
    state = server.begin(torch.from_numpy(START), P)
    for _ in range(rounds):
        state, _ = server.step(state, everybody(state.version))
    return server, state


def bits(value):
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    return {key: bits(part) for key, part in value.items() if key != "refused"} if isinstance(value, dict) else value


def after(algorithm, replies):
    server, state = begun(algorithm)
    state, broadcast = server.step(state, replies(state.version))
    return bits(state.state_dict()), state.refused, bits(dict(broadcast.extras))


@every_algorithm
def test_order_of_arrival_changes_no_bit(algorithm):
    expected = after(algorithm, everybody)
    for order in ((2, 1, 0), (1, 2, 0)):
        assert after(algorithm, lambda version, order=order: [reply_of(p, version) for p in order]) == expected


@every_algorithm
@pytest.mark.parametrize(
    ("reason", "broken"),
    [
        ("not finite", {"tensors": {"delta": torch.full((FEATURES,), math.nan, dtype=torch.float64)}}),
        ("shape", {"tensors": {"delta": torch.zeros(FEATURES + 1, dtype=torch.float64)}}),
        ("late", {"version": 3}),
        ("unknown client", {"client": P}),
        ("numbers", {"num_steps": 0}),
        ("too few samples", {"num_samples": min(SIZES) - 1}),
        ("too few samples", {"num_samples": 0, "num_steps": 0}),
    ],
)
def test_a_reply_that_does_not_count_is_as_if_its_client_were_missing(algorithm, reason, broken):
    missing, refused, extras = after(algorithm, lambda version: everybody(version)[:-1])
    assert refused == Counter({"too few replies": P - 1})
    assert not extras  # a restart
    assert missing["model"] == bits(begun(algorithm)[1].model)
    found = after(
        algorithm, lambda version: [*everybody(version)[:-1], dataclasses.replace(reply_of(2, version), **broken)]
    )
    assert found == (missing, Counter({"too few replies": P - 1, reason: 1}), extras)


@every_algorithm
def test_a_reply_that_comes_twice_counts_once(algorithm):
    expected, _, extras = after(algorithm, everybody)
    found = after(algorithm, lambda version: [*everybody(version), reply_of(1, version)])
    assert found == (expected, Counter({"duplicate": 1}), extras)


@every_algorithm
def test_a_resumed_server_goes_on_to_the_bit_and_its_checkpoint_has_no_key(algorithm):
    server, state = begun(algorithm)
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert saved["memory"]["counters"]["noise"] == {}
    resumed = Server(algorithm, FEATURES).load(saved, P)
    for _ in range(4):
        replies = everybody(state.version)
        (state, sent), (resumed, again) = server.step(state, replies), server.step(resumed, replies)
        assert bits(dict(sent.extras)) == bits(dict(again.extras))
        assert bits(state.state_dict()) == bits(resumed.state_dict())


@every_algorithm
def test_what_was_handed_out_does_not_change_afterwards(algorithm):
    server, state = begun(algorithm)
    model, broadcast, saved = state.model, server.broadcast(state), state.state_dict()
    before = bits(model), bits(dict(broadcast.extras)), bits(saved)
    server.step(state, everybody(state.version))
    assert (bits(model), bits(dict(broadcast.extras)), bits(saved)) == before


@every_algorithm
def test_nobody_may_join(algorithm):
    server, state = begun(algorithm)
    with pytest.raises(ConfigError, match=f"no client may join in a run of '{algorithm.name}'.* for 3, got 2 more"):
        server.add_clients(state, 2)
    with pytest.raises(ConfigError, match="num_clients must be that of the job, 4, got 3"):
        server.begin(torch.from_numpy(START), P + 1)


@every_algorithm
def test_damaged_counters_are_refused(algorithm):
    server, state = begun(algorithm)
    for counter, broken in (("ledger", {"restart": -1, "difference": 0}), ("ledger", {}), ("rounds", {"count": "x"})):
        saved = state.state_dict()
        saved["memory"]["counters"][counter] = broken
        with pytest.raises(StateMismatchError, match="damaged"):
            server.load(saved, P)


@every_algorithm
def test_configuration_survives_json(algorithm):
    assert FederatedAlgorithm.from_dict(json.loads(json.dumps(algorithm.to_dict()))) == algorithm


@every_algorithm
def test_buffers_behind_the_trained_elements_stay(algorithm):
    """The engines refuse such models; a server that has one leaks nothing of them."""
    server = Server(algorithm, FEATURES)
    state = server.begin(torch.cat([torch.from_numpy(START), torch.ones(2, dtype=torch.float64)]), P)
    rest = torch.full((2,), 5.0, dtype=torch.float64)
    replies = [reply_of(p, 0, tensors={**reply_of(p, 0).tensors, "rest": rest}) for p in range(P)]
    state, _ = server.step(state, replies)
    assert not state.refused
    assert state.model[FEATURES:].tolist() == [1.0, 1.0]


def test_a_client_with_too_few_samples_or_without_its_samples_says_so():
    client = Client(algorithm=ALGORITHMS["dp-gd"], loss=square, optimizer=None)
    layout, made = Layout(model()), model()
    batch = torch.from_numpy(X[0]), torch.from_numpy(Y[0])

    def step(num_samples, samples):
        sent = Broadcast(version=0, model=torch.from_numpy(START))
        return client.step(made, layout, {}, sent, (), client=1, num_samples=num_samples, samples=samples)

    with pytest.raises(ConfigError, match="got 5 and client 1 with 4"):
        step(4, lambda: [tuple(part[:4] for part in batch)])
    with pytest.raises(ConfigError, match="samples must give all 5 samples of client 1 once, got 0"):
        step(5, tuple)
    kept, reply = step(0, tuple)
    assert (kept, reply.num_samples, reply.num_steps) == ({}, 0, 0)
    assert torch.equal(reply.delta, torch.zeros(FEATURES, dtype=torch.float64))

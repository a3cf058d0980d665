"""DP-FedAvg: its equations, fixed and adaptive, and its sensitivity: what one client can do to a round."""

import math

import pytest
import torch

from distopt.errors import ConfigError, StateMismatchError
from distopt.federated import DPFedAvg, Reply, Server, ServerMomentum
from distopt.federated.privacy import epsilon_of
from distopt.federated.privacy.accountant import Releases
from distopt.federated.privacy.noise import NoiseSource

D, N = 6, 5
START = torch.linspace(-1, 1, D, dtype=torch.float64)


@pytest.fixture
def visible_noise(monkeypatch):
    """In place of noise its standard deviation."""
    monkeypatch.setattr(NoiseSource, "add", lambda self, values, std, *purpose: values + std)


@pytest.fixture
def no_noise(monkeypatch):
    monkeypatch.setattr(NoiseSource, "add", lambda self, values, std, *purpose: values)


def reply(client, version, delta, num_samples=10):
    return Reply(client=client, version=version, num_samples=num_samples, num_steps=1, tensors={"delta": delta})


def deltas(version, clients, scale=1.0):
    random = torch.Generator().manual_seed(version)
    rows = torch.randn(N, D, generator=random, dtype=torch.float64) * torch.linspace(0.1, 2, N)[:, None] * scale
    return {client: rows[client] for client in clients}


def stepped(algorithm, rounds):
    server = Server(algorithm, D)
    state = server.begin(START, N)
    for clients in rounds:
        given = deltas(state.version, clients)
        state, _ = server.step(state, [reply(client, state.version, delta) for client, delta in given.items()])
        yield state


ROUNDS = [[0, 1, 2, 3, 4], [1, 4], [], [0, 2, 3]]


@pytest.mark.parametrize("expected", [None, 2.5])
def test_fixed_clipping(visible_noise, expected):
    algorithm = DPFedAvg(clip=0.8, noise_multiplier=1.3, expected_clients=expected, server_lr=0.5)
    x, m = START.clone(), expected or N
    for clients, state in zip(ROUNDS, stepped(algorithm, ROUNDS), strict=True):
        if clients:
            given = deltas(state.version - 1, clients)
            total = sum(delta * min(1.0, 0.8 / float(delta.norm())) for delta in given.values())
            x = x + 0.5 * (total / m + 1.3 * 0.8 / m)
        torch.testing.assert_close(state.model, x, rtol=1e-12, atol=1e-12)


def test_adaptive_clipping(visible_noise):
    z, share_std, gamma, eta = 1.3, 2.0, 0.4, 0.5
    settings = {"clip": 0.8, "noise_multiplier": z, "quantile": gamma, "clip_lr": eta, "share_std": share_std}
    algorithm = DPFedAvg(**settings)
    x, c = START.clone(), 0.8
    left = (z**-2 - (2 * share_std) ** -2) ** -0.5
    for clients, state in zip(ROUNDS, stepped(algorithm, ROUNDS), strict=True):
        if clients:
            norms = {client: float(delta.norm()) for client, delta in deltas(state.version - 1, clients).items()}
            given = deltas(state.version - 1, clients)
            x = x + sum(given[i] * min(1.0, c / norms[i]) for i in clients) / N + left * c / N
            share = 0.5 + (sum((norms[i] <= c) - 0.5 for i in clients) + share_std) / N
            c = c * math.exp(-eta * (share - gamma))
        torch.testing.assert_close(state.model, x, rtol=1e-12, atol=1e-12)
        assert algorithm.clip_of(state.memory) == pytest.approx(c, rel=1e-12)
        assert algorithm.columns(state.memory)["clip"] == pytest.approx(c, rel=1e-12)


def test_both_releases_of_a_round_cost_what_the_multiplier_does():
    algorithm = DPFedAvg(noise_multiplier=1.3, quantile=0.5, share_std=2.0)
    left, share_std = algorithm.multipliers(10)
    # the deltas' sum has sensitivity C, the shares' 1/2: divergences of Gaussians add up
    assert 1 / left**2 + 0.5**2 / share_std**2 == pytest.approx(1 / 1.3**2)


def test_the_bound_finds_the_quantile(no_noise):
    """Norms are uniform in (0, 10]: with quantile 0.3 the bound tends to 3."""
    server = Server(DPFedAvg(clip=0.1, noise_multiplier=1.0, quantile=0.3, clip_lr=0.2), D)
    state = server.begin(START, 100)
    unit = torch.ones(D, dtype=torch.float64) / D**0.5
    for _ in range(200):
        replies = [reply(i, state.version, unit * (i + 1) / 10) for i in range(100)]
        state, _ = server.step(state, replies)
    assert server.algorithm.clip_of(state.memory) == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize("norm", [0.0, 0.5, 1e6, 1e200])
def test_one_client_moves_a_round_by_at_most_c_over_m(no_noise, norm):
    """Whatever it sends: also if it was told to clip and did not."""
    algorithm = DPFedAvg(clip=0.8, noise_multiplier=1.0, quantile=0.5)
    unit = torch.ones(D, dtype=torch.float64) / D**0.5
    server, moved, bounds = Server(algorithm, D), [], []
    for clients in (range(N), range(N - 1)):
        state = server.begin(START, N)
        rest = [reply(i, 0, delta) for i, delta in deltas(0, [i for i in clients if i < N - 1]).items()]
        own = [reply(N - 1, 0, norm * unit)] if N - 1 in clients else []
        state, _ = server.step(state, rest + own)
        assert not state.refused
        moved.append(state.model)
        bounds.append(algorithm.clip_of(state.memory))
    assert float((moved[0] - moved[1]).norm()) <= 0.8 / N * (1 + 1e-9)
    assert abs(math.log(bounds[0] / bounds[1])) <= 0.2 * 0.5 / N * (1 + 1e-9)


def test_clients_count_the_same_whatever_their_samples(no_noise):
    server = Server(DPFedAvg(clip=9.0, noise_multiplier=1.0), D)
    state = server.begin(START, 2)
    ones = torch.ones(D, dtype=torch.float64)
    state, _ = server.step(state, [reply(0, 0, ones, num_samples=1), reply(1, 0, 3 * ones, num_samples=1000)])
    torch.testing.assert_close(state.model, START + 2.0)


def test_epsilon_is_of_the_rounds_that_released_something():
    algorithm = DPFedAvg(noise_multiplier=5.0)
    spent = [algorithm.spent(state.memory) for state in stepped(algorithm, ROUNDS)]
    expected = [epsilon_of("closed-form", [Releases(noise_multiplier=5.0, count=k)], 1e-5) for k in (1, 2, 2, 3)]
    assert spent == pytest.approx(expected)


def test_noise_from_an_epsilon_is_spent_in_its_rounds():
    for accountant in ("closed-form", "rdp"):
        algorithm = DPFedAvg(epsilon=2.0, rounds=4, accountant=accountant)
        *_, last = stepped(algorithm, [[0, 1]] * 4)
        assert 2.0 * (1 - 1e-6) < algorithm.spent(last.memory) <= 2.0 == algorithm.most_epsilon


# -- clients that are drawn in secret ----------------------------------------------------------------------------------

SAMPLED = {"noise_multiplier": 1.0, "sampling_probability": 0.2, "accountant": "rdp", "noise_seed": 0}


def test_an_empty_round_has_noise_too():
    """It must not be told from a round of one client whose update is zero."""
    algorithm = DPFedAvg(**SAMPLED)
    server = Server(algorithm, D)
    state, _ = server.step(server.begin(START, N), [])
    zero, _ = server.step(server.begin(START, N), [reply(1, 0, torch.zeros(D, dtype=torch.float64))])
    assert torch.equal(state.model, zero.model)
    assert not torch.equal(state.model, START)
    assert algorithm.spent(state.memory) == algorithm.spent(zero.memory) > 0
    nothing, _ = server.step(server.begin(START, N), [reply(1, 0, torch.ones(D, dtype=torch.float64), num_samples=0)])
    assert torch.equal(nothing.model, zero.model)


def test_the_expected_number_is_that_of_a_draw(visible_noise):
    server = Server(DPFedAvg(clip=2.0, **SAMPLED), D)
    state, _ = server.step(server.begin(START, 50), [])
    torch.testing.assert_close(state.model, START + 1.0 * 2.0 / (50 * 0.2))


def test_sampling_is_counted():
    sampled, all_of_them = DPFedAvg(**SAMPLED), DPFedAvg(noise_multiplier=1.0, accountant="rdp")
    assert sampled.releases({"round": 1})[0].sampling == 0.2
    assert sampled._cost({"round": 30}) < all_of_them._cost({"round": 30}) / 2


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "noise_multiplier must be given where epsilon is not, and only there, got None beside epsilon=None"),
        ({"noise_multiplier": 1.0, "epsilon": 2.0, "rounds": 3}, "got 1.0 beside epsilon=2.0"),
        ({"epsilon": 2.0}, "rounds must be an integer of at least 1, got None"),
        ({"noise_multiplier": 1.0, "sampling_probability": 0.1}, "accountant must be 'rdp' beside sampling_probab"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        DPFedAvg(**settings)


def test_shares_that_leave_nothing_for_the_sum_are_refused_at_the_start():
    server = Server(DPFedAvg(noise_multiplier=4.0, quantile=0.5, share_std=2.0), D)
    with pytest.raises(ConfigError, match=r"share_std must be above half the noise multiplier, 2, got 2\.0"):
        server.begin(START, N)
    Server(DPFedAvg(noise_multiplier=4.0, quantile=0.5), D).begin(START, N)


def test_a_damaged_bound_is_refused():
    server = Server(DPFedAvg(noise_multiplier=1.0), D)
    saved = server.begin(START, N).state_dict()
    for broken in ({}, {"value": math.nan}, {"value": 0.0}):
        saved["memory"]["counters"]["clip"] = broken
        with pytest.raises(StateMismatchError, match="bound of the updates must be a number above 0"):
            server.load(saved, N)


def test_a_server_optimizer_sees_only_what_is_protected(visible_noise):
    algorithm = DPFedAvg(clip=0.8, noise_multiplier=1.0, server_optimizer=ServerMomentum(momentum=0.5))
    *_, state = stepped(algorithm, [[0], [1]])
    one, two = (
        delta * min(1.0, 0.8 / float(delta.norm())) / N + 0.8 / N for delta in (deltas(0, [0])[0], deltas(1, [1])[1])
    )
    torch.testing.assert_close(state.model, START + one + (0.5 * one + two), rtol=1e-12, atol=1e-12)

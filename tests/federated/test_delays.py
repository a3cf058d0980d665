"""The laws of delays, for every registered model, and the distribution of each."""

import io

import numpy as np
import pytest
import torch

from distopt.errors import ConfigError, StateMismatchError
from distopt.federated import (
    ConstantDelays,
    Delays,
    ExponentialDelays,
    HeavyTailedDelays,
    TracedDelays,
    UniformDelays,
)

MEANS = (0.2, 0.5, 1.0, 3.0)
MODELS = {
    "constant": ConstantDelays(mean_s=MEANS),
    "constant linear": ConstantDelays(mean_s=0.2, slowest=5.0),
    "constant equal": ConstantDelays(),
    "uniform": UniformDelays(mean_s=MEANS),
    "exponential": ExponentialDelays(mean_s=MEANS),
    "heavy-tailed": HeavyTailedDelays(mean_s=MEANS, tail=4.0),
    "trace": TracedDelays(path="given below"),
}
SPREAD = ["uniform", "exponential", "heavy-tailed"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("delays") / "seconds.csv"
    file.write_text("a,b,c,d\n0.5,1,2,3\n,1.5,nan,4\n0.25,2,2.5,5\n")
    return str(file)


def model_of(name, path):
    return TracedDelays(path=path) if name == "trace" else MODELS[name]


def drawn(process, num_works):
    """(num_works, num_clients) seconds."""
    return np.array([[process.next(client) for client in range(process.num_clients)] for _ in range(num_works)])


def through_torch(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_every_model_has_an_example_here():
    assert {type(each) for each in MODELS.values()} == set(Delays._known.values())
    assert sorted(Delays._known) == ["constant", "exponential", "heavy-tailed", "trace", "uniform"]


@pytest.mark.parametrize("name", MODELS)
def test_a_work_takes_equally_long_whoever_is_asked_before(name, path):
    expected = drawn(model_of(name, path).begin(4, 7), 6)
    assert (expected > 0).all()
    process = model_of(name, path).begin(4, 7)
    for client in (3, 1, 0, 2):
        assert [process.next(client) for _ in range(6)] == expected[:, client].tolist()
    assert all(type(process.next(client)) is float for client in range(4))


@pytest.mark.parametrize("name", SPREAD)
def test_seeds_clients_and_works_differ(name):
    model = type(MODELS[name])(mean_s=1.0)
    times = np.stack([drawn(model.begin(4, seed), 6) for seed in range(3)])
    assert len(np.unique(times)) == times.size


@pytest.mark.parametrize("name", MODELS)
def test_the_average_is_the_mean(name, path):
    process = model_of(name, path).begin(4, 0)
    works = 2 * 3 * 500  # whole repetitions of the trace
    times = drawn(process, works)
    assert process.mean_s.shape == (4,)
    deviation = times.std(axis=0) / works**0.5
    assert (np.abs(times.mean(axis=0) - process.mean_s) <= 5 * deviation + 1e-9).all()


def test_the_means_of_the_clients():
    for name in ("constant", *SPREAD):
        assert MODELS[name].begin(4).mean_s.tolist() == list(MEANS)
    linear = ConstantDelays(mean_s=0.2, slowest=5.0).begin(10)
    assert np.allclose(linear.mean_s, 0.2 + 0.8 * np.arange(10) / 9)
    assert drawn(linear, 1)[0].tolist() == linear.mean_s.tolist()
    assert ConstantDelays(mean_s=0.2, slowest=5.0).begin(1).mean_s.tolist() == [0.2]


def kolmogorov(times, distribution):
    """The largest distance between the empirical distribution and a distribution function."""
    times = np.sort(times)
    at = distribution(times)
    steps = np.arange(len(times) + 1) / len(times)
    return max((steps[1:] - at).max(), (at - steps[:-1]).max())


@pytest.mark.parametrize(
    ("model", "distribution"),
    [
        (UniformDelays(mean_s=2.0, spread=0.25), lambda x: np.clip((x - 1.5) / 1.0, 0, 1)),
        (ExponentialDelays(mean_s=2.0), lambda x: 1 - np.exp(-x / 2)),
        (HeavyTailedDelays(mean_s=2.0, tail=1.5), lambda x: 1 - np.maximum(3 * x / 2, 1) ** -1.5),
    ],
    ids=SPREAD,
)
def test_the_distributions(model, distribution):
    process = model.begin(50, 0)
    assert kolmogorov(drawn(process, 100).ravel(), distribution) < 1.95 / 5000**0.5  # exceeded once in a thousand
    if isinstance(model, UniformDelays):
        return
    wrong = kolmogorov(drawn(process, 100).ravel() * 1.2, distribution)
    assert wrong > 1.95 / 5000**0.5


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_resumed_run_is_the_same_bit_by_bit(name, path, joined):
    if joined and name == "trace":
        return
    process = model_of(name, path).begin(4, 2)
    for client in (0, 1, 1, 3):
        process.next(client)
    if joined:
        process.add_clients(2, 7.0)
        assert process.mean_s[4:].tolist() == [7.0, 7.0]
        process.next(5)
    state = through_torch(process.state_dict())
    kept = process.state_dict()
    expected = drawn(process, 10)
    assert all(torch.equal(kept[key], state[key]) for key in ("done", "mean_s"))
    resumed = model_of(name, path).begin(4, 99)
    drawn(resumed, 1)
    for _ in range(2):
        resumed.load_state_dict(state)
        assert np.array_equal(drawn(resumed, 10), expected)


def test_clients_that_join():
    process = UniformDelays(mean_s=3.0).begin(2)
    process.add_clients(1)
    process.add_clients(2, (1.0, 2.0))
    assert process.mean_s.tolist() == [3.0, 3.0, 3.0, 1.0, 2.0]
    assert 0.5 <= process.next(3) <= 1.5
    for name in ("constant", "constant linear"):
        with pytest.raises(ConfigError, match=r"mean_s must be given for clients that join .*, got None; give theirs"):
            MODELS[name].begin(4).add_clients(1)
    with pytest.raises(ConfigError, match="mean_s must be a positive number of seconds or one per client, got 0"):
        process.add_clients(1, 0)
    with pytest.raises(ConfigError, match="num_clients must be an integer of at least 1, got 0; give how many"):
        process.add_clients(0)
    assert process.num_clients == len(process.mean_s) == 5


def test_a_trace(path, tmp_path):
    process = TracedDelays(path=path).begin(4)
    assert [process.next(0) for _ in range(5)] == [0.5, 0.25, 0.5, 0.25, 0.5]
    assert [process.next(2) for _ in range(3)] == [2.0, 2.5, 2.0]
    assert process.mean_s.tolist() == [0.375, 1.5, 2.25, 4.0]
    for name, text in (
        ("long.csv", "round,client,seconds\n2,0,0.25\n0,1,9\n0,0,0.5\n"),
        ("wide.json", '{"rounds": [[0.5, 9], [null, null], [0.25, null]]}'),
        ("long.json", '{"entries": [[0, 0, 0.5], [2, 0, 0.25], [0, 1, 9]]}'),
    ):
        (tmp_path / name).write_text(text)
        process = TracedDelays(path=str(tmp_path / name), at_end="error").begin(2)
        assert [process.next(0), process.next(0), process.next(1)] == [0.5, 0.25, 9.0]
        for _ in range(2):  # it stays at its end
            with pytest.raises(ConfigError, match=r"must have a time for each work, got only 2 of client 0; use"):
                process.next(0)
    with pytest.raises(ConfigError, match=r"num_clients must stay 2 with the trace .*, got 3 more; the trace does not"):
        process.add_clients(3)
    with pytest.raises(ConfigError, match="there must be a time of every client, got none of client 2; add one"):
        TracedDelays(path=str(tmp_path / "long.csv")).begin(3)
    with pytest.raises(ConfigError, match="there must be one column per client, 3, got 4"):
        TracedDelays(path=path).begin(3)


@pytest.mark.parametrize("name", MODELS)
def test_bad_numbers(name, path):
    model = model_of(name, path)
    with pytest.raises(ConfigError, match="num_clients must be an integer of at least 1, got 0; give the number of"):
        model.begin(0)
    with pytest.raises(ConfigError, match="seed must be an integer of at least 0, got -1"):
        model.begin(4, -1)
    for client in (-1, 4):
        with pytest.raises(ConfigError, match=rf"client must be in \[0, 4\), got {client}; clients count from 0"):
            model.begin(4).next(client)


def test_configurations_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"slowest must be 1\.0 with a mean_s for each client, got 2.0; leave it out"):
        ConstantDelays(mean_s=MEANS, slowest=2.0)
    with pytest.raises(ConfigError, match="mean_s must be one number or one per client, 5, got 4; give one for each"):
        ConstantDelays(mean_s=MEANS).begin(5)
    with pytest.raises(ConfigError, match=r"mean_s\[1\] must be a positive number of seconds, got -1.0; use 1.0"):
        ConstantDelays(mean_s=(0.5, -1.0))


def test_a_state_of_something_else_is_refused(path):
    state = ExponentialDelays(mean_s=2.0).begin(4).state_dict()
    for process, message in (
        (UniformDelays(mean_s=2.0).begin(4), "name of the state must be 'uniform', got 'exponential'"),
        (ExponentialDelays(mean_s=1.0).begin(4), "mean_s of the state must be that of the configuration"),
        (ExponentialDelays(mean_s=2.0).begin(5), "num_clients of the state must be at least 5, got 4"),
    ):
        with pytest.raises(StateMismatchError, match=message):
            process.load_state_dict(state)
    with pytest.raises(StateMismatchError, match="the state must have the key 'done'"):
        ExponentialDelays(mean_s=2.0).begin(4).load_state_dict({k: v for k, v in state.items() if k != "done"})
    grown = {**TracedDelays(path=path).begin(4).state_dict(), "num_clients": 5}
    with pytest.raises(StateMismatchError, match="num_clients of the state must be 4, got 5"):
        TracedDelays(path=path).begin(4).load_state_dict(grown)

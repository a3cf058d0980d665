"""The laws of participation, for every registered model, and the frequencies that each promises."""

import io
import json

import numpy as np
import pytest
import torch

from distopt.errors import ConfigError, StateMismatchError
from distopt.federated import (
    Bernoulli,
    Cyclic,
    Everybody,
    Markov,
    Participation,
    TracedParticipation,
    UniformSampling,
    correlated_probabilities,
)

NUM_CLIENTS = 40
PROBABILITIES = np.linspace(0.02, 1.0, NUM_CLIENTS)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A trace of 7 rounds, the last without anybody."""
    rows = np.random.default_rng(0).integers(0, 2, (7, NUM_CLIENTS))
    rows[-1] = 0
    file = tmp_path_factory.mktemp("trace") / "rounds.csv"
    file.write_text("\n".join(",".join(map(str, row)) for row in rows.tolist()))
    return str(file)


MODELS = {
    "uniform": UniformSampling(fraction=0.2),
    "uniform by count": UniformSampling(count=7),
    "bernoulli": Bernoulli(probability=PROBABILITIES),
    "bernoulli of one": Bernoulli(probability=0.3),
    "markov": Markov(probability=PROBABILITIES),
    "markov of one": Markov(probability=0.3, off_to_on=0.5),
    "cyclic": Cyclic(probability=PROBABILITIES),
    "cyclic of one": Cyclic(probability=0.3, period=10),
    "everybody": Everybody(),
    "trace": TracedParticipation(path="given below"),
}
RANDOM = [name for name in MODELS if name not in ("everybody", "trace")]
OPEN = [name for name in MODELS if name != "trace"]
PER_CLIENT = ("bernoulli", "markov", "cyclic")


def model_of(name, path):
    return TracedParticipation(path=path) if name == "trace" else MODELS[name]


def rounds_of(process, num_rounds):
    """(num_rounds, num_clients) of 0 and 1, and the form of every answer checked."""
    table = np.zeros((num_rounds, process.num_clients), dtype=np.int64)
    for row in table:
        clients = process.next_round()
        assert clients.dtype == np.int64
        assert clients.ndim == 1
        assert (np.diff(clients) > 0).all()
        row[clients] = 1
    return table


def through_torch(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_every_model_has_an_example_here():
    assert {type(each) for each in MODELS.values()} == set(Participation._known.values())
    assert sorted(Participation._known) == ["bernoulli", "cyclic", "everybody", "markov", "trace", "uniform"]


@pytest.mark.parametrize("name", MODELS)
def test_the_same_seed_gives_the_same_rounds(name, path):
    one, other = (rounds_of(model_of(name, path).begin(NUM_CLIENTS, 5), 20) for _ in range(2))
    assert np.array_equal(one, other)
    if name in RANDOM:
        assert not np.array_equal(one, rounds_of(model_of(name, path).begin(NUM_CLIENTS, 6), 20))


@pytest.mark.parametrize("name", MODELS)
def test_the_long_run_frequencies_are_the_probabilities(name, path):
    """Within 5 standard deviations, which the runs of a Markov chain make larger by (1+c)/(1-c), c its correlation."""
    num_rounds = 7 * 1000
    process = model_of(name, path).begin(NUM_CLIENTS, 1)
    frequency = rounds_of(process, num_rounds).mean(axis=0)
    p = process.probabilities
    assert p.shape == (NUM_CLIENTS,)
    assert p.dtype == np.float64
    inflation = 1.0
    if name.startswith("markov"):
        off_to_on, on_to_off = process.transitions(p)
        correlation = 1 - off_to_on - on_to_off
        inflation = (1 + correlation) / (1 - correlation)
    deviation = np.sqrt(p * (1 - p) * inflation / num_rounds)
    exact = 1e-12 if name not in ("markov", "bernoulli") else 1e-3  # of a client that is nearly always or never there
    assert (np.abs(frequency - p) <= 5 * deviation + exact).all()


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_resumed_run_is_the_same_bit_by_bit(name, path, joined):
    if joined and name not in OPEN:
        return
    process = model_of(name, path).begin(NUM_CLIENTS, 2)
    rounds_of(process, 13)
    if joined:
        process.add_clients(3, *([0.4] if name in PER_CLIENT else []))
        rounds_of(process, 2)
    state = through_torch(process.state_dict())
    expected = rounds_of(process, 150)
    resumed = model_of(name, path).begin(NUM_CLIENTS, 99)
    rounds_of(resumed, 5)
    for _ in range(2):  # the state has not moved on with what was made of it
        resumed.load_state_dict(state)
        assert resumed.num_clients == process.num_clients
        assert np.array_equal(resumed.probabilities, process.probabilities)
        assert np.array_equal(rounds_of(resumed, 150), expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_state_does_not_move_with_its_process(name, path):
    process = model_of(name, path).begin(NUM_CLIENTS, 2)
    state = process.state_dict()
    before = through_torch(state)
    first = rounds_of(process, 30)
    process.load_state_dict(state)
    assert np.array_equal(rounds_of(process, 30), first)
    assert all(torch.equal(state[key], before[key]) for key in state if isinstance(state[key], torch.Tensor))


@pytest.mark.parametrize("name", OPEN)
def test_clients_that_join(name, path):
    process = MODELS[name].begin(NUM_CLIENTS, 3)
    rounds_of(process, 4)
    process.add_clients(20, *([0.5] if name in PER_CLIENT else []))
    process.add_clients(1, *([0.5] if name in PER_CLIENT else []))
    assert process.num_clients == NUM_CLIENTS + 21
    p = process.probabilities
    assert len(p) == NUM_CLIENTS + 21
    if name in PER_CLIENT:
        assert np.array_equal(p[:NUM_CLIENTS], MODELS[name].begin(NUM_CLIENTS).probabilities)
        assert (p[NUM_CLIENTS:] == 0.5).all()
    newest = rounds_of(process, 2000)[:, NUM_CLIENTS:]
    assert newest.any(axis=0).all()
    assert newest.mean() == pytest.approx(p[NUM_CLIENTS:].mean(), rel=0.1)


def test_sampling_follows_the_number_of_clients_only_by_its_fraction():
    for model, before, after in ((UniformSampling(fraction=0.2), 4, 6), (UniformSampling(count=5), 5, 5)):
        process = model.begin(20)
        assert len(process.next_round()) == before
        process.add_clients(10)
        assert len(process.next_round()) == after
    assert len(UniformSampling(fraction=0.01).begin(3).next_round()) == 1


def test_every_set_of_clients_is_sampled_equally_often():
    process = UniformSampling(count=2).begin(4, 0)
    counts = {}
    for _ in range(6000):
        key = tuple(process.next_round().tolist())
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 6
    assert all(abs(count - 1000) < 5 * 30 for count in counts.values())


def test_bernoulli_clients_are_independent_of_each_other_and_of_the_past():
    table = rounds_of(Bernoulli(probability=0.5).begin(2, 0), 10_000)
    assert abs(np.corrcoef(table.T)[0, 1]) < 0.05
    assert abs(np.corrcoef(table[1:, 0], table[:-1, 0])[0, 1]) < 0.05


@pytest.mark.parametrize(
    ("p", "off_to_on", "on_to_off"),
    [(0.02, 0.05 / 2.45, 1.0), (0.1, 0.05, 0.45), (0.5, 0.05, 0.05), (1.0, 0.05, 0.0)],
)
def test_the_transitions_of_the_chain(p, off_to_on, on_to_off):
    """As the paper has them, also where a (1/p - 1) is above 1: counted over 2,000 clients and 200 rounds."""
    process = Markov(probability=p).begin(2000, 0)
    assert [float(each) for each in process.transitions(np.float64(p))] == pytest.approx([off_to_on, on_to_off])
    table = rounds_of(process, 200)
    assert abs(table[0].mean() - p) <= 5 * np.sqrt(p * (1 - p) / 2000)  # stationary from the first round on
    assert abs(table[-1].mean() - p) <= 5 * np.sqrt(p * (1 - p) / 2000)
    before, after = table[:-1], table[1:]
    for state, expected in ((0, off_to_on), (1, on_to_off)):
        there = before == state
        if not there.any():
            assert (p, state) == (1.0, 0)
            continue
        frequency = (after[there] != state).mean()
        assert abs(frequency - expected) <= 5 * np.sqrt(expected * (1 - expected) / there.sum()) + 1e-12


def test_cycles_are_exact():
    process = Cyclic(probability=PROBABILITIES).begin(NUM_CLIENTS, 4)
    table = rounds_of(process, 300)
    expected = np.rint(100 * PROBABILITIES)
    for start in (0, 37, 200):
        assert np.array_equal(table[start : start + 100].sum(axis=0), expected)
    assert np.array_equal(table[100:200], table[:100])
    begins = ((np.roll(table[:100], 1, axis=0) == 0) & (table[:100] == 1)).sum(axis=0)
    assert (begins[expected < 100] == 1).all()  # one after the other
    phases = (np.roll(table[:100], 1, axis=0) < table[:100])[:, expected < 100].argmax(axis=0)
    assert len(set(phases.tolist())) > 25
    assert rounds_of(Cyclic(probability=0.001).begin(50, 0), 100).sum(axis=0).tolist() == [1] * 50


def test_a_million_clients():
    for model in (UniformSampling(count=100), Bernoulli(), Markov(), Cyclic(), Everybody()):
        process = model.begin(1_000_000, 0)
        sizes = [len(process.next_round()) for _ in range(3)]
        expected = process.probabilities.sum()
        assert all(abs(size - expected) <= 5 * np.sqrt(expected) for size in sizes)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("wide.csv", "0,1,1\n0,0,0\n1,0,1\n"),
        ("names.csv", "a,b,c\n# num_rounds = 3\n0,1,1\n0,0,0\n1,0,1\n"),
        ("long.csv", "round,client\n2,2\n0,2\n0,1\n2,0\n"),
        ("active.csv", "Round,Client,Active\n0,2,1\n0,1,1\n1,1,0\n2,0,1\n2,2,1\n"),
        ("wide.json", '{"rounds": [[0, 1, 1], [0, 0, 0], [1, 0, 1]]}'),
        ("long.json", '{"entries": [[0, 1], [0, 2], [2, 0], [2, 2, 1]], "num_rounds": 3}'),
    ],
)
def test_the_forms_of_a_trace_mean_the_same(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    process = TracedParticipation(path=str(tmp_path / name)).begin(3)
    assert rounds_of(process, 4).tolist() == [[0, 1, 1], [0, 0, 0], [1, 0, 1], [0, 1, 1]]
    assert process.probabilities.tolist() == [1 / 3, 1 / 3, 2 / 3]


def test_the_end_of_a_trace(path):
    process = TracedParticipation(path=path, at_end="error").begin(NUM_CLIENTS)
    rounds_of(process, 7)
    with pytest.raises(ConfigError, match=r"must have a round for each round of the run, got only 7; use at_end="):
        process.next_round()


def test_the_clients_of_a_trace_cannot_change(path, tmp_path):
    with pytest.raises(ConfigError, match=r"num_clients must stay 40 with the trace .*, got 2 more; the trace"):
        TracedParticipation(path=path).begin(NUM_CLIENTS).add_clients(2)
    with pytest.raises(ConfigError, match="there must be one column per client, 39, got 40; use another trace"):
        TracedParticipation(path=path).begin(39)
    (tmp_path / "long.csv").write_text("round,client\n0,5\n")
    assert TracedParticipation(path=str(tmp_path / "long.csv")).begin(100).next_round().tolist() == [5]
    with pytest.raises(ConfigError, match=r"clients must be in \[0, 5\), got 5; clients count from 0, use more"):
        TracedParticipation(path=str(tmp_path / "long.csv")).begin(5)
    with pytest.raises(ConfigError, match=r"none\.csv cannot be read: .*; give a CSV or JSON file"):
        TracedParticipation(path=str(tmp_path / "none.csv")).begin(5)


def test_a_state_of_something_else_is_refused(path, tmp_path):
    state = Markov(probability=0.3).begin(8).state_dict()
    for process, message in (
        (Bernoulli(probability=0.3).begin(8), "name of the state must be 'bernoulli', got 'markov'; load it into what"),
        (Markov(probability=0.3).begin(9), "num_clients of the state must be at least 9, got 8; begin with as many"),
        (Markov(probability=0.2).begin(8), "probability of the state must be that of the configuration, got others"),
        (Markov(probability=0.3, off_to_on=0.1).begin(8), "off_to_on of the state must be 0.1 as in the .*, got 0.05"),
    ):
        before = json.dumps(process.state_dict()["generator"])
        with pytest.raises(StateMismatchError, match=message):
            process.load_state_dict(state)
        assert json.dumps(process.state_dict()["generator"]) == before
    process = Markov(probability=0.3).begin(8)
    with pytest.raises(StateMismatchError, match=r"the state must have the key 'active', got .*; save again"):
        process.load_state_dict({key: value for key, value in state.items() if key != "active"})
    with pytest.raises(StateMismatchError, match="the state of a generator must be what state_dict"):
        process.load_state_dict({**state, "generator": {"bit_generator": "MT19937"}})
    with pytest.raises(StateMismatchError, match="format of the state must be 1, got 2"):
        process.load_state_dict({**state, "format": 2})
    with pytest.raises(StateMismatchError, match="period of the state must be 9 as in the configuration, got 100"):
        Cyclic(period=9).begin(8).load_state_dict(Cyclic().begin(8).state_dict())
    with pytest.raises(StateMismatchError, match="count of the state must be 2 as in the configuration, got 3"):
        UniformSampling(count=2).begin(8).load_state_dict(UniformSampling(count=3).begin(8).state_dict())
    (tmp_path / "other.csv").write_text(",".join("1" * NUM_CLIENTS))
    other = TracedParticipation(path=str(tmp_path / "other.csv")).begin(NUM_CLIENTS)
    with pytest.raises(StateMismatchError, match="digest of the state must be"):
        other.load_state_dict(TracedParticipation(path=path).begin(NUM_CLIENTS).state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_bad_numbers(name, path):
    model = model_of(name, path)
    with pytest.raises(ConfigError, match="num_clients must be an integer of at least 1, got 0; give the number of"):
        model.begin(0)
    with pytest.raises(ConfigError, match="seed must be an integer of at least 0, got -1"):
        model.begin(NUM_CLIENTS, -1)
    process = model.begin(NUM_CLIENTS)
    with pytest.raises(ConfigError, match="num_clients must be an integer of at least 1, got 0; give how many"):
        process.add_clients(0)
    assert process.num_clients == NUM_CLIENTS


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("bernoulli", [2], "probability must be given for clients that join .*, got None; give theirs"),
        ("markov", [2, 1.5], r"probability must be a number in \(0, 1\] or one per client, got 1.5"),
        ("cyclic", [2, (0.1, 0.2, 0.3)], "probability must be one number or one per client, 2, got 3"),
        ("uniform", [2, 0.5], "probability must be None for 'uniform' participation, got 0.5; leave it out"),
        ("everybody", [2, 0.5], "probability must be None for 'everybody' participation, got 0.5; leave it out"),
    ],
)
def test_clients_that_cannot_join_change_nothing(name, given, message):
    process, untouched = (MODELS[name].begin(NUM_CLIENTS, 1) for _ in range(2))
    with pytest.raises(ConfigError, match=message):
        process.add_clients(*given)
    assert np.array_equal(rounds_of(process, 20), rounds_of(untouched, 20))


def test_a_model_that_does_not_fit_the_number_of_clients():
    with pytest.raises(ConfigError, match="probability must be one number or one per client, 3, got 40; give one for"):
        Bernoulli(probability=PROBABILITIES).begin(3)
    with pytest.raises(ConfigError, match=r"fraction must be left out beside count=2, got 0\.5; give one of them"):
        UniformSampling(fraction=0.5, count=2)
    with pytest.raises(ConfigError, match="count must be at most the number of clients, 3, got 7; use a fraction"):
        UniformSampling(count=7).begin(3)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_probabilities_in_any_form(kind):
    assert Bernoulli(probability=kind([0.25, 0.5])) == Bernoulli(probability=(0.25, 0.5))
    with pytest.raises(ConfigError, match=r"probability\[1\] must be a number in \(0, 1\], got 0.0; use 0.1 for one"):
        Bernoulli(probability=kind([0.25, 0.0]))


def test_probabilities_that_depend_on_the_labels():
    rng = np.random.default_rng(0)
    rows = rng.dirichlet(np.full(10, 0.1), size=250)
    drawn = [correlated_probabilities(rows, seed=seed) for seed in range(40)]
    for p in drawn:
        assert p.shape == (250,)
        assert p.min() >= 0.02
        assert p.max() <= 1.0
    assert np.array_equal(drawn[3], correlated_probabilities(rows, seed=3))
    assert not np.array_equal(drawn[3], drawn[4])
    # <e_c, m> C mean for a client of one label: what m is can be read off, and every other client follows from it
    pure = correlated_probabilities(np.vstack([np.eye(10), rows]), mean=0.01, minimum=1e-12, seed=3)
    weights = pure[:10] / (0.01 * 10)
    assert weights.sum() == pytest.approx(1.0, abs=1e-9)
    assert np.allclose(pure[10:], 0.01 * 10 * rows @ weights, atol=1e-11)
    assert np.allclose(drawn[3], np.clip(0.1 * 10 * rows @ weights, 0.02, 1.0), atol=1e-9)
    assert np.allclose(correlated_probabilities(rows, mean=1.0, seed=3), np.clip(10 * rows @ weights, 0.02, 1.0))
    assert correlated_probabilities(rows, mean=1.0, seed=3).max() == 1.0
    assert (weights > 0.3).sum() in (1, 2)  # Dir(0.1) has few large ones


@pytest.mark.parametrize(
    ("rows", "given", "message"),
    [
        ([[0.5, 0.5], [0.5, 0.4]], {}, "rows of at least 0 that sum to 1, got a sum of 0.9 for client 1; divide its"),
        ([[1.5, -0.5]], {}, "label_distributions must have rows of at least 0"),
        ([[np.nan, 1.0]], {}, "label_distributions must have rows of at least 0"),
        ([0.5, 0.5], {}, r"must be a matrix \(num_clients, num_labels\), got shape \(2,\); give one row per client"),
        ([[1.0]], {"mean": 0}, r"mean must be a number in \(0, 1\], got 0; the paper uses 0.1"),
        ([[1.0]], {"minimum": 2}, r"minimum must be a number in \(0, 1\], got 2; the paper uses 0.02"),
        ([[1.0]], {"seed": None}, "seed must be an integer of at least 0, got None"),
    ],
)
def test_bad_label_distributions(rows, given, message):
    with pytest.raises(ConfigError, match=message):
        correlated_probabilities(rows, **given)

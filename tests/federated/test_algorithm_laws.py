"""What holds for every registered algorithm, the next one included, on the day it is added.

Good and bad values of its settings are in `tests/test_config.py`.
"""

import dataclasses
import io
import json
import math
from collections import Counter

import pytest
import torch
from torch import nn

from distopt.errors import ConfigError, StateMismatchError
from distopt.federated import (
    MIFA,
    AsyncFedAvg,
    Client,
    DPFedAvg,
    FedAU,
    FedAvg,
    FedBuff,
    FederatedAlgorithm,
    FedFix,
    FedProx,
    FedSpeed,
    Layout,
    LocalRound,
    Reply,
    Scaffold,
    Server,
    ServerAdagrad,
    ServerAdam,
    ServerMomentum,
    ServerYogi,
)
from distopt.federated.messages import DELTA, REST
from distopt.federated.privacy.private_algorithm import PrivateAlgorithm

REGISTERED = {name: made for name, made in FederatedAlgorithm._known.items() if issubclass(made, FederatedAlgorithm)}
ARGUMENTS = {  # of those that have no default, or need many replies
    "known-participation": {"probability": 0.5},
    "fedfix": {"interval_s": 1.0},
    **{key: {"num_clients": 6, "fewest_samples": 10, "noise_seed": 0} for key in ("diff2", "dp-gd")},
    "dp-fedavg": {"noise_multiplier": 1.0, "noise_seed": 0},
    **{key: {"num_byzantine": 0} for key in ("trimmed-mean", "median", "krum", "multi-krum", "bulyan")},
}
OPTIONS = {
    "fedavg uniform": FedAvg(weighting="uniform", server_lr=0.5),
    "fedavgm": FedAvg(server_optimizer=ServerMomentum()),
    "fedadam": FedAvg(server_optimizer=ServerAdam()),
    "fedyogi": FedAvg(server_optimizer=ServerYogi()),
    "fedadagrad": FedAvg(server_optimizer=ServerAdagrad()),
    "fedprox with momentum": FedProx(mu=0.1, server_optimizer=ServerMomentum()),
    "fedau of samples": FedAU(cutoff=2, weighting="samples"),
    "fedau without cutoff": FedAU(cutoff=math.inf),
    "fedau with adam": FedAU(server_optimizer=ServerAdam()),
    "fedspeed simulator": FedSpeed(server="public-simulator", alpha=0.5),
    "mifa with momentum": MIFA(server_optimizer=ServerMomentum()),
    "fedfix of known times": FedFix(interval_s=0.5, times_s=2.0, server_optimizer=ServerMomentum()),
    "fedfix of samples": FedFix(interval_s=1.0, weighting="samples", max_staleness=3),
    "async fedavg of known times": AsyncFedAvg(times_s=0.4),
    "fedbuff of participation": FedBuff(buffer_size=3, correction="participation", cutoff=20),
    "scaffold with momentum": Scaffold(server_optimizer=ServerMomentum()),
    "dp-fedavg adaptive": DPFedAvg(noise_multiplier=1.0, quantile=0.5, noise_seed=0, server_optimizer=ServerAdam()),
}
MADE = {name: made(**ARGUMENTS.get(name, {})) for name, made in REGISTERED.items()} | OPTIONS
# Krum and its kin want larger rounds than these: test_robust_averages.py. DIFF2 and DP-GD take no steps, and want
# everybody in every round: test_private_descent.py
ALGORITHMS = {name: algorithm for name, algorithm in MADE.items() if algorithm.fewest_replies == 1}
SYNCHRONOUS = [name for name, algorithm in ALGORITHMS.items() if not algorithm.accepts(0, 1)]

# Noise depends on the last bits of what it is added to, and models with BatchNorm are refused: jobs of these are in
# privacy/test_private_jobs.py
NOISELESS = {name: algorithm for name, algorithm in MADE.items() if not isinstance(algorithm, PrivateAlgorithm)}

NUM_CLIENTS, NUM_TRAINED, NUM_BEHIND = 6, 37, 4
ROUNDS = [[0, 1, 2, 4], [3, 5], [], [1, 2, 5], [0, 4]]

every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=list(ALGORITHMS))


def reply_of(algorithm, client, version, *, num_trained=NUM_TRAINED, num_behind=NUM_BEHIND, **changes):
    random = torch.Generator().manual_seed(1000 * version + client)
    names = {**dict.fromkeys((DELTA, *algorithm.sends), num_trained), REST: num_behind}
    fields = {
        "client": client,
        "version": version,
        "num_samples": 10 + client,
        "num_steps": 2 + client % 3,
        "tensors": {name: torch.randn(length, generator=random) for name, length in names.items()},
    }
    return Reply(**{**fields, **changes})


def changed(reply, **changes):
    return dataclasses.replace(reply, **changes)


def with_tensor(reply, name, tensor):
    return changed(reply, tensors={**reply.tensors, name: tensor})


def begun(algorithm, *, rounds=ROUNDS):
    """A server and its state with a history."""
    server = Server(algorithm, NUM_TRAINED)
    state = server.begin(torch.randn(NUM_TRAINED + NUM_BEHIND, generator=torch.Generator().manual_seed(1)), NUM_CLIENTS)
    for clients in rounds:
        state, _ = server.step(state, [reply_of(algorithm, client, state.version) for client in clients])
    return server, state


def bits(value):
    """All of a state, comparable to the bit; which replies were refused is left out."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes())
    if isinstance(value, dict):
        return {key: bits(part) for key, part in value.items() if key != "refused"}
    return value


def after(algorithm, replies, **history):
    """The state's bits after one more round, what was refused, and who took part."""
    server, state = begun(algorithm, **history)
    took_part = []
    tick = type(algorithm).tick

    def spy(self, memory, participated):
        took_part.append(participated.tolist())
        tick(self, memory, participated)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(algorithm), "tick", spy)
        state, _ = server.step(state, replies(state) if callable(replies) else replies)
    assert len(took_part) == 1  # every round ticks, once
    return bits(state.state_dict()), state.refused, [i for i, took in enumerate(took_part[0]) if took]


def good(algorithm, clients=(0, 2, 5)):
    return lambda state: [reply_of(algorithm, client, state.version) for client in clients]


def beside(algorithm, break_reply, clients=(0, 2, 5), broken=1):
    """Good replies, and a broken one between them."""

    def replies(state):
        listed = good(algorithm, clients)(state)
        return [*listed[:1], break_reply(reply_of(algorithm, broken, state.version)), *listed[1:]]

    return replies


# -- rounds ------------------------------------------------------------------------------------------------------------


@every_algorithm
@pytest.mark.parametrize("rounds", [[], ROUNDS], ids=["at first", "later"])
def test_empty_round_leaves_the_model_and_ticks(algorithm, rounds):
    _, state = begun(algorithm, rounds=rounds)
    before = bits(state.model)
    ended, refused, took_part = after(algorithm, [], rounds=rounds)
    assert ended["model"] == before
    assert ended["version"] == len(rounds) + 1
    assert (refused, took_part) == (Counter(), [])


@every_algorithm
def test_round_of_somebody_moves_the_model(algorithm):
    _, state = begun(algorithm)
    ended, refused, took_part = after(algorithm, good(algorithm))
    assert ended["model"] != bits(state.model)
    assert (refused, took_part) == (Counter(), [0, 2, 5])


@every_algorithm
def test_order_of_arrival_changes_no_bit(algorithm):
    expected = after(algorithm, good(algorithm, (0, 1, 2, 4, 5)))
    for order in ((5, 4, 2, 1, 0), (2, 0, 5, 1, 4), (4, 5, 0, 2, 1)):
        assert after(algorithm, good(algorithm, order)) == expected


@every_algorithm
def test_what_was_handed_out_does_not_change_afterwards(algorithm):
    server, state = begun(algorithm)
    model, broadcast, saved = state.model, server.broadcast(state), state.state_dict()
    before = bits(model), bits(dict(broadcast.extras)), bits(saved)
    replies = good(algorithm)(state)
    sent = [bits(dict(reply.tensors)) for reply in replies]
    server.step(state, replies)
    assert (bits(model), bits(dict(broadcast.extras)), bits(saved)) == before
    assert [bits(dict(reply.tensors)) for reply in replies] == sent


@every_algorithm
def test_strided_tensors_count_as_contiguous_ones_do(algorithm):
    def strided(state):
        return [
            changed(r, tensors={k: torch.stack([t, t], 1)[:, 0] for k, t in r.tensors.items()})
            for r in good(algorithm)(state)
        ]

    assert after(algorithm, strided) == after(algorithm, good(algorithm))


@every_algorithm
def test_elements_behind_the_trained_ones_become_the_mean_weighted_by_samples(algorithm):
    server, state = begun(algorithm)
    replies = good(algorithm)(state)
    state.memory.version = state.version
    trust = algorithm.trust_in_rest(algorithm.weights(state.memory, replies))
    ended, _ = server.step(state, replies)
    total = sum(reply.num_samples for reply in replies)
    mean = sum(reply.num_samples / total * reply.tensors[REST].double() for reply in replies)
    before = state.model[NUM_TRAINED:].double()
    torch.testing.assert_close(ended.model[NUM_TRAINED:].double(), before + trust * (mean - before))
    private = isinstance(algorithm, PrivateAlgorithm)  # a mean without noise would tell
    assert trust == (0 if private else 1) or algorithm.accepts(0, 1)


# -- replies that do not count -----------------------------------------------------------------------------------------


@every_algorithm
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_reply_that_is_not_finite_is_refused_and_is_no_participation(algorithm, value):
    expected, _, took_part = after(algorithm, good(algorithm))
    for name in (DELTA, REST, *algorithm.sends):

        def spoil(reply, name=name):
            tensor = reply.tensors[name].clone()
            tensor[-1] = value
            return with_tensor(reply, name, tensor)

        assert after(algorithm, beside(algorithm, spoil)) == (expected, Counter({"not finite": 1}), took_part)
        alone = after(algorithm, lambda state, spoil=spoil: [spoil(reply_of(algorithm, 1, state.version))])
        assert alone == (after(algorithm, [])[0], Counter({"not finite": 1}), [])


BREAKS = {
    "too short": ("shape", lambda r: with_tensor(r, DELTA, r.delta[:-1])),
    "too long": ("shape", lambda r: with_tensor(r, DELTA, torch.cat([r.delta, r.delta[:1]]))),
    "not flat": ("shape", lambda r: with_tensor(r, DELTA, r.delta.reshape(1, -1))),
    "empty": ("shape", lambda r: with_tensor(r, DELTA, r.delta[:0])),
    "no rest": ("shape", lambda r: changed(r, tensors={k: t for k, t in r.tensors.items() if k != REST})),
    "another tensor": ("shape", lambda r: with_tensor(r, "surprise", r.delta)),
    "no tensor": ("shape", lambda r: changed(r, tensors={})),
    "float64": ("dtype", lambda r: with_tensor(r, DELTA, r.delta.double())),
    "integers": ("dtype", lambda r: with_tensor(r, DELTA, r.delta.long())),
    "client below 0": ("unknown client", lambda r: changed(r, client=-1)),
    "client beyond the last": ("unknown client", lambda r: changed(r, client=NUM_CLIENTS)),
    "samples below 0": ("numbers", lambda r: changed(r, num_samples=-1)),
    "samples without steps": ("numbers", lambda r: changed(r, num_steps=0)),
    "of the next version": ("another version", lambda r: changed(r, version=r.version + 1)),
}


@every_algorithm
@pytest.mark.parametrize("name", BREAKS)
def test_reply_that_does_not_fit_is_refused_by_its_reason(algorithm, name):
    reason, break_reply = BREAKS[name]
    expected, _, took_part = after(algorithm, good(algorithm))
    assert after(algorithm, beside(algorithm, break_reply)) == (expected, Counter({reason: 1}), took_part)


@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_late_reply_is_refused(name):
    algorithm = ALGORITHMS[name]
    expected, _, took_part = after(algorithm, good(algorithm))
    late = beside(algorithm, lambda reply: changed(reply, version=reply.version - 1))
    assert after(algorithm, late) == (expected, Counter({"late": 1}), took_part)


@every_algorithm
def test_reply_that_comes_twice_counts_once(algorithm):
    expected, _, took_part = after(algorithm, good(algorithm))
    twice = beside(algorithm, lambda reply: reply, broken=2)
    assert after(algorithm, twice) == (expected, Counter({"duplicate": 1}), took_part)


@every_algorithm
def test_reply_of_no_samples_has_no_weight(algorithm):
    _, state = begun(algorithm)
    nothing = beside(algorithm, lambda reply: changed(reply, num_samples=0, num_steps=0))
    expected, _, _ = after(algorithm, good(algorithm))
    ended, refused, took_part = after(algorithm, nothing)
    assert ended["model"] == expected["model"]
    assert (refused, took_part) == (Counter(), [0, 1, 2, 5])
    alone, _, _ = after(algorithm, lambda state: [reply_of(algorithm, 1, state.version, num_samples=0)])
    assert alone["model"] == bits(state.model)


# -- clients that join, checkpoints ------------------------------------------------------------------------------------


@every_algorithm
def test_clients_that_join_count_from_then_on(algorithm):
    server, state = begun(algorithm)
    newcomer = reply_of(algorithm, NUM_CLIENTS + 1, state.version)
    state, _ = server.step(state, [newcomer])
    assert state.refused == {"unknown client": 1}
    server.add_clients(state, 2)
    assert state.memory.num_clients == NUM_CLIENTS + 2
    before = state.model
    state, _ = server.step(state, [changed(newcomer, version=state.version)])
    assert state.refused == {"unknown client": 1}
    assert not torch.equal(state.model, before)


@every_algorithm
def test_clients_that_join_before_the_first_round_were_always_there(algorithm):
    model = torch.randn(NUM_TRAINED + NUM_BEHIND, generator=torch.Generator().manual_seed(1))
    server = Server(algorithm, NUM_TRAINED)
    joined, there = server.begin(model, NUM_CLIENTS - 2), server.begin(model, NUM_CLIENTS)
    server.add_clients(joined, 2)
    for clients in ROUNDS:
        replies = [reply_of(algorithm, client, joined.version) for client in clients]
        joined, there = server.step(joined, replies)[0], server.step(there, replies)[0]
    assert bits(joined.state_dict()) == bits(there.state_dict())


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_algorithm
def test_resumed_server_goes_on_to_the_bit(algorithm):
    server, state = begun(algorithm)
    state, _ = server.step(state, beside(algorithm, lambda r: changed(r, num_samples=-1))(state))
    resumed = Server(algorithm, NUM_TRAINED).load(saved_and_loaded(state), NUM_CLIENTS)
    assert resumed.refused == {"numbers": 1}
    for clients in ROUNDS:
        replies = [reply_of(algorithm, client, state.version) for client in clients]
        (state, sent), (resumed, sent_again) = server.step(state, replies), server.step(resumed, replies)
        assert bits(dict(sent.extras)) == bits(dict(sent_again.extras))
        assert bits(state.state_dict()) == bits(resumed.state_dict())


@every_algorithm
def test_clients_may_join_while_the_server_is_down_but_not_leave(algorithm):
    server, state = begun(algorithm)
    saved = saved_and_loaded(state)
    with pytest.raises(StateMismatchError, match=rf"at least the {NUM_CLIENTS} clients.*got {NUM_CLIENTS - 1};"):
        server.load(saved, NUM_CLIENTS - 1)
    resumed = server.load(saved, NUM_CLIENTS + 3)
    server.add_clients(state, 3)
    assert bits(resumed.state_dict()) == bits(state.state_dict())


@every_algorithm
def test_checkpoint_of_another_model_is_refused(algorithm):
    server, state = begun(algorithm)
    with pytest.raises(StateMismatchError, match="trained elements, got"):
        Server(algorithm, NUM_TRAINED + NUM_BEHIND + 1).load(saved_and_loaded(state), NUM_CLIENTS)
    for name in state.memory.vectors:
        saved = saved_and_loaded(state)
        saved["memory"]["vectors"][name] = torch.zeros(NUM_TRAINED - 1)
        with pytest.raises(StateMismatchError, match=name):
            server.load(saved, NUM_CLIENTS)


def test_checkpoint_of_another_algorithm_is_refused():
    for algorithm in ALGORITHMS.values():
        saved = saved_and_loaded(begun(algorithm)[1])
        for other in ALGORITHMS.values():
            remembers = [{*part} for part in (saved["memory"][k] for k in ("vectors", "tables", "counters"))]
            memory = begun(other, rounds=[])[1].memory
            if remembers != [{*memory.vectors}, {*memory.tables}, {*memory.counters}]:
                with pytest.raises(StateMismatchError, match="another algorithm"):
                    Server(other, NUM_TRAINED).load(saved, NUM_CLIENTS)


# -- clients -----------------------------------------------------------------------------------------------------------


@every_algorithm
def test_functions_of_many_clients_are_those_of_each(algorithm):
    random = torch.Generator().manual_seed(3)

    def rows(count=3):
        return torch.randn(count, NUM_TRAINED, generator=random, dtype=torch.float64)

    scale, offset, moved = rows(), rows(), rows()
    offset[1], scale[1] = 0.0, 0.0  # the second client's gradient is zero
    kept = {name: rows() for name in algorithm.kept}
    server, state = begun(algorithm)
    extras = {name: tensor.double() for name, tensor in server.broadcast(state).extras.items()}
    steps = torch.tensor([[2.0], [5.0], [1.0]], dtype=torch.float64)

    def gradient_of(rows):
        def gradient(displacement):
            here = moved[rows] if displacement is None else moved[rows] + displacement
            return scale[rows] * here + offset[rows]

        return gradient

    together = algorithm.direction(gradient_of(slice(None)), moved, kept, extras)
    made = {"lr": 0.1, "extras": extras}
    local = LocalRound(moved=moved, num_steps=steps, kept=kept, squared_gradients=lambda: scale**2, **made)
    keeps, sends = algorithm.finish(local)
    assert set(keeps) == set(algorithm.kept)
    assert set(sends) == {DELTA, *algorithm.sends}
    assert together.shape == moved.shape
    for i in range(3):
        own = {name: tensor[i] for name, tensor in kept.items()}
        alone = algorithm.direction(gradient_of(i), moved[i], own, extras)
        torch.testing.assert_close(alone, together[i], rtol=1e-12, atol=1e-12)
        single = LocalRound(
            moved=moved[i],
            num_steps=int(steps[i]),
            kept=own,
            squared_gradients=lambda of_one=scale[i]: of_one**2,
            **made,
        )
        for found, expected in zip(algorithm.finish(single), (keeps, sends), strict=True):
            for name, tensor in found.items():
                torch.testing.assert_close(tensor, expected[name][i], rtol=1e-12, atol=1e-12)


class Tied(nn.Module):
    """BatchNorm with its float and integer buffers, a frozen parameter, and one weight under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.last = nn.Linear(3, 3)
        self.last.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):
        return self.last(self.norm(self.first(x)) * self.scale)


def squares(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def trained_together(algorithm, exclude=()):
    """A model after three rounds of three clients, and the server's state."""
    torch.manual_seed(0)
    model = Tied()
    layout = Layout(model, exclude)
    server = Server(algorithm, layout.num_trained)
    client = Client(algorithm=algorithm, loss=squares, optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
    state = server.begin(layout.read(model), NUM_CLIENTS)
    broadcast, kept = server.broadcast(state), {}
    for _ in range(3):
        replies = []
        for number in range(3):
            batches = [(torch.randn(4, 3), torch.randn(4, 3)) for _ in range(2)]
            kept[number], reply = client.step(
                model,
                layout,
                kept.get(number, {}),
                broadcast,
                batches,
                client=number,
                num_samples=8,
                samples=lambda batches=batches: batches,
            )
            replies.append(reply)
        state, broadcast = server.step(state, replies)
    assert not state.refused
    layout.write(model, state.model)
    return model, layout, state


@every_algorithm
def test_integer_buffers_are_never_averaged_and_tied_parameters_are_once(algorithm):
    model, layout, state = trained_together(algorithm)
    assert model.norm.num_batches_tracked.dtype == torch.int64
    assert int(model.norm.num_batches_tracked) >= 3 * 3 * 2  # this one object counted all local steps, and kept it
    assert not any("num_batches_tracked" in name for name in layout.names)
    assert sum("weight" in name for name in layout.names) == 2  # first's and norm's; last's is first's
    assert len(state.model) == layout.num_elements == 9 + 3 + 3 + 3 + 3 + 3 + 3
    assert model.last.weight is model.first.weight
    assert torch.equal(layout.read(model), state.model)
    assert torch.equal(model.scale, torch.ones(3))  # frozen
    assert (model.norm.running_var > 0).all()


@every_algorithm
def test_excluded_batch_norm_stays_with_its_holder(algorithm):
    model, layout, state = trained_together(algorithm, exclude=["batch-norm"])
    assert not any(name.startswith("norm") for name in layout.names)
    assert len(state.model) == 9 + 3 + 3
    running_mean = model.norm.running_mean.clone()
    layout.write(model, torch.zeros_like(state.model))
    assert torch.equal(model.norm.running_mean, running_mean)
    assert running_mean.abs().sum() > 0
    assert torch.equal(model.norm.weight, torch.ones(3))


# -- configurations ----------------------------------------------------------------------------------------------------


@every_algorithm
def test_configuration_survives_json(algorithm):
    written = json.loads(json.dumps(algorithm.to_dict()))
    assert written["algorithm"] == algorithm.name
    assert FederatedAlgorithm.from_dict(written) == algorithm


def test_every_algorithm_is_registered_by_its_name():
    for name, made in REGISTERED.items():
        assert FederatedAlgorithm.from_dict({"algorithm": name, **ARGUMENTS.get(name, {})}) == MADE[name]
        assert type(MADE[name]) is made


def test_bad_keys_and_names_are_errors():
    for name in REGISTERED:
        with pytest.raises(ConfigError, match="unknown key 'surprise'"):
            FederatedAlgorithm.from_dict({"algorithm": name, "surprise": 1, **ARGUMENTS.get(name, {})})
    with pytest.raises(ConfigError, match="one of adagrad, adam, momentum, plain, yogi, got 'sgd'"):
        FederatedAlgorithm.from_dict({"algorithm": "fedavg", "server_optimizer": {"optimizer": "sgd"}})
    with pytest.raises(ConfigError, match="probability"):
        FederatedAlgorithm.from_dict({"algorithm": "known-participation"})
    with pytest.raises(ConfigError, match=r"alpha must be a number in \(0, 1e6\], got 0; "):
        FederatedAlgorithm.from_dict({"algorithm": "feddyn", "alpha": 0})


@pytest.mark.parametrize("made", [AsyncFedAvg, FedFix])
def test_known_times_are_one_for_each_client(made):
    listed = made(times_s=(0.5, 0.25), **ARGUMENTS.get(made.name, {}))
    server = Server(listed, NUM_TRAINED)
    with pytest.raises(ConfigError, match="one per client, 3, got 2; "):
        server.begin(torch.zeros(NUM_TRAINED), 3)
    state = server.begin(torch.zeros(NUM_TRAINED), 2)
    with pytest.raises(ConfigError, match="one number or left out where clients join, got 2; "):
        server.add_clients(state, 1)
    assert state.memory.num_clients == 2


def test_known_probabilities_are_one_for_each_client():
    listed = FederatedAlgorithm.from_dict({"algorithm": "known-participation", "probability": [0.5, 0.25]})
    server = Server(listed, NUM_TRAINED)
    with pytest.raises(ConfigError, match="one per client, 3, got 2; "):
        server.begin(torch.zeros(NUM_TRAINED), 3)
    state = server.begin(torch.zeros(NUM_TRAINED), 2)
    with pytest.raises(ConfigError, match="must be one number where clients join, got 2; "):
        server.add_clients(state, 1)
    assert state.memory.num_clients == 2

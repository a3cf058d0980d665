"""Rounds over Flower's messages without its processes: pacing on a clock, faults, mismatches, checkpoints."""

import copy
import math

import pytest
import torch
from torch import nn

pytest.importorskip("flwr", reason="Flower has an environment of its own: make test-flower")

from fake_grid import FakeGrid, JumpingClock
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from distopt.errors import CompatibilityError, ConfigError, PeerLostError, StateMismatchError
from distopt.federated import (
    DIFF2,
    AsyncFedAvg,
    Bernoulli,
    ConstantDelays,
    DPFedAvg,
    Everybody,
    FedAsync,
    FedAU,
    FedAvg,
    FedBuff,
    FedFix,
    FedSpeed,
    Scaffold,
    Simulation,
    UniformSampling,
    UplinkCompression,
)
from distopt.federated.pacing import Synchronous
from distopt.federated.privacy.noise import NoiseSource
from distopt.integrations.flower import FederatedStrategy, add_client, client_app
from flower_test_app.work import LOCAL, evaluator, make_clients, make_model

NUM_CLIENTS = 5


def data_of(context):
    clients = make_clients(NUM_CLIENTS)
    return clients.batch(clients.parts[int(context.node_config["partition-id"])])


def node_app(*, model=lambda context: make_model(), **changes):
    return client_app(model=model, data=data_of, **changes)


def strategy(algorithm, clock, **changes):
    settings = {"model": make_model(), "num_clients": NUM_CLIENTS, "algorithm": algorithm, "local": LOCAL} | changes
    made = FederatedStrategy(**settings)
    made._cohort._clock = clock
    return made


def simulated(algorithm, rounds, **changes):
    settings = {"model": make_model(), "clients": make_clients(NUM_CLIENTS), "algorithm": algorithm, "local": LOCAL}
    simulation = Simulation(**settings | {"mode": "loop"} | changes)
    simulation.run(rounds)
    return simulation


def averaged(model):
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def assert_same_model(one, other):
    for name, tensor in averaged(other).items():
        assert torch.equal(one.state_dict()[name], tensor), name


def started(
    algorithm=None, *, rounds=3, app=None, clients=range(NUM_CLIENTS), timeout=60.0, clock=None, grid=None, **changes
):
    clock = clock or JumpingClock()
    grid = grid or FakeGrid(app or node_app(), clients, clock=clock)
    made = strategy(algorithm or FedAvg(), grid.clock, **changes)
    made.start(grid, num_rounds=rounds, timeout=timeout)
    return made, grid


# -- pacing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "algorithm",
    [
        FedFix(interval_s=1.3),
        FedFix(interval_s=0.7, weighting="samples", max_staleness=3),
        FedBuff(buffer_size=3),
        FedBuff(buffer_size=2, concurrency=3),
        FedBuff(buffer_size=2, correction="participation"),
        FedAsync(),
        AsyncFedAvg(),
    ],
    ids=repr,
)
def test_servers_that_do_not_wait_do_on_a_clock_what_they_do_in_the_simulator(algorithm):
    delays = ConstantDelays(mean_s=1.0, slowest=4.7)
    simulation = simulated(algorithm, 12, delays=delays)
    drawn, clock = delays.begin(NUM_CLIENTS, 0), JumpingClock()
    grid = FakeGrid(node_app(), range(NUM_CLIENTS), clock=clock, seconds=drawn.next)
    made = strategy(algorithm, clock, poll_s=1e-3)
    made.start(grid, num_rounds=12)
    assert [row["participants"] for row in made.history] == [row["participants"] for row in simulation.history]
    for row, expected in zip(made.history, simulation.history, strict=True):
        assert math.isclose(row["time_s"], expected["time_s"], abs_tol=0.05)
    assert_same_model(made.model, simulation.model)


def test_two_answers_at_once_are_two_aggregations():
    """Of a server that aggregates at every arrival, whatever the time between two looks."""
    made, _ = started(AsyncFedAvg(), rounds=6, poll_s=30.0)
    assert [len(row["participants"]) for row in made.history] == [1] * 6


# -- traps of Flower's own strategies ----------------------------------------------------------------------------------


def test_everybody_takes_part_in_round_1_however_late_they_come():
    clock = JumpingClock()
    grid = FakeGrid(node_app(), range(2), clock=clock)
    sleep = clock.sleep

    def sleep_and_join(seconds):
        sleep(seconds)
        if len(grid.contexts) < NUM_CLIENTS:
            grid.join(len(grid.contexts))

    clock.sleep = sleep_and_join
    made, _ = started(grid=grid)
    assert made.history.rows[0]["participants"] == list(range(NUM_CLIENTS))


def test_the_seed_draws_who_takes_part_not_flower():
    expected = simulated(FedAvg(), 6, participation=UniformSampling(count=2), seed=4)
    for _ in range(2):
        made, _ = started(rounds=6, participation=UniformSampling(count=2), seed=4)
        assert made.history.column("participants") == expected.history.column("participants")
    other, _ = started(rounds=6, participation=UniformSampling(count=2), seed=5)
    assert other.history.column("participants") != expected.history.column("participants")


def test_integer_buffers_stay_integers_and_are_each_clients_own():
    made, grid = started(rounds=3)
    counter = made.model.state_dict()["1.num_batches_tracked"]
    assert counter.dtype == torch.int64
    assert counter == 0  # the server has trained nothing
    for context in grid.contexts.values():
        kept = context.state.array_records["distopt.kept"]["1.num_batches_tracked"].numpy()
        assert kept.dtype == "int64"
        assert kept == 9  # three steps in each of three rounds


# -- faults ------------------------------------------------------------------------------------------------------------


def breaking(fault, client, version):
    """An app of which one client misbehaves once."""

    def mod(message, context, call_next):
        reply = call_next(message, context)
        told = message.content.config_records["distopt"].get("version")
        if context.node_config["partition-id"] == client and told == version:
            fault(reply)
        return reply

    return node_app(mods=[mod])


def replaced(name, tensor):
    def change(reply):
        tensors = dict(reply.content.array_records["tensors"])
        reply.content["tensors"] = ArrayRecord({**tensors, name: Array(tensor)})

    return change


def garbled(reply):
    delta = reply.content.array_records["tensors"]["delta"]
    delta.data = b"\x93NUMPY" + b"\0garbage" * 20


def renumbered(name, value):
    def change(reply):
        reply.content.metric_records["numbers"][name] = value

    return change


def raising(reply):
    raise OSError("no data today")


def emptied(reply):
    del reply.content["tensors"]


NUM_TRAINED = 16 * 12 + 12 + 2 * 12 + 12 * 4 + 4
FAULTS = {
    "not finite": (replaced("delta", torch.full((NUM_TRAINED,), math.nan)), "not finite"),
    "shape": (replaced("delta", torch.zeros(3)), "shape"),
    "dimensions": (replaced("delta", torch.zeros(1, NUM_TRAINED)), "shape"),
    "dtype": (replaced("delta", torch.zeros(NUM_TRAINED, dtype=torch.float64)), "dtype"),
    "more": (replaced("surprise", torch.zeros(NUM_TRAINED)), "shape"),
    "garbage": (garbled, "unreadable"),
    "nothing": (emptied, "unreadable"),
    "fractions": (renumbered("num-examples", 2.5), "unreadable"),
    "negative": (renumbered("num-examples", -4), "numbers"),
    "old": (renumbered("version", 0), "late"),
    "future": (renumbered("version", 9), "another version"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reply_that_does_not_fit_is_refused_counted_and_no_participation(fault):
    change, reason = FAULTS[fault]
    algorithm = FedAU(cutoff=2)
    made, _ = started(algorithm, rounds=4, app=breaking(change, client=2, version=1))
    assert made.refused == {reason: 1}
    assert [row["refused"] for row in made.history] == [0, 1, 0, 0]
    weights = made._rounds.state.memory.counters["participation"].weights
    assert weights[2] > 1.0  # it has missed a round
    assert weights[[0, 1, 3, 4]].tolist() == [1.0] * 4
    assert all(tensor.isfinite().all() for tensor in averaged(made.model).values())


def test_a_client_that_raises_counts_as_not_participating(caplog):
    made, _ = started(rounds=3, app=breaking(raising, client=0, version=1))
    assert [row["participants"] for row in made.history] == [[0, 1, 2, 3, 4], [1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert made.refused == {}
    assert made.lost == {"OSError: no data today": 1}
    assert "client 0 counts as not participating: OSError: no data today" in caplog.text


def test_a_client_that_does_not_answer_in_time_is_not_waited_for():
    grid = FakeGrid(node_app(), range(NUM_CLIENTS), seconds=lambda client: 100.0 if client == 3 else 1.0)
    made, _ = started(FedAU(cutoff=50), rounds=3, grid=grid, timeout=10.0)
    assert [row["participants"] for row in made.history] == [[0, 1, 2, 4]] * 3
    assert made.lost == {"no answer in time": 3}
    assert grid.clock.now < 40.0


def test_a_node_that_goes_and_one_that_comes_back():
    grid = FakeGrid(node_app(), range(NUM_CLIENTS))
    first = next(node for node, context in grid.contexts.items() if context.node_config["partition-id"] == 1)

    def progress(row):
        if row["round"] == 1:
            grid.gone.add(first)
        if row["round"] == 3:
            grid.join(1)

    made, _ = started(Scaffold(), rounds=6, grid=grid, progress=progress)
    took_part = [1 in row["participants"] for row in made.history]
    assert took_part[:3] == [True, False, False]
    assert took_part[-1]


def test_all_nodes_gone_is_an_error_that_says_so():
    grid = FakeGrid(node_app(), range(NUM_CLIENTS))
    with pytest.raises(PeerLostError, match="got none for 7 s: all nodes are gone"):
        started(rounds=6, grid=grid, connect_s=7.0, progress=lambda row: grid.gone.update(grid.contexts))


# -- who is who --------------------------------------------------------------------------------------------------------


def test_fewer_nodes_than_clients_names_the_missing():
    with pytest.raises(PeerLostError, match="each of the 5 clients, got 3 in 5 s: nobody is client 1, 4;") as raised:
        started(clients=[0, 2, 3], connect_s=5.0)
    assert raised.value.ranks == (1, 4)


def test_two_nodes_of_one_number_are_named():
    with pytest.raises(PeerLostError, match="nobody is client 4, and several nodes say that they are client 1"):
        started(clients=[0, 1, 1, 2, 3], connect_s=5.0)


@pytest.mark.parametrize(
    ("number", "message"), [(9, "numbers from 0 to 4, got 9"), (None, "must have a 'partition-id'")]
)
def test_a_node_with_another_number_or_none_is_refused(number, message):
    with pytest.raises(CompatibilityError, match=message):
        started(clients=[0, 1, 2, 3, number])


def test_an_app_that_is_not_for_this_says_so_at_once():
    with pytest.raises(
        CompatibilityError, match=r"No query function registered with name 'distopt'.*; make its app with"
    ):
        started(app=ClientApp())


def test_another_model_names_the_first_parameter_that_differs():
    with pytest.raises(
        CompatibilityError,
        match=r"client \d: .* of the model must be the same .*, got 0.weight \[12, 16\] .* and 0.weight \[13, 16\]",
    ):
        started(app=node_app(model=lambda context: make_model(hidden=13)))


def test_a_model_with_more_layers_names_the_first_that_the_other_has_not():
    def deeper(context):
        return make_model().append(nn.Linear(4, 4))

    with pytest.raises(CompatibilityError, match=r"got 1.running_mean \[12\] .* and 4.weight \[4, 4\]"):
        started(app=node_app(model=deeper))


def test_other_frozen_values_are_found():
    """They do not travel: a node that has loaded others would train something else, without a word."""

    def made(value):
        model = make_model()
        model[0].requires_grad_(False)
        with torch.no_grad():
            model[0].weight.fill_(value)
        return model

    started(app=node_app(model=lambda context: made(0.5)), model=made(0.5), rounds=1)
    with pytest.raises(CompatibilityError, match="frozen tensors must be the same on the server and on this client"):
        started(app=node_app(model=lambda context: made(0.5)), model=made(0.25), rounds=1)


def test_initial_arrays_are_the_first_model():
    torch.manual_seed(9)
    other = make_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    made = strategy(FedAvg(), clock := JumpingClock())
    made.start(FakeGrid(node_app(), range(NUM_CLIENTS), clock=clock), ArrayRecord(other.state_dict()), num_rounds=2)
    assert_same_model(made.model, simulated(FedAvg(), 2, model=other).model)


def test_initial_arrays_of_another_model_name_the_first_parameter_that_differs():
    made = strategy(FedAvg(), clock := JumpingClock())
    with pytest.raises(
        ConfigError, match=r"initial_arrays, got 0.weight \[12, 16\] torch.float32 and 0.weight \[13, 16\]"
    ):
        made.start(FakeGrid(node_app(), range(NUM_CLIENTS), clock=clock), ArrayRecord(make_model(13).state_dict()))


def test_a_client_that_takes_part_in_one_algorithm_only():
    app = node_app(algorithm=FedSpeed())
    started(FedSpeed(), app=app, rounds=1)
    with pytest.raises(CompatibilityError, match=r"takes part in .*fedspeed.* only, got .*'fedavg'"):
        started(app=app, rounds=1)


def test_a_loss_that_fails_is_found_before_the_first_round():
    def loss(model, batch):
        raise KeyError("labels")

    with pytest.raises(CompatibilityError, match=r"loss\(model, batch\) must be computable, got KeyError"):
        started(app=node_app(loss=loss))


# -- what is kept ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uplink", [None, UplinkCompression(density=0.2)], ids=["whole", "compressed"])
def test_a_run_that_goes_on_from_its_checkpoint_is_the_uninterrupted_one(tmp_path, uplink):
    class Killed(Exception):
        pass

    def killed(row):
        if row["round"] == 4:
            raise Killed

    settings = {"participation": Bernoulli(probability=0.7), "uplink": uplink, "seed": 2}
    whole = simulated(Scaffold(), 7, **settings)
    settings |= {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 3}
    app = node_app(folder=tmp_path / "clients")
    with pytest.raises(Killed):
        started(Scaffold(), rounds=7, app=app, progress=killed, **settings)
    grid = FakeGrid(app, range(NUM_CLIENTS))
    made = strategy(Scaffold(), grid.clock, **settings)
    assert made.resume()
    assert made.round == 3
    made.start(grid, num_rounds=7)
    assert made.history == whole.history
    assert_same_model(made.model, whole.model)
    for folder in (tmp_path / "clients").glob("*/*"):
        assert len(list(folder.iterdir())) <= 4  # of the rounds since the checkpoint, and one before


def test_going_on_without_what_clients_kept_is_refused(tmp_path):
    settings = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 1}
    started(Scaffold(), rounds=2, **settings)
    grid = FakeGrid(node_app(), range(NUM_CLIENTS))
    made = strategy(Scaffold(), grid.clock, **settings)
    assert made.resume()
    with pytest.raises(StateMismatchError, match="must still have what it kept before the server's checkpoint"):
        made.start(grid, num_rounds=3)


def test_going_on_needs_nothing_of_clients_that_keep_nothing(tmp_path):
    settings = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 1, "participation": Bernoulli(probability=0.5)}
    started(FedAU(), rounds=2, **settings)
    grid = FakeGrid(node_app(), range(NUM_CLIENTS))
    made = strategy(FedAU(), grid.clock, **settings)
    assert made.resume()
    made.start(grid, num_rounds=5)
    assert_same_model(made.model, simulated(FedAU(), 5, participation=Bernoulli(probability=0.5)).model)


def test_starting_again_goes_on():
    grid = FakeGrid(node_app(), range(NUM_CLIENTS))
    made = strategy(Scaffold(), grid.clock)
    made.start(grid, num_rounds=2)
    made.start(grid, num_rounds=5)
    assert_same_model(made.model, simulated(Scaffold(), 5).model)
    with pytest.raises(ConfigError, match="rounds must be an integer of at least 5"):
        made.start(grid, num_rounds=4)


def test_two_strategies_one_after_the_other_do_not_share_what_clients_keep():
    grid = FakeGrid(node_app(), range(NUM_CLIENTS))
    started(Scaffold(), grid=grid, rounds=3)
    made, _ = started(Scaffold(), grid=grid, rounds=3)
    assert_same_model(made.model, simulated(Scaffold(), 3).model)


# -- beside others -----------------------------------------------------------------------------------------------------


def test_an_app_of_ones_own_answers_too():
    app = ClientApp()

    @app.train()
    def train(message, context):
        return Message(RecordDict({"own": ConfigRecord({"answer": 42})}), reply_to=message)

    add_client(app, model=lambda context: make_model(), data=data_of)
    started(app=app, rounds=1)
    asked = Message(RecordDict(), dst_node_id=5, message_type="train")
    answer = app(asked, Context(1, 5, {}, RecordDict(), {}))
    assert answer.content.config_records["own"]["answer"] == 42


def test_flowers_own_loop_runs_a_synchronous_algorithm():
    """As a strategy around this one would: `configure_train`, Flower's exchange, `aggregate_train`."""
    from flwr.serverapp.strategy import Strategy

    grid = FakeGrid(node_app(), range(NUM_CLIENTS))
    made = strategy(FedAU(), grid.clock, participation=Bernoulli(probability=0.6))
    result = Strategy.start(made, grid, ArrayRecord(make_model().state_dict()), num_rounds=4, timeout=1.0)
    expected = simulated(FedAU(), 4, participation=Bernoulli(probability=0.6))
    assert made.history == expected.history
    for name, tensor in averaged(expected.model).items():
        assert torch.equal(result.arrays.to_torch_state_dict()[name], tensor)


def test_flowers_own_loop_refuses_what_does_not_wait():
    made = strategy(FedBuff(buffer_size=2), clock := JumpingClock())
    with pytest.raises(CompatibilityError, match="needs a synchronous algorithm, got 'fedbuff'"):
        made.configure_train(1, ArrayRecord(), ConfigRecord(), FakeGrid(node_app(), range(5), clock=clock))


def test_result_and_evaluation():
    accuracy = evaluator(NUM_CLIENTS)

    def evaluate(server_round, arrays):
        model = make_model().eval()
        model.load_state_dict(arrays.to_torch_state_dict())
        return MetricRecord(accuracy(model))

    grid = FakeGrid(node_app(), range(NUM_CLIENTS))
    made = strategy(FedAvg(), grid.clock)
    result = made.start(grid, num_rounds=3, evaluate_fn=evaluate)
    expected = simulated(FedAvg(), 3, evaluate=accuracy)
    assert made.history == expected.history
    assert list(result.evaluate_metrics_serverapp) == [0, 1, 2, 3]
    assert result.evaluate_metrics_serverapp[3]["accuracy"] == expected.history.last("accuracy")
    assert result.train_metrics_clientapp[1]["participants"] == NUM_CLIENTS
    make_model().load_state_dict(result.arrays.to_torch_state_dict())


def test_train_config_travels_to_the_mods():
    seen = []

    def mod(message, context, call_next):
        if "config" in message.content.config_records:
            seen.append(message.content.config_records["config"]["norm"])
        return call_next(message, context)

    grid = FakeGrid(node_app(mods=[mod]), range(NUM_CLIENTS))
    strategy(FedAvg(), grid.clock).start(grid, num_rounds=1, train_config=ConfigRecord({"norm": 2.0}))
    assert seen == [2.0] * NUM_CLIENTS


# -- bad settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_clients": 0}, "num_clients must be an integer of at least 1, got 0"),
        ({"connect_s": 0.0}, "connect_s must be a number of seconds above 0, got 0.0"),
        ({"poll_s": -1}, "poll_s must be a number of seconds above 0, got -1"),
        ({"algorithm": "fedavg"}, "algorithm must be of FederatedAlgorithm, got 'fedavg'"),
        ({"model": 3}, "model must be of Module, got 3"),
        ({"checkpoint_every": 2}, "needs a file"),
        ({"exclude": ("nothing.like.it",)}, "exclude must name what the model has"),
        ({"participation": UniformSampling(count=9)}, "9"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ],
    ids=str,
)
def test_bad_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        strategy(**{"algorithm": FedAvg(), "clock": JumpingClock()} | changes)


def test_a_dtype_that_flower_cannot_carry():
    with pytest.raises(CompatibilityError, match=r"must have a dtype that numpy has, got torch\.bfloat16"):
        strategy(FedAvg(), JumpingClock(), model=make_model().bfloat16())


def test_an_unknown_pacing_names_the_engine_that_can():
    class Tidal(Synchronous):
        pass

    class FedTide(FedAvg):
        pacing = Tidal()

    with pytest.raises(CompatibilityError, match=r"got .*Tidal.*; distopt.federated.Simulation runs it, Flower cannot"):
        strategy(FedTide(), JumpingClock())


def test_bad_arguments_of_start():
    made = strategy(FedAvg(), clock := JumpingClock(), participation=Everybody())
    grid = FakeGrid(node_app(), range(NUM_CLIENTS), clock=clock)
    with pytest.raises(ConfigError, match="timeout must be a number of seconds above 0, got 0"):
        made.start(grid, timeout=0)
    with pytest.raises(ConfigError, match="evaluate_config must be left out"):
        made.start(grid, evaluate_config=ConfigRecord({"a": 1}))


@pytest.mark.parametrize("given", [None, (), (1, 2), "digits"], ids=str)
def test_data_that_are_no_tensors(given):
    app = client_app(model=lambda context: make_model(), data=lambda context: given)
    with pytest.raises(CompatibilityError, match="a client's data must be a tuple of tensors"):
        started(app=app)


# -- private algorithms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["diff2", "distributed", "dp-fedavg"])
def test_private_rounds_are_the_simulators_where_noise_is_its_deviation(monkeypatch, name):
    monkeypatch.setattr(NoiseSource, "add", lambda self, values, std, *purpose: values + std)
    fewest = min(map(len, make_clients(NUM_CLIENTS).parts))
    settings = {"num_clients": NUM_CLIENTS, "fewest_samples": fewest, "rounds": 9, "interval": 2}
    algorithm = {
        "diff2": lambda: DIFF2(**settings),
        "distributed": lambda: DIFF2(noise="distributed", **settings),
        "dp-fedavg": lambda: DPFedAvg(noise_multiplier=2.0, quantile=0.5),
    }[name]()
    changes = {"local": LOCAL if name == "dp-fedavg" else None, "model": nn.Linear(16, 4)}
    expected = simulated(algorithm, 5, **changes | {"model": copy.deepcopy(changes["model"])})
    app = node_app(model=lambda context: nn.Linear(16, 4))
    made, _ = started(algorithm, rounds=5, app=app, **changes)
    assert_same_model(made.model, expected.model)
    assert [row["epsilon"] for row in made.history] == [row["epsilon"] for row in expected.history]
    limit = made.history.rows[2]["epsilon"]
    earlier, _ = started(algorithm, rounds=5, app=app, stop_at_epsilon=limit, **changes)
    assert len(earlier.history) == 3


def test_private_jobs_that_will_not_do_are_refused():
    with pytest.raises(ConfigError, match="noise_seed must be left out where clients are real"):
        strategy(DPFedAvg(noise_multiplier=1.0, noise_seed=0), None, model=nn.Linear(16, 4))

"""All clients at once are the clients one after the other, for every algorithm; and what cannot be so is refused."""

import numpy as np
import pytest
import torch
from test_algorithm_laws import NOISELESS
from torch import nn
from torch.nn import functional as F

from distopt.errors import ConfigError
from distopt.federated import (
    Bernoulli,
    ClientData,
    ConstantDelays,
    FedAvg,
    FedDyn,
    FedSpeed,
    FisherAveraging,
    LocalTraining,
    Scaffold,
    Simulation,
    UplinkCompression,
)
from distopt.federated.execution import fitness, recorded, vmapped
from distopt.federated.execution.stacked_loss import StackedLoss
from distopt.federated.execution.stacked_optimizer import ELEMENTWISE
from distopt.federated.functional import cross_entropy
from distopt.federated.layout import Layout

SIZES = [30, 25, 0, 12, 30, 17, 24, 5, 30, 23]
PARTS = [np.arange(30 * i, 30 * i + size) for i, size in enumerate(SIZES)]
_random = torch.Generator().manual_seed(0)
INPUTS = torch.randn(30 * len(SIZES), 8, generator=_random, dtype=torch.float64)
LABELS = (INPUTS[:, 0] > 0).long() + (INPUTS[:, 1] > 0).long()
IMAGES = torch.randn(30 * len(SIZES), 1, 8, 8, generator=_random, dtype=torch.float64)


def normed():
    # no bias before the norm: its gradient is zero but for rounding, which Adam would make steps of
    return nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3)).double()


def simulation(mode, *, model=normed, inputs=INPUTS, rounds=0, **changed):
    torch.manual_seed(0)
    settings = {
        "model": model(),
        "clients": ClientData((inputs, LABELS), PARTS),
        "algorithm": FedAvg(),
        "local": LocalTraining(epochs=2, batch_size=10, lr=0.1),
        "mode": mode,
        "seed": 3,
    }
    job = Simulation(**{**settings, **changed})
    job.run(rounds)
    return job


def state(job):
    """All floating-point and integer values of a job."""
    kept = [table.get(client) for table in job._trainer.kept.values() for client in range(len(SIZES))]
    memory = job._rounds.server.begin(job._rounds.state.model, len(SIZES)).memory.vectors  # their names
    return [*job.model.state_dict().values(), *kept, *(job._rounds.state.memory.vectors[name] for name in memory)]


def both(rounds=3, **changed):
    loop, together = (simulation(mode, rounds=rounds, **changed) for mode in ("loop", "vmapped"))
    assert together.mode == "vmapped"
    return loop, together


def assert_equal(loop, together, tolerance=1e-10):
    assert together.history == loop.history
    for found, expected in zip(state(together), state(loop), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


MOMENTUM = {
    "options": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "weight_decay": 0.02,
    "max_norm": 0.7,
    "lr_decay": 0.9,
}


@pytest.mark.parametrize("algorithm", NOISELESS.values(), ids=NOISELESS)
def test_every_algorithm_is_the_same_as_in_the_loop(algorithm):
    delays = ConstantDelays(mean_s=tuple(0.3 + 0.1 * (i // 4) for i in range(len(SIZES))))
    settings = {"delays": delays} if algorithm.accepts(0, 1) else {}
    local = LocalTraining(batch_size=10, epochs=2, **MOMENTUM)
    assert_equal(*both(algorithm=algorithm, local=local, **settings))


@pytest.mark.parametrize("algorithm", [FedAvg(), FedSpeed(), FisherAveraging()], ids=lambda each: each.name)
def test_steps_are_the_same_as_in_the_loop(algorithm):
    assert_equal(*both(algorithm=algorithm, local=LocalTraining(batch_size=10, steps=4)))


OPTIONS = {"SGD": {"momentum": 0.9, "dampening": 0.1, "maximize": True}, "Adam": {"amsgrad": True, "foreach": True}}


@pytest.mark.parametrize("kind", ELEMENTWISE, ids=lambda kind: kind.__name__)
def test_every_elementwise_optimizer_is_each_client_s_own(kind):
    lr = 1e-3  # far from where a sign that rounding flips would show
    options = OPTIONS.get(kind.__name__, {})
    local = LocalTraining(epochs=2, batch_size=10, lr=lr, optimizer=kind.__name__, options=options)
    assert_equal(*both(algorithm=Scaffold(), local=local), tolerance=1e-7)


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 8, 3, groups=2, stride=(1, 2))
        self.groups = nn.GroupNorm(2, 8)
        self.last = nn.Linear(8, 3)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x):
        self.seen = 0.5 * self.seen + x.mean()
        x = F.avg_pool2d(F.relu(self.norm(self.first(x))), 2)
        x = self.groups(self.second(x))
        return self.last(F.adaptive_avg_pool2d(F.max_pool2d(x, (2, 1), stride=1), 1).flatten(1))


def test_layers_of_images_and_buffers_of_the_model_s_own():
    loop, together = both(model=lambda: Images().double(), inputs=IMAGES, algorithm=FedSpeed())
    assert_equal(loop, together)
    assert loop.model.seen.abs().min() > 0


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.frozen(self.second(F.relu(self.first(x)))))


def test_tied_unused_frozen_and_excluded_tensors():
    loop, together = both(model=lambda: Shared().double(), exclude=("last.weight",), algorithm=FedDyn())
    assert_equal(loop, together)


def test_small_groups_of_clients_are_the_same(monkeypatch):
    loop, together = both(algorithm=Scaffold())
    monkeypatch.setattr(vmapped, "GROUP_BYTES", 0)
    monkeypatch.setattr(vmapped, "FEWEST_TOGETHER", 3)
    assert_equal(loop, simulation("vmapped", rounds=3, algorithm=Scaffold()))
    assert_equal(loop, together)


def test_any_loss_and_any_batch():
    def loss(model, batch):
        inputs, target, weight = batch
        return (weight * (model(inputs).squeeze(-1) - target) ** 2).sum() / weight.sum() + 0.01 * sum(
            p.square().sum() for p in model.parameters()
        )

    data = ClientData((INPUTS[:, :4], INPUTS[:, 5], INPUTS[:, 6].abs()), PARTS)
    assert_equal(*both(model=lambda: nn.Linear(4, 1).double(), clients=data, loss=loss))


def test_uplink_compression_is_each_client_s_own():
    uplink = UplinkCompression(density=0.2, values="fp32")
    assert_equal(*both(algorithm=Scaffold(), uplink=uplink), tolerance=1e-6)


def test_a_client_that_diverges_keeps_what_it_had():
    inputs = INPUTS.clone()
    inputs[PARTS[4][3]] = np.inf
    loop, together = both(inputs=inputs, algorithm=Scaffold())
    assert [row["refused"] for row in together.history] == [1, 1, 1]
    assert together._trainer.kept["control"].get(4).abs().max() == 0
    assert together._trainer.kept["control"].get(5).abs().max() > 0
    assert_equal(loop, together)


# -- to the bit --------------------------------------------------------------------------------------------------------

SOME = {"algorithm": Scaffold(), "participation": Bernoulli(probability=0.6)}


def test_the_same_seed_is_the_same_to_the_bit():
    first, second = (simulation("vmapped", rounds=5, **SOME) for _ in range(2))
    assert all(map(torch.equal, state(first), state(second)))


def test_resumed_it_is_bit_for_bit_the_run_that_was_not_stopped(tmp_path):
    path = tmp_path / "run.pt"
    simulation("vmapped", rounds=3, checkpoint=path, checkpoint_every=3, **SOME)
    resumed, whole = simulation("vmapped", checkpoint=path, **SOME), simulation("vmapped", rounds=7, **SOME)
    assert resumed.resume()
    assert resumed.run(7) == whole.history
    assert all(map(torch.equal, state(resumed), state(whole)))


# -- recorded operations -----------------------------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(recorded, "_USES", 0)


@pytest.mark.parametrize("images", [False, True])
def test_recorded_operations_are_the_same_to_the_bit(monkeypatch, images):
    settings = {"model": lambda: Images().double(), "inputs": IMAGES} if images else {}
    plain = simulation("vmapped", rounds=2, **settings)
    monkeypatch.setattr(recorded, "_USES", 0)
    again = simulation("vmapped", rounds=2, **settings)
    assert again._trainer._loss._recorded._records
    assert all(map(torch.equal, state(again), state(plain)))


class Tempered:
    """A loss whose owner changes it now and then."""

    temperature = 1.0

    def __call__(self, model, batch):
        return F.cross_entropy(model(batch[0]) / self.temperature, batch[1])


def test_a_loss_that_changes_between_rounds_is_noticed(at_once):
    def run(mode):
        loss = Tempered()

        def progress(row):
            loss.temperature += 0.1

        return simulation(mode, rounds=3, loss=loss, progress=progress)

    assert_equal(run("loop"), run("vmapped"))


def test_what_cannot_be_recorded_is_computed_all_the_same(at_once, monkeypatch):
    def fail(function):
        raise RuntimeError("cannot trace")

    expected = simulation("vmapped", rounds=2)
    monkeypatch.setattr("torch.fx.experimental.proxy_tensor.make_fx", fail)
    found = simulation("vmapped", rounds=2)
    assert not found._trainer._loss._recorded._records
    assert all(map(torch.equal, state(found), state(expected)))


# -- what is refused ---------------------------------------------------------------------------------------------------


class Branching(nn.Linear):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class Counting(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def with_norm(**options):
    return lambda: nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4, **options), nn.Linear(4, 3)).double()


REFUSED = {
    "dropout": ({"model": lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3)).double()}, "draws random numbers"),
    "control flow": ({"model": lambda: Branching(8, 3).double()}, "vmap cannot compute the loss .RuntimeError: "),
    "own counter": ({"model": lambda: Counting(8, 3).double()}, "the model changes 'calls'"),
    "mean of all batches": ({"model": with_norm(momentum=None)}, "'1' has momentum=None"),
    "excluded norm": ({"model": with_norm(), "exclude": ("batch-norm",)}, "the model changes '1.running_mean'"),
    "Adafactor": ({"local": LocalTraining(steps=1, optimizer="Adafactor")}, "the optimizer 'Adafactor' is not known"),
    "no data": ({"clients": ClientData((INPUTS, LABELS), [PARTS[2]] * 3)}, "no client has samples"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_by_name_and_is_a_loop_by_itself(name):
    settings, said = REFUSED[name]
    with pytest.raises(ConfigError, match=f"got 'vmapped': .*{said}.*; use 'loop' or 'auto'"):
        simulation("vmapped", **settings)
    job = simulation("auto", **settings)
    assert job.mode == "loop"
    assert said.split(" .")[0] in job.why_mode
    assert int(getattr(job.model, "calls", 0)) == 0  # trying it out has left no trace


def test_auto_takes_all_clients_at_once_where_that_is_possible():
    job = simulation("auto")
    assert (job.mode, job.why_mode) == ("vmapped", "all clients can be computed at once")


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = x[:, None, None].expand(-1, 2, 4, -1)
        return self.last(F.scaled_dot_product_attention(x, x, x).mean((1, 2)))


SLOWER = {
    "large": (lambda: nn.Linear(8, 3).double(), "the trained parameters take 216 bytes, and above 100 "),
    "loops": (lambda: Attending().double(), "vmap computes _scaled_dot_product_flash_attention_for_cpu in a loop"),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", SLOWER)
def test_auto_takes_a_loop_where_that_is_faster(name, monkeypatch):
    model, said = SLOWER[name]
    if name == "large":
        monkeypatch.setattr(fitness, "MOST_BYTES", 100)
    job = simulation("auto", model=model)
    assert job.mode == "loop"
    assert said in job.why_mode
    assert_equal(*both(rounds=1, model=model))


def test_a_gradient_that_vmap_gets_wrong_is_noticed(monkeypatch):
    honest = StackedLoss.gradient
    monkeypatch.setattr(StackedLoss, "gradient", lambda *args: honest(*args) + 1e-6)
    with pytest.raises(ConfigError, match="another gradient or buffer"):
        simulation("vmapped")


def test_trying_it_out_leaves_no_trace():
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    trainer = simulation("loop", model=lambda: model)._trainer
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.random.get_rng_state()
    assert "random numbers" in fitness.judge(trainer).impossible
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_gradient_of_many_is_the_gradient_of_each():
    torch.manual_seed(0)
    model = nn.Linear(8, 3).double()
    layout = Layout(model)
    loss = StackedLoss(model, layout, cross_entropy)
    points = torch.randn(4, layout.num_trained, dtype=torch.float64)
    batch = INPUTS[:20].view(4, 5, 8), LABELS[:20].view(4, 5)
    found = loss.gradient(points, points[:, :0], batch)
    for i in range(4):
        torch.testing.assert_close(
            found[i], loss.gradient_of_one(points[i], points[i, :0], (batch[0][i], batch[1][i])), rtol=0, atol=1e-14
        )
    assert loss.num_batches == 8


class Listed(nn.Module):
    """Uses its parameters by references of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
        self.listed = [self.weight]

    def forward(self, x):
        return x @ self.listed[0].T


def test_references_to_parameters_are_noticed():
    model = normed()
    kept = list(model.parameters())

    def penalised(model, batch):
        return cross_entropy(model, batch) + sum(p.square().sum() for p in kept)

    for settings in ({"model": lambda: model, "loss": penalised}, {"model": Listed}):
        job = simulation("auto", **settings)
        assert (job.mode, "hold references" in job.why_mode) == ("loop", True)
        start = job.layout.read(job.model)
        job.run(1)
        assert not torch.equal(job.layout.read(job.model), start)


def test_padding_of_embeddings_is_left_to_the_loop():
    words = torch.randint(9, (len(LABELS), 6), generator=torch.Generator().manual_seed(3))

    def model():
        return nn.Sequential(nn.Embedding(9, 4, padding_idx=1), nn.Flatten(), nn.Linear(24, 3)).double()

    assert "padding_idx" in simulation("auto", model=model, inputs=words).why_mode


@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_a_loss_of_many_numbers_is_refused(mode):
    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    with pytest.raises(ConfigError, match=r"must be a tensor of one number, got a tensor of shape \(10,\)"):
        simulation(mode, loss=loss)

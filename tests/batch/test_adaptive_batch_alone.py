"""A batch that grows on one rank, what is refused at attach, and the learning rate around a step."""

import io
import itertools
import math

import pytest
import torch
from growing import SAMPLES, Training, digits
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import distopt
from distopt.batch import AdaGradNorm, AdaScale, GrowingBatchSampler, Linear, SquareRoot
from distopt.batch.estimator import Averages
from distopt.batch.scaled_rates import ScaledRates
from distopt.batch.sums import Sums
from distopt.errors import CompatibilityError, ConfigError, StateMismatchError


class Kept:
    """Gradients at the optimizer's step."""

    def __init__(self, training):
        self.training, self.rows = training, []

    def __call__(self):
        self.rows.append(torch.cat([p.grad.detach().double().flatten() for p in self.training.module.parameters()]))


@pytest.mark.parametrize("test", ["norm", "augmented", "coordinate"])
def test_one_rank_takes_two_consecutive_gradients(test):
    training = Training(None, test=test, every=3, ema=2, max_batch=4)
    kept = Kept(training)
    training.run(12, each=kept)
    averages = Averages(2)
    for second in (2, 5, 8, 11):
        pair = torch.stack(kept.rows[second - 1 : second + 1])
        mean = pair.mean(0)
        ratio = distopt.batch.estimator.coordinate_ratio(mean, pair.square().sum(0), num_gradients=2, samples=4)
        sums = Sums(
            num_gradients=2, samples=4, squares=float(pair.square().sum()), square_of_mean=float(mean @ mean),
            projections=float((pair @ mean).square().sum()), coordinate_ratio=ratio,
        )  # fmt: skip
        averages.add(sums.quantities(test))
    training.batch._take_in()
    assert training.batch._averages.values == pytest.approx(averages.values, rel=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(0.01), capturable=False),
        lambda parameters: torch.optim.Adagrad(parameters, lr=0.05),
        lambda parameters: AdaGradNorm(parameters, lr=0.5),
    ],
)
def test_the_rate_is_changed_for_the_step_alone(make):
    """By the rule of the step's batch, with any optimizer; schedulers and users see their own."""
    training = Training(None, optimizer=make, every=2, ema=1, eta=0.05, growth=2.0, learning_rate=Linear(cap=4.0))
    group = training.optimizer.param_groups[0]
    seen = []
    training.optimizer.register_step_pre_hook(lambda *_: seen.append(float(group["lr"])))
    before = float(group["lr"])
    plans = []
    training.run(12, each=lambda: plans.append(training.batch._plan.batch_size))
    assert float(group["lr"]) == before
    assert seen == pytest.approx([before * min(4.0, size / 4) for size in plans])
    assert plans[-1] > 16
    training.close()


def test_a_rate_that_groups_share_is_multiplied_once():
    """torch gives all groups the same tensor where the rate is one."""
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    groups = [{"params": [parameters[0]]}, {"params": [parameters[1]]}, {"params": [parameters[2]], "lr": 0.5}]
    optimizer = torch.optim.Adam(groups, lr=torch.tensor(0.25))
    rates = ScaledRates(optimizer)
    for _ in range(2):
        rates.scale(4.0)
        assert [float(group["lr"]) for group in optimizer.param_groups] == [1.0, 1.0, 2.0]
        rates.restore()
        assert [float(group["lr"]) for group in optimizer.param_groups] == [0.25, 0.25, 0.5]


def test_a_rule_that_needs_the_noise_gets_it():
    training = Training(None, every=2, ema=1, eta=0.05, learning_rate=AdaScale())
    training.run(1)
    assert training.batch.stats()["learning_rate_factor"] == 1.0  # no test yet
    training.run(20)
    stats = training.batch.stats()
    var, sqr = stats["trace"] / 4, max(0.0, stats["square"])
    size = training.batch._plan.batch_size
    assert stats["learning_rate_factor"] == pytest.approx((var + sqr) / (var / (size / 4) + sqr))


def test_gradients_that_are_zero_or_agree_do_not_spoil_the_averages():
    training = Training(None, test="coordinate", every=2, ema=1, max_batch=4)
    training.run(2, each=lambda: [p.grad.zero_() for p in training.module.parameters()])
    training.run(5)
    stats = training.batch.stats()
    assert (stats["dropped"], stats["tests"]) == (1, 2)
    assert math.isfinite(training.batch._averages.values["coordinate_ratio"])


def test_raw_grows_by_no_more_than_a_test_can_say():
    """With |gbar|^2 as it is, T is at most b / eta^2 where two gradients are told apart from none."""
    unlimited = {"every": 2, "ema": 1, "eta": 0.5, "growth": 1e6}
    training = Training(None, raw=True, **unlimited)
    training.run(2)
    training.batch._take_in()
    assert training.batch.batch_size <= 2 * 4 / 0.25
    assert training.batch.batch_size > 4


def test_resumed_between_the_two_gradients_of_a_test():
    def make():
        return Training(None, every=4, ema=1, eta=0.3, probe=200, learning_rate=SquareRoot())

    whole = make()
    whole.run(7)  # the first of two
    states = {name: torch.load(as_file(state), weights_only=True) for name, state in whole.states().items()}
    whole.run(20)
    again = make()
    again.load(states)
    again.run(20)
    assert again.trace == whole.trace[7:]
    assert all(p.equal(q) for p, q in zip(again.module.parameters(), whole.module.parameters(), strict=True))
    with pytest.raises(StateMismatchError, match=r"agree in test, got 'norm' then and 'augmented' now"):
        Training(None, test="augmented").batch.load_state_dict(states["batch"])


def as_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def attach(loader, model=None, beside=None, **batch):
    model = model or nn.Linear(64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return distopt.AdaptiveBatch(**batch).attach(model, optimizer, loader, beside=beside)


def growing_loader(size=4, data=None):
    data = data or digits()
    return DataLoader(data, batch_sampler=GrowingBatchSampler(data, batch_size=size))


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(64), 0)])


def test_what_cannot_grow_is_refused_at_attach():
    with pytest.raises(CompatibilityError, match=r"iterable data set \(Stream\), whose size cannot change; give"):
        attach(DataLoader(Stream(), batch_size=4))
    with pytest.raises(CompatibilityError, match=r"got DataLoader with batch_size=4; use DataLoader\(dataset, batch_s"):
        attach(DataLoader(digits(), batch_size=4))
    with pytest.raises(CompatibilityError, match=r"able to change, got list; use DataLoader"):
        attach([1, 2])
    unordered = growing_loader()
    unordered.in_order = False
    with pytest.raises(CompatibilityError, match=r"got a loader with in_order=False; leave that out"):
        attach(unordered)
    with pytest.raises(ConfigError, match=r"max_batch must be at least the batch at the start, got 7 and 8 \(1 ranks"):
        attach(growing_loader(8), max_batch=7)
    normalised = nn.Sequential(nn.Linear(64, 10), nn.BatchNorm1d(10))
    with pytest.raises(
        CompatibilityError, match=r"\('1'\) needs micro-batches of at least 2 samples, got 1; use batch"
    ):
        attach(growing_loader(1), normalised)
    batch = attach(growing_loader(2), normalised, max_batch=10**6)
    assert batch.max_batch == SAMPLES  # no more than the data
    neighbours = type("Neighbours", (), {"family": "gossip", "process_group": None})()
    with pytest.raises(CompatibilityError, match=r"got an attachment of 'gossip', which makes none; use beside="):
        attach(growing_loader(), beside=neighbours)
    data = digits()
    with pytest.raises(CompatibilityError, match=r"must be of rank 0 of 1, got 1 of 2; leave num_replicas"):
        attach(DataLoader(data, batch_sampler=GrowingBatchSampler(data, batch_size=4, num_replicas=2, rank=1)))


def test_a_loop_that_leaves_micro_batches_is_told():
    training = Training(None)
    training.sampler.resize(12, 4)
    steps = training.batch.steps()
    next(iter(next(steps)))
    with pytest.raises(CompatibilityError, match="all 3 micro-batches of a step must be used"):
        next(steps)
    with pytest.raises(CompatibilityError, match="needs the batches of the loader that attach was given"):
        next(training.batch.steps([1, 2, 3]))
    training = Training(None)
    for inputs, targets in next(training.batch.steps()):
        nn.functional.cross_entropy(training.model(inputs), targets).backward()
    with pytest.raises(CompatibilityError, match=r"not weighted; use batch.backward\(loss\) in place of"):
        training.optimizer.step()
    training = Training(None)
    training.sampler.resize(12, 4)
    short = next(training.batch.steps(itertools.islice(training.loader, 2)))
    with pytest.raises(CompatibilityError, match="got the end of the batches behind 2"):
        list(short)

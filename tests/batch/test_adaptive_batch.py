"""A batch that grows on real ranks: what a test finds, what a step is made of, who decides, and resuming."""

import copy

import pytest
import torch
import torch.distributed as dist
from growing import SAMPLES, Training, digits, gathered
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import distopt
from distopt.batch import GrowingBatchSampler, SquareRoot
from distopt.batch.estimator import Averages
from distopt.batch.sums import Sums
from distopt.errors import CompatibilityError, ConfigError, DesyncError

RANKS = 2


class Rows:
    """Every rank's own gradient of each step, flat."""

    def __init__(self, training):
        self.order = [id(p) for p in training.module.parameters()]
        self.own, self.rows = {}, []

    def begin(self):
        self.own = {}
        return True

    def local(self, parameters, gradients):
        self.own.update({id(p): g.detach().clone().flatten() for p, g in zip(parameters, gradients, strict=True)})

    def mean(self, parameters, gradients):
        """Made from the rows in its place."""

    def end(self):
        self.rows.append(torch.cat([self.own[key] for key in self.order]))


def expected_of(training, rows, test, every=2, ema=2):
    """The averages that the pure estimator makes of the gathered gradients, each second step."""
    averages = Averages(ema)
    for (sizes, *_), row in list(zip(training.trace, rows, strict=True))[every - 1 :: every]:
        gradients = torch.stack(gathered(row.double()))
        mean = gradients.mean(0)
        sums = Sums(
            num_gradients=len(gradients),
            samples=sum(sizes),
            squares=float(gradients.square().sum()),
            square_of_mean=float(mean @ mean),
            projections=float((gradients @ mean).square().sum()),
            coordinate_ratio=distopt.batch.estimator.coordinate_ratio(
                mean, gradients.square().sum(0), num_gradients=len(gradients), samples=sum(sizes)
            ),
        )
        averages.add(sums.quantities(test))
    return averages


def on_test(algorithm, test):
    """The controller's averages are the estimator's, of the gradients as they were before any exchange."""
    training = Training(algorithm, test=test, eta=50.0, theta=50.0, nu=50.0)  # which never grows
    rows = Rows(training)
    handle = training.beside.observe_gradients(rows)
    training.run(9)  # of which the last test is still under way
    handle.remove()
    training.batch.state_dict()  # waits for it
    training.batch._take_in()
    expected = expected_of(training, rows.rows, test)
    found = training.batch._averages
    assert found.count == expected.count == 4
    for name, value in expected.values.items():
        # in float32 A - J B loses some digits, and where the probe is the whole gradient it loses no more
        assert found.values[name] == pytest.approx(value, rel=2e-4, abs=1e-4 * abs(expected.values["square"])), name
    assert len({str(each) for each in gather(found.values)}) == 1
    training.close()


def gather(fact):
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, fact)
    return found


def on_growth(algorithm, ahead=0):
    """Accumulation first, then the micro-batch; all ranks alike; as many samples as the batch says."""
    training = Training(algorithm, eta=0.4, max_batch=160, max_accumulation=4, growth=3.0, ahead=ahead)
    promised = []
    training.run(40, each=lambda: promised.append(training.batch._plan.samples))
    assert len({str(each) for each in gather(training.batch.stats()["batch_size"])}) == 1
    batches = [batch for _, batch, _ in training.trace]
    assert batches == sorted(batches)
    assert batches[-1] == 160
    everybody = gather([sizes for sizes, *_ in training.trace])
    assert [sum(map(sum, sizes)) for sizes in zip(*everybody, strict=True)] == promised
    if not ahead:  # a step has the batch that was decided before it, but for the last of an epoch
        wanted = [8, *batches[:-1]]
        assert sum(a != b for a, b in zip(promised, wanted, strict=True)) <= 4
    largest = [max(sizes) for sizes, *_ in training.trace]
    counts = [len(sizes) for sizes, *_ in training.trace]
    assert max(counts) == 4
    assert largest[counts.index(max(counts)) - 1] <= 4 < 20 == max(largest)  # a rank's 80 samples in 4 parts
    training.close()


def on_one_big_batch():
    """Gradients of accumulated, uneven micro-batches are those of one batch of all their samples."""
    training = Training(distopt.Dense(), size=15, eta=50.0)
    training.sampler.resize(46 * RANKS, 15)  # 46 of a rank: 12 + 12 + 11 + 11; the last step of an epoch has 20
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(3))
    position = 0

    def compare():
        nonlocal position
        samples = training.batch._plan.samples
        inputs, targets = training.data[order[position : position + samples]]
        position += samples
        alone = copy.deepcopy(training.module)
        alone.zero_grad()
        nn.functional.cross_entropy(alone(inputs), targets).backward()
        for p, q in zip(training.module.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)

    training.run(6, each=compare)
    assert position == SAMPLES
    assert [len(sizes) for sizes, *_ in training.trace] == [4, 4, 4, 4, 4, 1 if SAMPLES % 92 <= 30 else 2]
    training.close()


def on_resume(algorithm, ahead, scaled, cut, total):
    """A run that was cut in the middle of an epoch goes on to the same bits, the decisions included."""

    def make():
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
        return Training(
            algorithm, ahead=ahead, eta=0.3, max_batch=100, max_accumulation=3, growth=1.5, probe=500,
            scaler=scaler, learning_rate=SquareRoot(),
        )  # fmt: skip

    whole = make()
    whole.run(cut)
    states = copy.deepcopy(whole.states())
    whole.run(total - cut)
    after = whole.states()
    whole.close()
    again = make()
    again.load(states)
    again.run(total - cut)
    assert again.trace == whole.trace[cut:]
    assert whole.trace[cut - 1][1] < whole.trace[-1][1]  # it has grown behind the cut
    for found, expected in ((again.states()[name], after[name]) for name in after):
        assert_same(found, expected)
    again.close()


def assert_same(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, torch.Tensor):
        assert found.equal(expected)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def on_skipped_steps():
    """What overflows says nothing of noise: the test is dropped, and none of its step is left over."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    training = Training(distopt.Dense(), eta=0.5, every=1, ema=1, scaler=scaler)
    training.overflows = {0, 3, 4}
    training.run(12)
    stats = training.batch.stats()
    assert stats["steps"] == 9
    assert stats["tests"] == 8  # the latest is still under way
    assert 0 < stats["noise_scale"] < 1e6
    training.close()


def on_state_of_one_rank():
    """One rank alone takes its state, as who saves a checkpoint does, with a test under way or not."""
    traces = []
    for saves in (False, True):
        training = Training(distopt.TopK(density=0.05), test="augmented", eta=0.3, every=1, probe=500)
        for _ in range(4):
            training.run(1)
            if saves and dist.get_rank() == 0:
                training.batch.state_dict()
        training.batch.detach()
        traces.append(training.trace)
        training.close()
    assert traces[0] == traces[1]
    assert traces[0][-1][2] is not None


def on_disagreement(what):
    rank = dist.get_rank()
    options = {"settings": {"eta": 0.2 + 0.1 * rank}, "data": {"size": 4 + rank}, "alone": {}}[what]
    if what == "alone":
        with pytest.raises(CompatibilityError, match=r"got beside=None; use beside=distopt.Dense\(\)"):
            Training(None)
        training = Training(distopt.Dense())
        training.sampler.resize(8 + 2 * rank, 4)
        with pytest.raises(DesyncError, match=r"must have the same batch, got (8|10) here and 9 on average"):
            training.run(3)
        return
    with pytest.raises(DesyncError, match="every rank must attach with the same"):
        Training(distopt.Dense(), **options)


@pytest.mark.parametrize(
    ("algorithm", "test"),
    [
        (distopt.Dense(), "norm"),
        (distopt.Dense(), "augmented"),
        (distopt.Dense(), "coordinate"),
        (distopt.DGC(density=0.05), "norm"),
        (distopt.TopK(density=0.05), "augmented"),
    ],
)
def test_a_test_finds_what_the_estimator_finds_in_all_gradients(ranks, algorithm, test):
    ranks(RANKS)(on_test, algorithm, test)


@pytest.mark.parametrize(("algorithm", "ahead"), [(distopt.Dense(), 0), (distopt.DGC(density=0.05), 2)])
def test_grows_by_accumulation_then_by_the_sampler_on_all_ranks_alike(ranks, algorithm, ahead):
    ranks(RANKS)(on_growth, algorithm, ahead)


def test_the_gradient_is_that_of_one_big_batch(ranks):
    ranks(RANKS)(on_one_big_batch)


@pytest.mark.job
@pytest.mark.parametrize(
    ("algorithm", "ahead", "scaled"),
    [(distopt.Dense(), 2, True), (distopt.DGC(density=0.05), 0, False), (distopt.TopK(density=0.05), 2, False)],
)
def test_resumed_to_the_same_bits(ranks, algorithm, ahead, scaled):
    for cut, total in ((7, 30), (12, 30)):
        ranks(RANKS)(on_resume, algorithm, ahead, scaled, cut, total)


def test_steps_that_a_scaler_skips_say_nothing(ranks):
    ranks(RANKS)(on_skipped_steps)


def test_a_state_can_be_taken_by_one_rank_alone(ranks):
    ranks(RANKS)(on_state_of_one_rank)


@pytest.mark.parametrize("what", ["settings", "data", "alone"])
def test_ranks_that_differ_are_told(ranks, what):
    ranks(RANKS)(on_disagreement, what)


def on_job(folder, stop_at):
    """A job with a table batch: where the loader stands is in its checkpoints, its numbers are in the log."""
    torch.manual_seed(1)
    data = digits()
    model = DistributedDataParallel(nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sampler = GrowingBatchSampler(data, batch_size=4, seed=3)
    loader = DataLoader(data, batch_sampler=sampler)
    job = {
        "algorithm": "dense",
        "batch": {"eta": 0.4, "every": 2, "ema": 2, "max_batch": 22},
        "checkpoint": {"folder": f"{folder}/checkpoints", "every": 5},
        "log": {"folder": f"{folder}/log", "every": 1},
    }
    run = distopt.Job.load(job).attach(model, optimizer, loader=loader)
    steps = run.batch.steps()
    trace = []
    for step in run.steps(20):
        for inputs, targets in next(steps):
            run.batch.backward(nn.functional.cross_entropy(model(inputs), targets))
        optimizer.step()
        optimizer.zero_grad()
        trace.append((run.batch.batch_size, run.batch.noise_scale, float(model.module.weight.detach().sum())))
        if step + 1 == stop_at:
            run.batch.detach()
            run.attachment.detach()  # as one that is killed: nothing else is closed
            return trace
    run.close()
    return trace


@pytest.mark.job
def test_a_job_with_a_table_batch_is_resumed_and_written_down(ranks, tmp_path):
    (whole, _) = ranks(RANKS)(on_job, str(tmp_path / "whole"), None)
    ranks(RANKS)(on_job, str(tmp_path / "cut"), 12)
    (rest, _) = ranks(RANKS)(on_job, str(tmp_path / "cut"), None)
    assert rest == whole[10:]
    lines = distopt.observe.read_folder(tmp_path / "cut" / "log")[0]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert [line["values"]["batch_size"] for line in lines[10:]] == [size for size, *_ in rest]
    assert lines[-1]["values"]["samples"] > 160
    assert lines[-1]["values"]["noise_scale"] == rest[-1][1]


def test_a_log_of_its_own_and_a_report(tmp_path):
    training = Training(None, every=2, ema=1, eta=0.1)
    settings = distopt.job.LogSettings(folder=str(tmp_path), every=2)
    with distopt.observe.record(training.batch, training.optimizer, settings):
        training.run(11)
    lines = distopt.observe.read_folder(tmp_path)[0]
    assert [line["family"] for line in lines] == ["batch"] * len(lines)
    samples = [line["stats"]["samples"] for line in lines]
    assert samples == sorted(set(samples))
    text = (tmp_path / "report.txt").read_text()
    assert f"from 4 to {training.batch.batch_size} samples" in text
    assert f"{samples[-1]} samples, {lines[-1]['stats']['tests']} tests, noise scale" in text


def test_a_table_and_a_loader_belong_together():
    model = nn.Linear(64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    job = distopt.Job.load({"algorithm": "dense", "batch": {}})
    with pytest.raises(ConfigError, match="got a table batch and no loader; give both or neither"):
        job.attach(model, optimizer)
    with pytest.raises(ConfigError, match="got a loader and no table batch"):
        distopt.Job.load({"algorithm": "dense"}).attach(model, optimizer, loader=[])

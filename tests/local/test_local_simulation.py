"""Many workers in one process."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from distopt.errors import CompatibilityError, ConfigError, NonFiniteGradientError
from distopt.gossip import NodeBatches
from distopt.local import DiLoCo, SparseLoCo, simulate

INPUTS, LABELS = (torch.from_numpy(each) for each in load_digits(return_X_y=True))
INPUTS = INPUTS.float() / 16
PLAIN = {"outer_lr": 1.0, "outer_momentum": 0.0, "nesterov": False}
EVERYTHING = SparseLoCo(inner_steps=1, chunk=64, k=64, decay=1.0, values="fp32")


def digits(workers, batch_size=8):
    return NodeBatches((INPUTS, LABELS), np.array_split(np.arange(len(INPUTS)), workers), batch_size)


def make_model():
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def accuracy(model):
    return {"accuracy": float((model(INPUTS).argmax(1) == LABELS).double().mean())}


def run(algorithm, workers=3, **changed):
    settings = {
        "make_model": make_model,
        "batches": digits(workers),
        "steps": 20,
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "evaluate": accuracy,
    }
    return simulate(algorithm, **{**settings, **changed})


def test_the_same_arguments_give_the_same_bits():
    def with_dropout():
        return nn.Sequential(nn.Linear(64, 16), nn.Dropout(0.5), nn.Linear(16, 10))

    settings = {"make_model": with_dropout, "steps": 7}
    first = run(SparseLoCo(inner_steps=3), **settings)
    torch.rand(5)
    before = torch.random.get_rng_state()
    second = run(SparseLoCo(inner_steps=3), **settings)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.theta, second.theta)
    assert torch.equal(first.residuals, second.residuals)
    assert first.rows == second.rows
    assert not torch.equal(first.theta, run(SparseLoCo(inner_steps=3), **settings, seed=1).theta)


@pytest.mark.parametrize("algorithm", [EVERYTHING, DiLoCo(inner_steps=1, **PLAIN)], ids=lambda made: made.name)
def test_one_step_a_round_of_everything_is_data_parallel_sgd(algorithm):
    found = run(algorithm, workers=4, steps=12)
    torch.manual_seed(0)
    model, batches = make_model(), digits(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(12):
        inputs, labels = batches(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs.flatten(0, 1)), labels.flatten()).backward()
        optimizer.step()
    expected = torch.cat([each.detach().view(-1) for each in model.parameters()])
    torch.testing.assert_close(found.theta, expected, rtol=0, atol=2e-6)


def test_diloco_is_its_algorithm_written_out():
    workers, inner, rounds = 3, 4, 5
    found = run(DiLoCo(inner_steps=inner), steps=inner * rounds, optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))
    torch.manual_seed(0)
    shared, batches = make_model(), digits(workers)
    outer = torch.optim.SGD(shared.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    models = [make_model() for _ in range(workers)]
    inners = [torch.optim.AdamW(each.parameters(), lr=0.01) for each in models]
    for round in range(rounds):
        for model in models:
            model.load_state_dict(shared.state_dict())
        for step in range(round * inner, (round + 1) * inner):
            for worker, (model, optimizer) in enumerate(zip(models, inners, strict=True)):
                inputs, labels = (each[worker] for each in batches(step))
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
        for own, *theirs in zip(shared.parameters(), *(each.parameters() for each in models), strict=True):
            own.grad = own.detach() - torch.stack([each.detach() for each in theirs]).mean(0)
        outer.step()
    expected = torch.cat([each.detach().view(-1) for each in shared.parameters()])
    torch.testing.assert_close(found.theta, expected, rtol=0, atol=2e-6)


class Tilted(nn.Module):
    """Its gradient is its batch, whatever its parameters are: what workers learn is known beforehand."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ParameterList([torch.zeros(70), torch.zeros(3), torch.zeros(40)])

    def forward(self, rows):
        return rows @ torch.cat(list(self.parts))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fragments": 3},
        {"fragments": 2, "overlap": 4, "warmup_rounds": 3},
        {"fragments": 3, "overlap": 2, "values": "fp16", "outer_lr": 0.5},
    ],
    ids=repr,
)
def test_no_mass_is_lost(settings):
    """Beta = 1, "world": what all have learned is in the shared model, in a residual or not yet sent."""
    algorithm = SparseLoCo(inner_steps=5, chunk=16, k=2, decay=1.0, **settings)
    steps, workers = 23, 4
    rows = torch.randn(steps, workers, 1, 113, generator=torch.Generator().manual_seed(0))
    found = run(
        algorithm,
        workers=workers,
        make_model=Tilted,
        batches=lambda step: (rows[step],),
        steps=steps,
        loss=lambda model, batch: model(*batch).mean(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        evaluate=None,
    )
    learned = rows.double().sum((0, 1, 2))
    in_shared = -workers * found.theta.double() / algorithm.outer_lr
    unsent = (found.theta - found.models).double().sum(0)
    assert float(found.residuals.abs().max()) > 1
    torch.testing.assert_close(in_shared + found.residuals.double().sum(0) + unsent, learned, rtol=0, atol=1e-3)


def test_overlap_keeps_what_was_learned_meanwhile():
    """One worker, everything sent: theta + what was learned since is where plain SGD is."""
    everything = {"inner_steps": 6, "chunk": 64, "k": 64, "decay": 1.0, "values": "fp32"}
    plain = run(SparseLoCo(**everything), workers=1, steps=30)
    behind = run(SparseLoCo(**everything, overlap=4, fragments=3), workers=1, steps=30)
    torch.testing.assert_close(behind.models, plain.models, rtol=0, atol=1e-5)


def test_who_misses_a_round_comes_back_with_the_shared_model_and_an_empty_residual():
    algorithm = SparseLoCo(inner_steps=5, chunk=64, k=4, overlap=2)
    present = {0: (0, 1, 2), 1: (0, 2), 2: (0, 2), 3: (2, 1, 0)}

    def found(steps):
        return run(algorithm, steps=steps, taking_part=present.__getitem__)

    away, back = found(15), found(16)
    assert torch.equal(found(10).models[1], away.models[1])  # it stands still
    assert torch.equal(found(10).residuals[1], away.residuals[1])
    assert away.residuals[1].any()
    assert not back.residuals[1].any()  # nothing sent yet
    assert back.residuals[0].any()
    assert [row["bytes_sent"] / back.rows[0]["bytes_sent"] for row in back.rows] == pytest.approx(
        [1, 5 / 3, 7 / 3] * 1 + [7 / 3]
    )


def test_a_worker_that_joins_learns_from_the_shared_model_on():
    late = run(DiLoCo(inner_steps=5, **PLAIN), steps=10, taking_part=lambda round: (0, 1) if round < 1 else (0, 1, 2))
    two = run(DiLoCo(inner_steps=5, **PLAIN), steps=5, taking_part=lambda round: (0, 1))
    model = make_model()
    with torch.no_grad():
        for own, part in zip(model.parameters(), two.theta.split([1024, 16, 160, 10]), strict=True):
            own.copy_(part.view(own.shape))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5, 10):
        inputs, labels = (each[2] for each in digits(3)(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    own = torch.cat([each.detach().view(-1) for each in model.parameters()])
    without = run(DiLoCo(inner_steps=5, **PLAIN), steps=10, taking_part=lambda round: (0, 1)).theta
    torch.testing.assert_close(late.theta, (2 * without + own) / 3, rtol=0, atol=2e-6)


def test_64_workers_learn():
    found = run(
        SparseLoCo(inner_steps=10, chunk=256, k=32, overlap=2),
        workers=64, steps=30, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-2),
    )  # fmt: skip
    assert found.models.shape[0] == 64
    assert found.rows[-1]["accuracy"] > 0.5
    assert found.rows[-1]["loss"] < found.rows[0]["loss"]
    assert found.rows[-1]["bytes_sent"] < found.rows[-1]["bytes_dense"] / 25
    assert found.first_step("accuracy", 0.2) in (20, 30)
    assert found.first_step("accuracy", 2.0) is None
    assert accuracy(found.model)["accuracy"] == found.rows[-1]["accuracy"]


class Decides(nn.Linear):
    """What vmap cannot: a decision on the data."""

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def with_momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


def test_workers_at_once_are_what_they_are_one_after_the_other(caplog):
    def found(**settings):
        return run(SparseLoCo(inner_steps=3, overlap=1), steps=7, optimizer=with_momentum, **settings)

    at_once, one_by_one = found(at_once=True), found(at_once=False)
    assert torch.equal(found().models, at_once.models)
    torch.testing.assert_close(at_once.models, one_by_one.models, rtol=0, atol=1e-6)
    with caplog.at_level("INFO", logger="distopt"):
        found(make_model=lambda: Decides(64, 10))
    assert "one after the other" in caplog.text


def test_buffers_are_averaged_or_kept():
    def with_batch_norm():
        return nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))

    means = {}
    for policy in ("average", "keep"):
        seen = []
        found = run(
            SparseLoCo(inner_steps=5, buffers=policy), make_model=with_batch_norm, steps=10,
            loss=lambda model, batch, seen=seen: (
                seen.append(model[1].running_mean.clone()), nn.functional.cross_entropy(model(batch[0]), batch[1])
            )[1],
        )  # fmt: skip
        first = seen[5 * 3 : 5 * 3 + 3]  # of the three workers, as the second round begins
        assert torch.equal(first[0], first[1]) == (policy == "average")
        means[policy] = found.model[1].running_mean
        assert int(found.model[1].num_batches_tracked) == 10
    assert means["average"].any()


def test_an_outer_learning_rate_and_a_scheduler():
    still = run(SparseLoCo(inner_steps=5), outer_lr=lambda round: 1.0 if round < 2 else 0.0, steps=20)
    assert torch.equal(still.theta, run(SparseLoCo(inner_steps=5), steps=10).theta)
    frozen = run(
        SparseLoCo(inner_steps=5, values="fp32", chunk=64, k=64), steps=20,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 10)),
    )  # fmt: skip
    torch.testing.assert_close(
        frozen.theta, run(SparseLoCo(inner_steps=5, values="fp32", chunk=64, k=64), steps=10).theta, rtol=0, atol=1e-6
    )


def test_batches_are_asked_for_once_and_in_order():
    asked = []

    def batches(step):
        asked.append(step)
        return digits(3)(step)

    run(DiLoCo(inner_steps=2), batches=batches, steps=4)
    assert asked == [0, 1, 2, 3]


def test_bad_input():
    with pytest.raises(CompatibilityError, match=r"parameters that are trained, got none"):
        run(DiLoCo(), make_model=nn.ReLU)
    with pytest.raises(ConfigError, match=r"other names than the history's own, got 'loss'; rename it"):
        run(DiLoCo(), evaluate=lambda model: {"loss": 1.0})
    with pytest.raises(ConfigError, match=r"one or more workers from 0 to 2, got \[3\] for round 0; let at least one"):
        run(DiLoCo(), taking_part=lambda round: [3])
    with pytest.raises(ConfigError, match=r"fragments must be at most .* \(4\), got 5"):
        run(DiLoCo(fragments=5))
    with pytest.raises(ConfigError, match=r"steps must be an integer of at least 1, got 0"):
        run(DiLoCo(), steps=0)
    with pytest.raises(CompatibilityError, match=r"at_once=True needs .*, got taking_part; leave at_once out"):
        run(DiLoCo(), taking_part=lambda round: [0], at_once=True)
    with pytest.raises(NonFiniteGradientError, match=r"worker 0: pseudo-gradients must be finite"):
        run(DiLoCo(inner_steps=2), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e38))

"""Law of the live training: whoever is slow, the parameters are those of uncoded full-batch steps."""

import random
import time

import pytest
import torch
from coded_job import (
    INPUTS,
    TARGETS,
    apply,
    build,
    by_samples,
    finish,
    parameters,
    sgd,
    start,
    sum_loss,
    together,
    train,
    uncoded,
)
from torch import nn

import distopt
from distopt.coding import MSGC, SRSGC, Batches, GradientCoding, master
from distopt.comm import InProcess

STEPS = 12


def rotating(rank, step):
    """One worker after the other is slow."""
    if rank.coded.worker is not None and step % rank.coded.num_workers == rank.coded.worker:
        time.sleep(0.02)


def equal(ranks, expected, tolerance=1e-12):
    for rank in ranks:
        for model, values in zip(rank.models, expected, strict=True):
            assert (parameters(model) - values).abs().max() <= tolerance, rank.end.rank


@pytest.mark.parametrize(
    ("size", "config"),
    [
        (5, {"code": "fractional", "stragglers": 1}),
        (7, {"code": "fractional", "stragglers": 2}),
        (6, {"code": "binary", "stragglers": 2}),
        (6, {"code": "cyclic", "stragglers": 2}),
        (5, {"code": "cyclic_mds", "stragglers": 1}),
        (5, {"code": "heterogeneous", "stragglers": 1, "options": {"speeds": (1.0, 2.0, 1.0, 3.0)}}),
        (4, {"stragglers": 0}),
        (3, {"code": "fractional", "stragglers": 1, "stop": "minimal"}),
        (4, {"code": "fractional", "stragglers": 1, "master": "sharded"}),
        (6, {"code": "fractional", "stragglers": 2, "master": "sharded"}),
    ],
)
def test_parameters_equal_those_of_the_full_batch(size, config):
    ranks = train(size, STEPS, before=rotating, **config)
    equal(ranks, uncoded([build()], STEPS))
    assert ranks[0].stats["steps"] == STEPS
    assert ranks[0].steps == list(range(STEPS))


def test_the_loss_is_the_mean_over_the_batch():
    ranks = train(5, STEPS, before=rotating)
    model, optimizer, batches = build(), None, Batches(120, 40)
    optimizer = sgd(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = sum_loss(model, batches.indices(step)) / 40
        loss.backward()
        assert ranks[0].losses[step] == pytest.approx(loss.item(), rel=1e-12)
        optimizer.step()


def test_a_worker_that_is_never_in_time_is_not_waited_for_and_skips():
    under_way = [0]  # the master's step

    def slow(rank, step):
        if rank.end.rank == 0:
            under_way[0] = step
        if rank.end.rank == 2:
            time.sleep(0.1)
            end = time.monotonic() + 2.0  # no step follows the last one
            while under_way[0] <= step and time.monotonic() < end:
                time.sleep(0.01)

    ranks = train(5, 30, before=slow)
    equal(ranks, uncoded([build()], 30))
    assert len(ranks[2].steps) < 15
    worker = ranks[0].stats["workers"][1]
    assert worker["in_time"] == 0
    assert worker["late"] + worker["unanswered"] == 30
    assert worker["late_mean_s"] > 0
    assert "Most often slow: worker 1" in ranks[0].report


def test_several_loops_and_a_resume_go_on_where_the_last_one_stopped():
    ranks = train(5, 4, before=rotating, loops=3)
    equal(ranks, uncoded([build()], 12))
    assert ranks[0].state["step"] == 12
    assert ranks[0].stats["refused_messages"] == 0  # workers still say that a loop is over when the next one begins
    first = train(5, 5)
    assert first[0].state["step"] == 5
    second = train(5, 4, models=first[0].models, state=first[0].state)
    # A new optimizer has no momentum: continue the reference in the same way.
    model = build()
    for steps, first_step in ((5, 0), (4, 5)):
        optimizer, batches = sgd(model), Batches(120, 40)
        for step in range(first_step, first_step + steps):
            optimizer.zero_grad()
            (sum_loss(model, batches.indices(step)) / 40).backward()
            optimizer.step()
    equal(second, [parameters(model)])


SCHEMES = [
    SRSGC(n=5, burst=1, window=2, stragglers=2),
    SRSGC(n=6, burst=2, window=3, stragglers=2),
    MSGC(n=4, burst=1, window=2, stragglers=1),
    MSGC(n=4, burst=1, window=3, stragglers=2),
    MSGC(n=4, burst=2, window=3, stragglers=4),
]


@pytest.mark.parametrize(
    ("scheme", "stop", "interleaved"),
    [(scheme, "decodable", interleaved) for scheme in SCHEMES for interleaved in (True, False)]
    + [(SCHEMES[index], stop, False) for index in (1, 3) for stop in ("minimal", "paper")],
    ids=str,
)
def test_sequential_codes_train_models_in_turns_or_one_with_old_gradients(scheme, stop, interleaved):
    models = [build(seed) for seed in range(scheme.delay + 1 if interleaved else 1)]
    chance = random.Random(5)

    def straggle(rank, step):
        if rank.coded.worker is not None and chance.random() < 0.15:
            time.sleep(0.01)

    steps = 3 * (scheme.delay + 1)
    ranks = train(
        scheme.n + 1, steps, models=models, before=straggle, scheme=scheme, stop=stop, mu=0.5, check_rules=False
    )
    equal(ranks, uncoded(models, steps, delay=scheme.delay))
    assert ranks[0].losses[: scheme.delay] == [None] * scheme.delay
    assert ranks[0].stats["rounds"] == steps + scheme.delay


@pytest.mark.parametrize("delay", [0, 1])
def test_a_loop_that_the_master_leaves_early_may_be_followed_by_another(delay):
    """Jobs that are under way when it does are done again, by the parameters of then."""
    config = {"scheme": MSGC(n=4, burst=1, window=2, stragglers=1)} if delay else {}
    models, states = [build() for _ in range(5)], {}

    def work(end):
        model = models[end.rank]
        optimizer, batches = sgd(model), Batches(120, 40)
        coding = GradientCoding(deadline_s=5.0, **config)
        with coding.attach(model, optimizer, batches=batches, transport=end) as coded:
            for loop in range(2):
                for number, _ in enumerate(coded.steps(6)):
                    coded.backward(lambda part: sum_loss(model, part.samples))
                    optimizer.step()
                    if end.rank == 0 and loop == 0 and number == 2:
                        break
            states[end.rank] = coded.state_dict()

    assert not together(work, InProcess.connect(5))
    assert states[0]["step"] == 9 - delay
    model, batches = build(), Batches(120, 40)
    optimizer = sgd(model)
    for jobs, is_whole in ((range(3), False), (range(3 - delay, 9 - delay), True)):
        waiting = []
        for job in jobs:
            optimizer.zero_grad()
            (sum_loss(model, batches.indices(job)) / 40).backward()
            waiting.append([p.grad.clone() for p in model.parameters()])
            if len(waiting) > delay:
                apply(model, optimizer, waiting.pop(0))
        for gradients in waiting if is_whole else []:
            apply(model, optimizer, gradients)
    assert (parameters(models[0]) - parameters(model)).abs().max() <= 1e-12


@pytest.mark.parametrize("interleaved", [True, False])
def test_several_loops_of_a_sequential_code_go_on_where_the_last_one_stopped(interleaved):
    """Each loop has T more rounds than jobs, so that the numbers of rounds and jobs part more and more."""
    scheme = MSGC(n=4, burst=1, window=3, stragglers=1)
    models = [build(seed) for seed in range(scheme.delay + 1 if interleaved else 1)]
    ranks = train(5, 3, models=models, scheme=scheme, loops=5, check_rules=False, deadline_s=5.0)
    if interleaved:
        equal(ranks, uncoded(models, 15))
    for rank in ranks:
        assert torch.equal(parameters(rank.models[0]), parameters(ranks[0].models[0]))
        assert rank.state == ranks[0].state
    assert (ranks[0].state["step"], ranks[0].state["round"]) == (15, 15 + 5 * scheme.delay)
    assert ranks[0].stats["refused_messages"] == 0


def test_a_scheme_may_come_from_a_configuration():
    configured = {"scheme": "m-sgc", "burst": 1, "window": 2, "stragglers": 1}
    ranks = train(5, 6, scheme=configured)
    equal(ranks, uncoded([build()], 6, delay=1))


class Awkward(nn.Module):
    """A layer that only some samples use, a tied one, a frozen one, two dtypes, dropout."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6).double()
        self.tied = nn.Linear(6, 6, bias=False).double()
        self.tied.weight = self.first.weight
        self.rare = nn.Linear(6, 6).double()
        self.never = nn.Linear(6, 6).double()
        self.single = nn.Linear(6, 1)
        self.frozen = nn.Linear(6, 6).double().requires_grad_(False)

    def forward(self, x, rare):
        x = self.frozen(torch.tanh(self.tied(torch.tanh(self.first(x)))))
        return self.single((x + self.rare(x) if rare else x).float())


def test_unused_tied_frozen_and_mixed_parameters():
    def loss(model, part):
        rare = part.index == 0 and part.step == 3
        return nn.functional.binary_cross_entropy_with_logits(
            model(INPUTS[part.samples], rare), TARGETS[part.samples].float(), reduction="sum"
        )

    torch.manual_seed(1)
    model = Awkward()
    ranks = train(5, 6, models=[model], loss=loss, before=rotating)
    trained = ranks[0].models[0]
    assert trained.never.weight.grad is None
    assert torch.equal(trained.never.weight, model.never.weight)
    assert torch.equal(trained.frozen.weight, model.frozen.weight)
    assert trained.tied.weight is trained.first.weight
    assert not torch.equal(trained.rare.weight, model.rare.weight)
    assert trained.single.weight.dtype == torch.float32
    for rank in ranks[1:]:
        assert torch.equal(parameters(rank.models[0]), parameters(trained))


def with_dropout(slow):
    """A rank of a real job: threads would share torch's generator."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    initial, optimizer = parameters(model), sgd(model)
    with distopt.GradientCoding().attach(model, optimizer, batches=Batches(120, 40)) as coded:
        for step in coded.steps(8):
            if slow and coded.worker == step % coded.num_workers:
                time.sleep(0.03)
            coded.backward(lambda part: sum_loss(model, part.samples))
            optimizer.step()
    return parameters(model), initial, coded.stats()


def test_dropout_is_that_of_the_part_whoever_computes_it(ranks):
    slow, quick = (ranks(5)(with_dropout, slow) for slow in (True, False))
    for trained, initial, _ in (*slow, *quick):
        assert (trained - quick[0][0]).abs().max() <= 1e-12
        assert (trained - initial).abs().max() > 1e-3
    assert slow[0][2]["steps"] == 8


def test_more_parts_than_samples_and_losses_that_count_for_themselves():
    ranks = train(9, 3, batch_size=5)
    equal(ranks, uncoded([build()], 3, batch_size=5))

    def counted(model, part):
        samples = Batches(120, 40).indices(part.step)[part.index :: part.count]
        return sum_loss(model, samples), float(len(samples))

    ranks = train(5, 3, batch_size=None, loss=counted)
    equal(ranks, uncoded([build()], 3))


def test_approximate_steps_are_near_the_exact_ones():
    def slow(rank, step):
        if rank.end.rank in (1, 5):  # all who hold a quarter of the parts
            time.sleep(0.2)

    options = {"copies": 2, "accept": 0.3}
    ranks = train(9, 10, before=slow, code="approximate", options=options, loss=by_samples)
    exact = uncoded([build()], 10)[0]
    assert 0 < ranks[0].stats["decode_error_mean"] <= ranks[0].stats["decode_error_max"] <= 0.3
    assert "The code is approximate" in ranks[0].report
    assert (parameters(ranks[0].models[0]) - exact).norm() < 0.5 * (exact - parameters(build())).norm()


@pytest.mark.parametrize("gone", [False, True])
def test_a_decoding_that_amplifies_waits_for_one_more(gone, monkeypatch):
    """In this code two neighbours missing amplify by more than the limit, so the second one is waited for."""
    monkeypatch.setattr(master, "_PROBE_S", 0.002)  # the master looks again and again, but counts a round once

    def slow(rank, step):
        if rank.end.rank in (1, 2):
            if gone:
                rank.end.die()
                raise ConnectionError
            time.sleep(0.03)

    code = {"code": "cyclic_mds", "stragglers": 2, "amplification_limit": 4.0}
    ranks = finish(start(6, 4, before=slow, deadline_s=10.0, **code))
    assert ranks[0].error is None
    equal(ranks[:1], uncoded([build()], 4))
    largest = ranks[0].stats["amplification_max"]
    assert (largest > 4.0) == gone  # if nobody else can come: better amplified than not at all
    assert 0 < ranks[0].stats["waited_for_amplification"] <= 4  # rounds

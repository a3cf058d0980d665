"""What a model and its loss must keep to is checked, and the error says what to change."""

import threading
import time

import pytest
import torch
from coded_job import INPUTS, TARGETS, build, finish, parameters, sgd, start, sum_loss, together, train, uncoded
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt.coding import SRSGC, Batches, GradientCoding
from distopt.comm import InProcess
from distopt.errors import CompatibilityError, ConfigError, DecodeError, DesyncError, StateMismatchError

STEPS = 4


def failing(**arguments):
    """The errors of the master and of a worker: of one that has failed before the master told all that it is over."""
    master, *workers = [rank.error for rank in finish(start(5, STEPS, **arguments))]
    return master, next((error for error in workers if "the master has ended" not in str(error)), workers[0])


def test_a_mean_in_place_of_a_sum():
    def mean(model, part):
        return nn.functional.binary_cross_entropy_with_logits(model(INPUTS[part.samples]), TARGETS[part.samples])

    master, worker = failing(loss=mean)
    assert isinstance(master, DecodeError)
    assert "reduction='sum'" in str(master)
    assert isinstance(worker, CompatibilityError)
    assert "the loss of a part must be the sum over its samples" in str(worker)


def test_a_loss_that_is_no_number():
    _, worker = failing(loss=lambda model, part: model(INPUTS[part.samples]))
    assert "must be one number" in str(worker)


def test_a_loss_without_batches_that_does_not_count():
    _, worker = failing(loss=lambda model, part: sum_loss(model, torch.arange(8)), batch_size=None)
    assert "return (loss, number)" in str(worker)


def test_a_loss_that_depends_on_more_than_the_part():
    moved = threading.local()

    def moving(model, part):
        moved.on = getattr(moved, "on", 0) + 1
        return (1 + 0.1 * moved.on) * sum_loss(model, part.samples)

    _, worker = failing(loss=moving, batch_size=1)
    assert "must be the same each time" in str(worker)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(training):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)).double()
    model.train(training)
    if not training:
        assert all(rank.error is None for rank in finish(start(5, STEPS, models=[model])))
        return
    _, worker = failing(models=[model])
    assert isinstance(worker, CompatibilityError)
    assert "1 is a BatchNorm1d in training mode" in str(worker)
    assert "model.1.eval()" in str(worker)


def test_buffers_that_the_loss_changes():
    """Running statistics of a layer that is no BatchNorm; rank 0 never computes, and would keep those of the start."""
    torch.manual_seed(0)
    norm = nn.InstanceNorm1d(2, track_running_stats=True)
    model = nn.Sequential(nn.Unflatten(1, (2, 3)), norm, nn.Flatten(), nn.Linear(6, 1)).double()
    _, worker = failing(models=[model])
    assert isinstance(worker, CompatibilityError)
    assert "it changed 1.running_mean, 1.running_var" in str(worker)
    model.eval()
    assert all(rank.error is None for rank in finish(start(5, STEPS, models=[model])))


def test_unchecked_on_demand():
    def mean(model, part):
        return sum_loss(model, part.samples) / 7

    ranks = train(5, STEPS, loss=mean, check_rules=False)
    assert all(rank.error is None for rank in ranks)


def differing(rank, model, part):
    return sum_loss(model, part.samples) * (1.01 if rank == 2 else 1.0)


@pytest.mark.parametrize("code", ["fractional", "binary", "cyclic"])
@pytest.mark.parametrize("replicas", ["error", "warn", "ignore"])
def test_replicas_that_differ_are_found(code, replicas):
    """Rank 2's gradients are 1% too large."""
    stats = {}

    def work(end):
        model = build()
        optimizer = sgd(model)
        coding = GradientCoding(code=code, replicas=replicas, deadline_s=10.0)
        with coding.attach(model, optimizer, batches=Batches(120, 40), transport=end) as coded:
            for _ in coded.steps(20):
                coded.backward(lambda part: differing(end.rank, model, part))
                optimizer.step()
            stats[end.rank] = coded.stats()

    errors = together(work, InProcess.connect(5))
    if replicas == "error":
        assert isinstance(errors[0], DesyncError)
        assert "worker 1 (rank 2)" in str(errors[0])
    else:
        assert not errors
        assert (stats[0]["disagreements"] > 0) == (replicas == "warn")


@pytest.mark.parametrize("master", ["first", "sharded"])
def test_a_gradient_that_is_not_finite_is_that_of_the_batch(master):
    """Uncoded training would get NaN too; nobody's replica is wrong."""

    def overflowing(model, part):
        return sum_loss(model, part.samples) * (float("nan") if part.step == 2 and part.index == 0 else 1.0)

    ranks = train(5 if master == "first" else 4, STEPS, loss=overflowing, master=master)
    assert [loss == loss for loss in ranks[0].losses] == [True, True, False, False]
    assert parameters(ranks[0].models[0]).isnan().all()


def test_decoders_that_differ_are_found():
    def wrong(rank, step):
        if rank.end.rank == 2 and step == 2:
            with torch.no_grad():
                next(iter(rank.models[0].parameters())).mul_(1.001)

    ranks = finish(start(4, 12, before=wrong, master="sharded"))
    errors = [str(rank.error) for rank in ranks if isinstance(rank.error, DesyncError)]
    assert errors
    assert all("2" in text.partition("ranks ")[2].partition(" sent")[0] for text in errors)


# -- what attach refuses ---------------------------------------------------------------------------------------------


def attach(model, optimizer, **arguments):
    """The errors of both ranks of a job of three."""

    def work(end):
        GradientCoding(deadline_s=5.0, **arguments).attach(model, optimizer, transport=end)

    return together(work, InProcess.connect(3))


def test_a_frozen_model():
    model = build().requires_grad_(False)
    errors = attach(model, sgd(build()))
    assert len(errors) == 3
    assert "got none" in str(errors[0])


def test_the_optimizer_of_another_model():
    assert "the optimizer must hold parameters of its model" in str(attach(build(), sgd(build()))[1])


def test_a_number_of_models_that_the_scheme_does_not_train():
    models = [build() for _ in range(3)]
    errors = attach(models, [sgd(model) for model in models])
    assert "got 3" in str(errors[0])


def test_16_bit_parameters_with_a_code_that_amplifies():
    model = build(dtype=torch.bfloat16)
    assert "at least 32 bits, got torch.bfloat16" in str(attach(model, sgd(model), code="cyclic")[0])
    scheme = SRSGC(n=2, burst=1, window=2, stragglers=1, code="cyclic")
    assert "at least 32 bits, got torch.bfloat16" in str(attach(model, sgd(model), scheme=scheme)[0])


def test_a_ddp_model(ranks):
    assert all("pass model.module" in text for text in ranks(2)(_attach_ddp))


def _attach_ddp():
    model = DistributedDataParallel(build())
    with pytest.raises(CompatibilityError) as error:
        GradientCoding(code="fractional", stragglers=0).attach(model, sgd(model))
    return str(error.value)


def test_no_job():
    with pytest.raises(ConfigError, match="belongs to no job"):
        GradientCoding().attach(build(), sgd(build()))
    with pytest.raises(ConfigError, match="'auto', 'gloo', 'mpi'"):
        GradientCoding().attach(build(), sgd(build()), transport="carrier pigeon")


def test_a_job_of_one():
    with pytest.raises(CompatibilityError, match="start at least 3 ranks"):
        GradientCoding().attach(build(), sgd(build()), transport=InProcess.connect(1)[0])


def test_parameters_that_messages_do_not_carry():
    model = nn.ParameterList([torch.ones(3, dtype=torch.complex64)])
    errors = attach(model, sgd(model))
    assert set(errors) == {0, 1, 2}
    assert isinstance(errors[1], CompatibilityError)
    assert "got torch.complex64 of 0" in str(errors[0])


def test_ranks_of_a_sharded_training_begin_with_equal_parameters():
    """Ranks 0 and 1 take the same parts, and so do 2 and 3: in pairs nobody differs."""

    def work(end):
        model = build(seed=end.rank // 2)
        GradientCoding(master="sharded", deadline_s=5.0).attach(model, sgd(model), transport=end)

    errors = together(work, InProcess.connect(4))
    assert set(errors) == {0, 1, 2, 3}
    assert all("must have the same trained parameters" in str(error) for error in errors.values())


@pytest.mark.parametrize("what", ["seed", "model", "buffers", "batches"])
def test_ranks_that_do_not_mean_the_same_training(what):

    def work(end):
        odd = end.rank == 2
        model = nn.Sequential(nn.Linear(6, 9 if odd and what == "model" else 8), nn.Linear(8, 1)).double()
        if what == "model":
            model = nn.Sequential(nn.Linear(6, 9 if odd else 8)).double()
        model.register_buffer("offset", torch.full((3,), float(odd and what == "buffers")))
        batches = Batches(120, 40, seed=int(odd and what == "batches"))
        coding = GradientCoding(deadline_s=5.0, seed=int(odd and what == "seed"))
        coding.attach(model, sgd(model), batches=batches, transport=end)

    errors = together(work, InProcess.connect(3))
    named = {"seed": "configuration", "model": "parameters", "buffers": "buffers", "batches": "batches"}[what]
    assert set(errors) == {0, 1, 2}
    assert all(f"ranks 0 and 2 must have the same {named}" in str(error) for error in errors.values())


def test_a_rank_that_never_says_hello_is_named():

    def work(end):
        model = build()
        time.sleep(0.1 * (end.rank == 0))  # so rank 1 is the first to lose patience
        GradientCoding(deadline_s=0.3).attach(model, sgd(model), transport=end)

    errors = together(work, InProcess.connect(3)[:2])
    assert all("ranks 2 did not say hello within 0.3 s" in str(errors[rank]) for rank in (0, 1))


def test_backward_belongs_into_a_step():
    def twice(rank, step):
        if step == 1 and rank.end.rank == 0:
            rank.coded.backward(lambda part: 0)
            rank.coded.backward(lambda part: 0)

    ranks = finish(start(4, STEPS, before=twice))
    assert isinstance(ranks[0].error, Exception)


def test_the_state_of_something_else():
    ends = InProcess.connect(3)
    ranks = train(3, 2)
    with pytest.raises(StateMismatchError, match="load what state_dict"):
        ranks[0].coded.load_state_dict({"algorithm": "dgc", "step": 3})
    for wrong in ({"step": None}, {"round": -1}, {"step": 3, "round": 2}):
        with pytest.raises(StateMismatchError, match="0 <= step <= round"):
            ranks[0].coded.load_state_dict({**ranks[0].state, **wrong})
    with pytest.raises(CompatibilityError, match="right after attach"):
        ranks[0].coded.load_state_dict(ranks[0].state)
    assert len(ends) == 3


# -- the configuration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"code": "turbo"}, "code must be one of"),
        ({"stragglers": -1}, "stragglers must be an integer of at least 0, got -1"),
        ({"master": "last"}, "master must be one of"),
        ({"stop": "never"}, "stop must be one of"),
        ({"mu": -1.0}, "mu must be"),
        ({"amplification_limit": 0}, "amplification_limit must be"),
        ({"deadline_s": 0}, "deadline_s must be"),
        ({"replicas": "shrug"}, "replicas must be one of"),
        ({"replica_tolerance": -1.0}, "replica_tolerance must be"),
        ({"check_rules": "no"}, "check_rules must be True or False"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"options": 3}, "options must be a mapping"),
        ({"scheme": 3}, "scheme must be a sequential code"),
        ({"master": "sharded", "code": "cyclic"}, "takes the fractional code only"),
        ({"master": "sharded", "stop": "paper"}, "stop must be left out, got 'paper': master='sharded'"),
        ({"master": "sharded", "replicas": "warn"}, "replicas must be left out, got 'warn'"),
        ({"code": "cyclic", "scheme": SRSGC(n=4, burst=1, window=2, stragglers=1)}, "code must be left out"),
    ],
)
def test_a_wrong_value_is_named(wrong, said):
    with pytest.raises(ConfigError, match=said):
        GradientCoding(**wrong)


def test_what_fits_no_number_of_workers():
    with pytest.raises(ConfigError, match="use binary"):
        GradientCoding(code="fractional", stragglers=1).scheme_for(5)
    with pytest.raises(ConfigError, match="knows the options"):
        GradientCoding(options={"speed": 3}).scheme_for(4)
    with pytest.raises(ConfigError, match="'approximate' has no number of stragglers, got 3"):
        GradientCoding(code="approximate", stragglers=3, options={"copies": 2}).scheme_for(4)
    with pytest.raises(ConfigError, match="for 3 workers, but the job has 4"):
        GradientCoding(code="heterogeneous", options={"speeds": [1.0, 1.0, 1.0]}).scheme_for(4)
    with pytest.raises(ConfigError, match="missing"):
        GradientCoding(code="heterogeneous").scheme_for(4)


@pytest.mark.parametrize(
    "config",
    [
        {"code": "cyclic", "stragglers": 2, "deadline_s": 5.0},
        {"code": "approximate", "options": {"copies": 3}},
        {"scheme": {"scheme": "sr-sgc", "burst": 1, "window": 2, "stragglers": 1}},
    ],
)
def test_a_configuration_survives_json(config):
    import json

    made = GradientCoding(**config)
    assert distopt.from_config(json.loads(json.dumps(made.to_dict()))) == made


def test_uncoded_is_equal_to_itself():
    assert torch.equal(uncoded([build()], 3)[0], uncoded([build()], 3)[0])
    assert not torch.equal(uncoded([build()], 3)[0], parameters(build()))

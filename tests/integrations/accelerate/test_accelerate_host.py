"""distopt under Hugging Face Accelerate, on real gloo ranks."""

import contextlib
import functools
import json

import pytest
import torch
from torch import nn

import distopt
from host_jobs import build_model, digits, flat, launched

pytest.importorskip("accelerate")
pytestmark = pytest.mark.job

from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from accelerate.utils import GradientAccumulationPlugin  # noqa: E402

from distopt.integrations.accelerate import attach  # noqa: E402

DGC = {"algorithm": "dgc", "density": 0.01, "exchange": "allgather"}
WHOLE = {**DGC, "density": 1.0}
TOPK = {**DGC, "algorithm": "topk"}
STEPS = 8


@contextlib.contextmanager
def accelerated(rank, size, **options):
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    with launched(rank, size):
        yield Accelerator(cpu=True, **options)


def sgd(model, momentum=0.9, weight_decay=1e-4):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=momentum, weight_decay=weight_decay)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)


def train(accelerator, model, optimizer, batches, clip=None):
    for images, labels in batches:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(images), labels))
            if clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


def run(rank, size, job=None, make=sgd, clip=None, scale=None, **options):
    """Trains plainly, or with a job; the parameters, the numbers, and the optimizer's settings on the way."""
    with accelerated(rank, size, **options) as accelerator:
        if scale:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        model = build_model()
        model, optimizer = accelerator.prepare(model, make(model))
        before = dict(optimizer.param_groups[0], params=None)
        attached = attach(accelerator, model, optimizer, job) if job else None
        during = dict(optimizer.param_groups[0], params=None)
        train(accelerator, model, optimizer, digits(rank, size, STEPS), clip)
        stats = attached.stats() if attached else None
        if attached:
            attached.detach()
        assert dict(optimizer.param_groups[0], params=None) == before
        return flat(model), stats, before, during


def here():
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def distances_to_plain():
    """Largest distance of an exchange of everything from plain Accelerate, by what is turned on."""
    no_momentum = functools.partial(sgd, momentum=0.0, weight_decay=0.0)
    cases = {
        "momentum": (WHOLE, {"make": functools.partial(sgd, weight_decay=0.0)}),
        "momentum and weight decay": (WHOLE, {}),
        "accumulation": (WHOLE, {"make": no_momentum, "gradient_accumulation_steps": 2}),
        "bf16": (WHOLE, {"make": no_momentum, "mixed_precision": "bf16"}),
        "clipping": (WHOLE, {"make": no_momentum, "clip": 0.1}),
        "fp16 scaler": (WHOLE, {"make": no_momentum, "scale": 1024.0}),
        "AdamW": ({**TOPK, "density": 1.0}, {"make": adamw, "clip": 0.1, "gradient_accumulation_steps": 2}),
    }
    distances = {}
    for name, (job, options) in cases.items():
        plain, whole = run(*here(), **options)[0], run(*here(), job, **options)[0]
        distances[name] = float((plain - whole).abs().max())
    return distances


def test_everything_sent_is_plain_training(ranks):
    for distances in ranks(2)(distances_to_plain):
        rounded = distances.pop("momentum and weight decay")  # its momentum is a sum of its own
        assert 0 < rounded < 1e-6
        assert set(distances.values()) == {0.0}, distances


def compressed():
    """Runs at 1%; what was taken over."""
    dgc = run(*here(), DGC)
    topk = run(*here(), TOPK, make=adamw, clip=0.1, gradient_accumulation_steps=2, mixed_precision="bf16")
    return [(parameters.tolist(), stats) for parameters, stats, _, _ in (dgc, topk)], dgc[2:], topk[2:]


def test_replicas_stay_equal_and_fewer_bytes_go(ranks):
    first, second = ranks(2)(compressed)
    for (ours, stats), (theirs, _) in zip(first[0], second[0], strict=True):
        assert ours == theirs
        assert stats["bytes_sent"] < 0.1 * stats["bytes_dense"]
    assert [stats["steps"] for _, stats in first[0]] == [STEPS, STEPS // 2]
    before, during = first[1]
    assert (before["momentum"], before["weight_decay"]) == (0.9, 1e-4)
    assert (during["momentum"], during["weight_decay"]) == (0.0, 0.0)
    assert first[2][0] == first[2][1]  # top-k takes nothing from AdamW


def saved_and_resumed(folder, job, make, *, save_at=None, load=False):
    """Trains with a job, saving or resuming half-way."""
    rank, size = here()
    with accelerated(rank, size) as accelerator:
        model = build_model()
        model, optimizer = accelerator.prepare(model, make(model))
        batches = digits(rank, size, STEPS)
        with attach(accelerator, model, optimizer, job) as attached:
            if load:
                accelerator.load_state(folder)
                batches = batches[STEPS // 2 :]
            if save_at:
                train(accelerator, model, optimizer, batches[:save_at])
                accelerator.save_state(folder)
                accelerator.wait_for_everyone()
                batches = batches[save_at:]
            train(accelerator, model, optimizer, batches)
            steps = attached.attachment.state_dict()["step"]
        settings = {key: optimizer.param_groups[0].get(key) for key in ("momentum", "weight_decay")}
        return flat(model).tolist(), steps, settings


def refused_without_it(folder):
    """Loads a checkpoint that has the state of an attachment where none is attached."""
    with accelerated(*here()) as accelerator:
        model = build_model()
        accelerator.prepare(model, sgd(model))
        with pytest.raises(RuntimeError, match="registered objects"):
            accelerator.load_state(folder)


def test_a_checkpoint_carries_every_rank(ranks, tmp_path):
    for job, make in ((DGC, sgd), (TOPK, adamw)):
        folder = str(tmp_path / job["algorithm"])
        through = ranks(2)(saved_and_resumed, folder, job, make, save_at=STEPS // 2)
        resumed = ranks(2)(saved_and_resumed, folder, job, make, load=True)
        assert resumed == through
        assert len(list((tmp_path / job["algorithm"] / "distopt").glob("*.pt"))) == 2
    (_, steps, settings), *_ = ranks(1)(saved_and_resumed, str(tmp_path / "dgc"), DGC, sgd, load=True)
    assert steps == STEPS
    assert settings == {"momentum": 0.9, "weight_decay": 1e-4}
    ranks(2)(refused_without_it, str(tmp_path / "dgc"))


def refusals(folder):
    """What is refused, and in which words."""
    rank, size = here()

    def prepared(**options):
        model = build_model()
        return accelerator, *accelerator.prepare(model, sgd(model))

    def raises(words, *arguments):
        with pytest.raises(distopt.CompatibilityError, match=words):
            attach(*arguments)

    with accelerated(rank, size) as accelerator:
        model = build_model()
        raises("prepare", accelerator, model, sgd(model), DGC)
        arguments = prepared()
        raises("prepare", *arguments[:2], arguments[2].optimizer, DGC)
        raises("bare model", *arguments, distopt.Gossip())
        raises("save_state.*runs/x", *arguments, {**DGC, "checkpoint": {"folder": "runs/x"}})
        with pytest.raises(distopt.ConfigError, match="densty"):
            attach(*arguments, {"algorithm": "dgc", "densty": 0.1})
        with attach(*arguments, DGC):
            raises("call detach", *arguments, DGC)
            train(*arguments, digits(rank, size, 1))
        accelerator.save_state(folder)  # nothing is attached any more
        accelerator.wait_for_everyone()
        with attach(*arguments, DGC), pytest.raises(distopt.StateMismatchError, match="before attach"):
            accelerator.load_state(folder)
    plugin = GradientAccumulationPlugin(num_steps=2, sync_each_batch=True)
    with accelerated(rank, size, gradient_accumulation_plugin=plugin) as accelerator:
        raises("sync_each_batch", *prepared(), DGC)


def test_refusals_say_what_to_do(ranks, tmp_path):
    ranks(2)(refusals, str(tmp_path))
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator, model = Accelerator(cpu=True), build_model()  # one process, without a launcher
    prepared = accelerator.prepare(model, sgd(model))
    with pytest.raises(distopt.CompatibilityError, match="torchrun"):
        attach(accelerator, *prepared, DGC)


def test_the_log_of_a_job_is_written(ranks, tmp_path):
    job = tmp_path / "distopt.toml"
    lines = [*(f"{key} = {value!r}" for key, value in DGC.items()), "[log]", f'folder = "{tmp_path}/log"', "every = 4"]
    job.write_text("\n".join(lines).replace("'", '"'))
    ranks(2)(logged, str(job))
    for rank in range(2):
        steps = [json.loads(line)["step"] for line in (tmp_path / f"log/stats-{rank}.jsonl").read_text().splitlines()]
        assert steps == [1, 4, 8]
    assert (tmp_path / "log/report.txt").exists()


def logged(job):
    run(*here(), job)

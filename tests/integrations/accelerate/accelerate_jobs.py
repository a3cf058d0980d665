"""distopt under Hugging Face Accelerate, on real gloo ranks."""

import contextlib
import functools
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from torch import nn

import distopt
from distopt.integrations.accelerate import attach
from host_jobs import DGC, STEPS, TOPK, WHOLE, build_model, digits, flat, here, launched, reset_accelerate


@contextlib.contextmanager
def accelerated(rank, size, **options):
    reset_accelerate()
    with launched(rank, size):
        yield Accelerator(cpu=True, **options)


def sgd(model, momentum=0.9, weight_decay=1e-4):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=momentum, weight_decay=weight_decay)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)


MAKE = {"dgc": sgd, "topk": adamw}


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
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
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
    unscaled, scaled = run(*here(), DGC)[0], run(*here(), DGC, scale=1024.0)[0]
    distances["what is held back while the scale grows"] = float((unscaled - scaled).abs().max())
    return distances


def compressed():
    """Runs at 1%; what was taken over."""
    dgc = run(*here(), DGC)
    topk = run(*here(), TOPK, make=adamw, clip=0.1, gradient_accumulation_steps=2, mixed_precision="bf16")
    return [(parameters.tolist(), stats) for parameters, stats, _, _ in (dgc, topk)], dgc[2:], topk[2:]


def saved_and_resumed(folder, job, *, save_at=None, load=False):
    """Trains with a job, saving or resuming half-way."""
    rank, size = here()
    with accelerated(rank, size) as accelerator:
        model = build_model()
        model, optimizer = accelerator.prepare(model, MAKE[job["algorithm"]](model))
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
        for kind, words in (("FSDP", "integrations.fsdp"), ("DEEPSPEED", "integrations.deepspeed")):  # need a GPU
            with mock.patch.object(Accelerator, "distributed_type", DistributedType[kind]):
                raises(words, accelerator, build_model(), sgd(build_model()), DGC)


def logged(job):
    run(*here(), job)


def refused_alone():
    """One process, without a launcher."""
    reset_accelerate()
    accelerator, model = Accelerator(cpu=True), build_model()
    prepared = accelerator.prepare(model, sgd(model))
    with pytest.raises(distopt.CompatibilityError, match="torchrun"):
        attach(accelerator, *prepared, DGC)

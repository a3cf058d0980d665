"""distopt under Lightning Fabric, on real gloo ranks."""

import contextlib
import functools

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from torch import nn

import distopt
from distopt.integrations.fabric import attach
from host_jobs import DGC, STEPS, TOPK, WHOLE, build_model, digits, flat, here, launched


def sgd(model, momentum=0.9, weight_decay=1e-4):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=momentum, weight_decay=weight_decay)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)


@contextlib.contextmanager
def fabricated(make=sgd, **options):
    """Fabric with a model and its optimizer set up."""
    rank, size = here()
    with launched(rank, size):
        fabric = Fabric(accelerator="cpu", devices=size, strategy=DDPStrategy(process_group_backend="gloo"), **options)
        fabric.launch()
        model = build_model()
        yield fabric, *fabric.setup(model, make(model))


def train(fabric, model, optimizer, batches, *, accumulate=1, clip=None):
    for index, (images, labels) in enumerate(batches):
        part = (index + 1) % accumulate != 0
        with fabric.no_backward_sync(model, enabled=part):
            fabric.backward(nn.functional.cross_entropy(model(images), labels) / accumulate)
        if part:
            continue
        if clip:
            fabric.clip_gradients(model, optimizer, max_norm=clip)
        optimizer.step()
        optimizer.zero_grad()


def fit(job=None, make=sgd, *, precision=None, **options):
    """Trains plainly, or with a job: the parameters and the numbers."""
    with fabricated(make, precision=precision) as fabric_and_model:
        _, model, optimizer = fabric_and_model
        group = optimizer.param_groups[0]
        before = group.get("momentum"), group["weight_decay"]
        attached = attach(*fabric_and_model, job) if job else contextlib.nullcontext()
        with attached:
            train(*fabric_and_model, digits(*here(), STEPS), **options)
            during = group.get("momentum"), group["weight_decay"]
        assert (group.get("momentum"), group["weight_decay"]) == before
        assert during == (before if make is adamw or not job else (0.0, 0.0))
        return flat(model), attached.stats() if job else None


def distances_to_plain():
    """Largest distance of an exchange of everything from plain Fabric, by what is turned on."""
    no_momentum = functools.partial(sgd, momentum=0.0, weight_decay=0.0)
    cases = {
        "momentum": (WHOLE, {"make": functools.partial(sgd, weight_decay=0.0)}),
        "momentum and weight decay": (WHOLE, {}),
        "accumulation, clipping": (WHOLE, {"make": no_momentum, "accumulate": 2, "clip": 0.1}),
        "bf16": (WHOLE, {"make": no_momentum, "precision": "bf16-mixed"}),
        "AdamW": ({**TOPK, "density": 1.0}, {"make": adamw, "clip": 0.1, "accumulate": 2}),
    }
    distances = {}
    for name, (job, options) in cases.items():
        distances[name] = float((fit(**options)[0] - fit(job, **options)[0]).abs().max())
    return distances


def compressed(folder):
    dgc = fit({**DGC, "log": {"folder": folder, "every": 4}})
    topk = fit(TOPK, adamw, accumulate=2, precision="bf16-mixed")
    return [(parameters.tolist(), stats) for parameters, stats in (dgc, topk)]


def saved_or_resumed(path, job, *, resume=False):
    """Trains with a job, saving or resuming half-way: parameters, steps, and what was held back by all ranks."""
    make = {"dgc": sgd, "topk": adamw}[job["algorithm"]]
    with fabricated(make) as (fabric, model, optimizer), attach(fabric, model, optimizer, job) as attached:
        state = {"model": model, "optimizer": optimizer, "distopt": attached}
        first, second = (batches := digits(*here(), STEPS))[: STEPS // 2], batches[STEPS // 2 :]
        if not resume:
            train(fabric, model, optimizer, first)
            fabric.save(path, state)
        else:
            fabric.load(path, state)
        held_back = attached.attachment.state_dict()["ranks"][str(here()[0])]["0.weight"]["v"].sum()
        torch.distributed.all_reduce(held_back)
        train(fabric, model, optimizer, second)
        return flat(model).tolist(), attached.attachment.state_dict()["step"], float(held_back)


def refusals():
    """What is refused, and in which words."""

    def raises(words, *arguments, error=distopt.CompatibilityError):
        with pytest.raises(error, match=words):
            attach(*arguments)

    with fabricated() as (fabric, model, optimizer):
        raises("model that fabric.setup returns", fabric, model.module, optimizer, DGC)
        raises("optimizer that fabric.setup returns", fabric, model, optimizer.optimizer, DGC)
        raises("bare model", fabric, model, optimizer, distopt.Gossip())
        raises(
            r"fabric.save.*runs/x.*\{.*distopt", fabric, model, optimizer, {**DGC, "checkpoint": {"folder": "runs/x"}}
        )
        raises("densty", fabric, model, optimizer, {"algorithm": "dgc", "densty": 1}, error=distopt.ConfigError)


def refused_alone():
    """One process."""
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    model = build_model()
    prepared = fabric.setup(model, sgd(model))
    with pytest.raises(distopt.CompatibilityError, match='strategy="ddp"'):
        attach(fabric, *prepared, DGC)

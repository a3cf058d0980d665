"""A coded training of threads in this process, and the uncoded training that it must equal."""

import copy
import threading
import time

import torch
from torch import nn

import distopt
from distopt.coding import Batches
from distopt.comm import InProcess

SAMPLES = 120
DEADLINE_S = 60.0
_generator = torch.Generator().manual_seed(3)
INPUTS = torch.randn(SAMPLES, 6, dtype=torch.float64, generator=_generator)
TARGETS = (INPUTS[:, :2].sum(1, keepdim=True) > 0).double()


def build(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def sum_loss(model, samples):
    dtype = next(model.parameters()).dtype
    return nn.functional.binary_cross_entropy_with_logits(
        model(INPUTS[samples].to(dtype)), TARGETS[samples].to(dtype), reduction="sum"
    )


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)


def parameters(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def uncoded(models, steps, batch_size=40, delay=0):
    """Full-batch steps: job t trains model t modulo their number; with one model and a delay its gradient is old."""
    models = [copy.deepcopy(model) for model in models]
    optimizers = [sgd(model) for model in models]
    batches = Batches(SAMPLES, batch_size)
    old = delay if len(models) == 1 else 0
    waiting = []
    for step in range(steps):
        model, optimizer = models[step % len(models)], optimizers[step % len(models)]
        optimizer.zero_grad()
        (sum_loss(model, batches.indices(step)) / batch_size).backward()
        waiting.append([p.grad.clone() for p in model.parameters()])
        if len(waiting) > old:
            apply(model, optimizer, waiting.pop(0))
    for gradients in waiting:
        apply(models[0], optimizers[0], gradients)
    return [parameters(model) for model in models]


def apply(model, optimizer, gradients):
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = gradient
    optimizer.step()


class Rank:
    """One end of the job: what it did, and the error that ended it."""

    def __init__(self, end, models):
        self.end = end
        self.models = [copy.deepcopy(model) for model in models]
        self.optimizers = [sgd(model) for model in self.models]
        self.steps, self.losses = [], []
        self.error = self.stats = self.state = None
        self.report = ""

    def run(self, config, steps, batches, loss, before, state, loops):
        try:
            single = len(self.models) == 1
            self.coded = distopt.GradientCoding(**config).attach(
                self.models[0] if single else self.models,
                self.optimizers[0] if single else self.optimizers,
                batches=batches,
                transport=self.end,
            )
            with self.coded as coded:
                if state is not None:
                    coded.load_state_dict(state)
                for _ in range(loops):
                    for step in coded.steps(steps):
                        self.steps.append(step)
                        before(self, step)
                        self.losses.append(coded.backward(lambda part: loss(self.models[part.model], part)))
                        for optimizer in self.optimizers:
                            optimizer.step()
                self.stats, self.report, self.state = coded.stats(), coded.report(), coded.state_dict()
        except Exception as error:
            self.error = error


def together(work, ends, *, deadline_s=30.0):
    """Calls `work(end)` of all these ends side by side, and returns the errors by rank."""
    errors = {}

    def guarded(end):
        try:
            work(end)
        except Exception as error:
            errors[end.rank] = error

    threads = [threading.Thread(target=guarded, args=(end,), daemon=True) for end in ends]
    for thread in threads:
        thread.start()
    last = time.monotonic() + deadline_s
    for end, thread in zip(ends, threads, strict=True):
        thread.join(max(0.0, last - time.monotonic()))
        assert not thread.is_alive(), f"rank {end.rank} has not ended"
    return errors


def by_samples(model, part):
    return sum_loss(model, part.samples)


def start(
    size,
    steps,
    *,
    models=None,
    batch_size=40,
    loss=by_samples,
    before=lambda rank, step: None,
    state=None,
    loops=1,
    **config,
):
    """Starts all ranks; `before(rank, step)` runs ahead of each step of each rank."""
    models = [build()] if models is None else models
    ranks = [Rank(end, models) for end in InProcess.connect(size)]
    config = {"deadline_s": 20.0, **config}
    for rank in ranks:
        batches = Batches(SAMPLES, batch_size) if batch_size else None
        arguments = (config, steps, batches, loss, before, state, loops)
        rank.thread = threading.Thread(target=rank.run, args=arguments, daemon=True)
        rank.thread.start()
    return ranks


def finish(ranks):
    end = time.monotonic() + DEADLINE_S
    for rank in ranks:
        rank.thread.join(max(0.0, end - time.monotonic()))
        assert not rank.thread.is_alive(), f"rank {rank.end.rank} has not ended"
    return ranks


def train(size, steps, **arguments):
    """All ranks of a job that must end well."""
    ranks = finish(start(size, steps, **arguments))
    for rank in ranks:
        if rank.error is not None:
            raise rank.error
    return ranks

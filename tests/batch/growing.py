"""A small training on scikit-learn's digits whose batch grows, for the tests of real ranks."""

import collections
import itertools

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import distopt
from distopt.batch import GrowingBatchSampler

SAMPLES = 480


def digits(samples=SAMPLES):
    found = load_digits()
    return TensorDataset(
        torch.tensor(found.data[:samples], dtype=torch.float32) / 16, torch.tensor(found.target[:samples])
    )


class Training:
    """A model, its optimizer, a loader that grows and what is beside."""

    def __init__(self, algorithm, *, size=4, ahead=0, optimizer=None, scaler=None, **batch):
        torch.manual_seed(1)
        self.module = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
        self.data = digits()
        is_ddp = isinstance(algorithm, distopt.ddp.algorithm.DDPAlgorithm)
        self.model = DistributedDataParallel(self.module, bucket_cap_mb=0.002) if is_ddp else self.module
        make = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
        self.optimizer = make(self.model.parameters())
        self.scaler = scaler
        options = {} if scaler is None else {"scaler": scaler}
        self.beside = None if algorithm is None else algorithm.attach(self.model, self.optimizer, **options)
        self.sampler = GrowingBatchSampler(self.data, batch_size=size, seed=3)
        self.loader = DataLoader(self.data, batch_sampler=self.sampler)
        self.ahead = ahead
        self.overflows = set()  # steps whose gradient is not finite on the last rank
        configured = distopt.AdaptiveBatch(**{"every": 2, "ema": 2, "max_batch": SAMPLES, **batch})
        self.batch = configured.attach(self.model, self.optimizer, self.loader, beside=self.beside)
        self.trace = []  # of each step: samples of this rank's micro-batches, the batch, the noise scale
        self.walk = None

    def run(self, steps, each=None):
        """So many more steps, through as many epochs as they need; `each` is called before the optimizer's step."""
        for _ in range(steps):
            micro_batches = self._next()
            sizes = []
            for inputs, targets in micro_batches:
                sizes.append(len(inputs))
                loss = nn.functional.cross_entropy(self.model(inputs), targets)
                if len(self.trace) in self.overflows and dist.get_rank() == dist.get_world_size() - 1:
                    loss = loss * torch.inf
                self.batch.backward(loss if self.scaler is None else self.scaler.scale(loss))
            if each is not None:
                each()
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            self.optimizer.zero_grad()
            self.trace.append((tuple(sizes), self.batch.batch_size, self.batch.noise_scale))

    def _next(self):
        while True:
            if self.walk is None:
                self.walk = self.batch.steps(fetched_ahead(self.loader, self.ahead))
            found = next(self.walk, None)
            if found is not None:
                return found
            self.walk = None

    def states(self):
        parts = {"model": self.module, "optimizer": self.optimizer, "batch": self.batch}
        if self.beside is not None:
            parts["beside"] = self.beside
        return {name: part.state_dict() for name, part in parts.items()}

    def load(self, states):
        self.module.load_state_dict(states["model"])
        self.optimizer.load_state_dict(states["optimizer"])
        if self.beside is not None:
            self.beside.load_state_dict(states["beside"])
        self.batch.load_state_dict(states["batch"])

    def close(self):
        self.batch.detach()
        if self.beside is not None:
            self.beside.detach()


def fetched_ahead(loader, depth):
    """As a loader with workers does, which the daemonic processes of the tests may not have."""
    source, queue = iter(loader), collections.deque()
    queue.extend(itertools.islice(source, depth))
    while True:
        queue.extend(itertools.islice(source, 1))
        if not queue:
            return
        yield queue.popleft()


def gathered(tensor):
    """Of every rank, in rank order."""
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor)
    return found

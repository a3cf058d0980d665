"""A model whose gradients the test chooses, and one training loop for DDP with every option that the tests turn on."""

import contextlib
import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt.ddp.registration import HookSlot

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
SHAPES = {f"block{i}.{kind}": shape for i in range(8) for kind, shape in (("weight", (12, 10)), ("bias", (12,)))}
LEARNING_RATE = 2.0**-6


class Chosen(nn.Module):
    """The gradient of each parameter is the tensor given for it; a parameter given None takes no part.

    Gradients become ready in an order that is neither that of registration nor its reverse.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, shapes: dict[str, tuple[int, ...]] = SHAPES) -> None:
        super().__init__()
        for name, shape in shapes.items():
            block, kind = name.split(".")
            if not hasattr(self, block):
                self.add_module(block, nn.Module())
            values = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape).remainder(7) / 8
            getattr(self, block).register_parameter(kind, nn.Parameter(values.to(dtype)))

    def forward(self, gradients: dict[str, Tensor | None]) -> Tensor:
        order = sorted(self.named_parameters(), key=lambda item: (item[0][5] in "0246", item[0]))
        terms = [(p * gradients[name]).sum() for name, p in order if gradients.get(name) is not None]
        return torch.stack(terms).sum()


def chosen_gradients(step: int, micro: int, rank: int, dtype: torch.dtype, shapes=SHAPES) -> dict[str, Tensor | None]:
    """Small integers, many of them equal: sums are exact in every dtype, and selection meets ties."""
    generator = torch.Generator().manual_seed(1_000_003 * rank + 1009 * step + micro)
    return {name: torch.randint(-3, 4, shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training run on `Chosen`."""

    algorithm: Any
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    buckets: int = 2
    view: bool = False
    static: bool = False
    find_unused: bool = False
    accumulate: int = 1
    join: bool = False
    dtype: str = "fp32"
    steps: int = 20

    def steps_of(self, rank: int) -> int:
        """Under Join the last rank runs out of data before the others."""
        return self.steps - 7 if self.join and rank else self.steps

    def micro_batches(self, step: int) -> int:
        """Under static_graph torch wants its first backward pass synchronised, not under no_sync."""
        return 1 if self.static and step == 0 else self.accumulate

    def bucket_cap_mb(self) -> float:
        """A cap that makes `buckets` buckets of the sixteen parameters: a bucket is closed when it reaches the cap."""
        nbytes = sum(torch.Size(shape).numel() for shape in SHAPES.values()) * DTYPES[self.dtype].itemsize
        return {1: 1.0, 2: nbytes / 2 / 2**20, 8: nbytes / 8.5 / 2**20}[self.buckets]


@dataclasses.dataclass
class Outcome:
    """What a rank saw; tensors as float64 arrays, which hold every dtype exactly and travel between processes."""

    parameters: dict[str, Any]
    state: dict[str, dict[str, Any]]  # this rank's memory by parameter
    decay: dict[str, Any]
    updates: dict[str, Any]  # sum of all updates
    buckets: list[list[tuple[str, ...]]]  # per step, the names in each bucket
    stats: dict[str, Any]


def plain(tensor: Tensor):
    return tensor.detach().double().numpy().copy()


@contextlib.contextmanager
def recorded_buckets(names: dict[int, str]):
    """Yields a list that gets, per step, the parameter names of each bucket that DDP hands over."""
    steps: list[list[tuple[str, ...]]] = []
    original = HookSlot.__call__

    def record(slot, bucket):
        if bucket.index() == 0 or not steps:
            steps.append([])
        steps[-1].append(tuple(names[id(p)] for p in bucket.parameters()))
        return original(slot, bucket)

    HookSlot.__call__ = record
    try:
        yield steps
    finally:
        HookSlot.__call__ = original


def train(run: Run) -> Outcome:
    """Runs on every rank of the default group."""
    rank, dtype = dist.get_rank(), DTYPES[run.dtype]
    model = DistributedDataParallel(
        Chosen(dtype),
        bucket_cap_mb=run.bucket_cap_mb(),
        gradient_as_bucket_view=run.view,
        static_graph=run.static,
        find_unused_parameters=run.find_unused,
    )
    named = dict(model.module.named_parameters())
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=LEARNING_RATE,
        momentum=run.momentum,
        nesterov=run.nesterov,
        weight_decay=run.weight_decay,
    )
    attachment = run.algorithm.attach(model, optimizer)
    updates = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in named.items()}
    joining = Join([model]) if run.join else contextlib.nullcontext()
    with recorded_buckets({id(p): name for name, p in named.items()}) as buckets, joining:
        for step in range(run.steps_of(rank)):
            for micro in range(run.micro_batches(step)):
                last = micro == run.micro_batches(step) - 1
                with contextlib.nullcontext() if last else model.no_sync():
                    model(chosen_gradients(step, micro, rank, dtype)).backward()
            for name, p in named.items():
                updates[name] += p.grad.double()
            optimizer.step()
            optimizer.zero_grad()
    state = attachment.state_dict()
    return Outcome(
        parameters={name: plain(p) for name, p in named.items()},
        state={
            name: {key: plain(t) for key, t in tensors.items()} for name, tensors in state["ranks"][str(rank)].items()
        },
        decay={name: plain(t) for name, t in state["replicated"]["decay"].items()},
        updates={name: t.numpy() for name, t in updates.items()},
        buckets=buckets,
        stats=attachment.stats(),
    )


def dgc(**fields) -> distopt.DGC:
    return distopt.DGC(**{"density": 0.1, "exchange": "allgather", **fields})


def topk(**fields) -> distopt.TopK:
    return distopt.TopK(**{"density": 0.1, "exchange": "allgather", **fields})


def momentum_sgd(parameters, **settings) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, **{"lr": 0.05, "momentum": 0.9, **settings})


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def samples(step: int, rank: int, *, inputs: int = 16, outputs: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1009 * step + rank)
    return torch.randn(8, inputs, generator=generator), torch.randn(8, outputs, generator=generator)


def step_on_samples(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, rank: int) -> float:
    x, y = samples(step, rank)
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def values_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def memories_of(attachment) -> dict[str, dict[str, Tensor]]:
    """Copies of this rank's u and v by parameter name."""
    (memories,) = attachment.state_dict()["ranks"].values()
    return {name: {key: t.clone() for key, t in tensors.items()} for name, tensors in memories.items()}


def assert_equal(found: dict, expected: dict, what: str = "") -> None:
    """Bit for bit, for nested dictionaries of tensors."""
    assert found.keys() == expected.keys(), (what, found.keys(), expected.keys())
    for key, value in found.items():
        if isinstance(value, dict):
            assert_equal(value, expected[key], f"{what} {key}")
        else:
            assert torch.equal(value, expected[key]), f"{what} {key}: off by {(value - expected[key]).abs().max()}"


def assert_close(found: dict, expected: dict, **tolerance) -> None:
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], **tolerance, msg=lambda text, key=key: f"{key}: {text}")


def assert_same_on_all_ranks(tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    for name, tensor in tensors.items():
        mine = tensor.detach().double().contiguous()
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, mine, group=group)
        assert all(torch.equal(other, mine) for other in everyone), name


def error_of(action, kind: type[BaseException] = Exception) -> str:
    """The message of the error that `action` raises."""
    try:
        action()
    except kind as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"no {kind.__name__} was raised")

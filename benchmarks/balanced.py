"""Who keeps what an owner drops decides convergence: the balanced exchange against all-gather, dense and a control.

    python benchmarks/balanced.py --json results.json

scikit-learn's digits, an MLP of 246k parameters, 16 ranks, momentum correction, density 0.4%, 1,000 steps. "iid": each
rank has its share of shuffled images; "label-sorted": the images are sorted by label before they are shared out: a rank
sees one or two digits. Final training loss over all images, of each seed.

The ranks are virtual: one process computes all gradients and runs the shipped phases of the exchange rank by rank; only
the network is left out. "sender keeps" is the control, the rule of Ok-Topk: an entry that its owner does not pass on
stays with its sender. It is made from the shipped exchange by replacing three functions.
"""

import argparse
import contextlib
import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.futures import Future

from distopt.cli.machine import machine, versions
from distopt.comm import Place
from distopt.compress import INDEX_FORMATS, Header, cost
from distopt.ddp import FlatBucket
from distopt.ddp.arrival import write_update
from distopt.ddp.contribution import Contribution, select
from distopt.ddp.groups import Groups
from distopt.ddp.inflight import InFlight
from distopt.ddp.memory import MomentumCorrection
from distopt.ddp.parameters import TrackedParameter
from distopt.ddp.plan import plan_bucket
from distopt.ddp.policy import Routing, WirePolicy
from distopt.ddp.routes import balanced

RANKS, BATCH, DENSITY, LR, MOMENTUM = 16, 8, 0.004, 0.05, 0.9
SHAPES = [(64, 460), (460, 460), (460, 10)]
METHODS = {
    "dense": None,
    "all-gather": "allgather",
    "owner keeps, m = 4k/N": "balanced",
    "owner keeps, m = k/N": "balanced",
    "sender keeps, m = k/N": "balanced",
}


class VirtualRank:
    """The weights' memories of one rank, and its part in the exchange."""

    def __init__(self, weights: list[Tensor], route: str) -> None:
        self.weights = weights
        tracked = []
        for i, weight in enumerate(weights):
            memory = MomentumCorrection(
                weight.numel(), torch.float32, weight.device, momentum=MOMENTUM, nesterov=False, masking=True
            )
            tracked.append(TrackedParameter(name=str(i), parameter=weight, memory=memory, density=DENSITY))
        policy = WirePolicy(
            value_dtype=torch.float32,
            index_format=INDEX_FORMATS["int32"],
            exchange=route,
            with_status=True,
            with_used_flags=False,
        )
        routing = Routing(place=Place(num_ranks=RANKS), routes=(route,))
        self.plan = plan_bucket(tracked, torch.float32, lambda entry: entry.density or 1.0, policy, routing)
        self.groups = Groups(self.plan, weights[0].device)

    def begin(self, gradients: list[Tensor], step: int) -> InFlight:
        """A bucket with this rank's gradients."""
        bucket = FlatBucket(self.weights, gradients)
        return InFlight(
            bucket=bucket,
            plan=self.plan,
            header=Header(step=step),
            unused=frozenset(),
            groups=self.groups,
            update=bucket.buffer(),
            future=Future(),
            began=0.0,
        )


def through_owners(items: list[InFlight]) -> Tensor:
    """The update, flat, by the phases of the balanced exchange."""
    layout = items[0].plan.layout
    assert layout is not None
    chosen = [balanced.contribute(item) for item in items]
    messages = torch.stack(
        [layout.pack(item.header, *made) for item, made in zip(items, chosen, strict=True)]
    )  # (from, to, bytes)
    payloads = [balanced.pass_on(item, messages[:, rank].contiguous(), rank) for rank, item in enumerate(items)]
    gathered = torch.stack([payload for payload in payloads if payload is not None])
    for item, (indices, _) in zip(items, chosen, strict=True):
        balanced.finish(item, gathered, indices)
    write_update(items[0])
    return items[0].update


def to_everybody(items: list[InFlight]) -> Tensor:
    """The update, flat, by an all-gather."""
    for item in items:
        item.contribution = Contribution.empty(item.buffer)
        items[0].arrived.append(select(item.plan, item.groups, item.buffer))
    write_update(items[0])
    return items[0].update


@contextlib.contextmanager
def variant(method: str) -> Iterator[None]:
    """The exchange as this method has it."""
    before = cost.ROOM, balanced._put, balanced._keep, balanced._mask
    if method.endswith("m = k/N"):
        cost.ROOM = 1
    if method.startswith("sender"):
        put, mask = balanced._put, balanced._mask

        def forget(groups: Groups, positions: Tensor) -> None:  # what has got through, and nothing else
            put(groups, positions, torch.zeros(positions.numel()))
            mask(groups, positions)

        balanced._put = lambda groups, positions, values: None
        balanced._keep = lambda groups, owned, owner, num_owners: None
        balanced._mask = forget
    try:
        yield
    finally:
        cost.ROOM, balanced._put, balanced._keep, balanced._mask = before


def shares(layout: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Images, labels, and the positions that each rank has."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    if layout == "label-sorted":
        order = order[labels[order].argsort(stable=True)]
    return images, labels, list(order.tensor_split(RANKS))


def loss_of(weights: list[Tensor], biases: list[Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the MLP."""
    x = images
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = x @ weight + bias
        x = torch.relu(x) if i < len(weights) - 1 else x
    return nn.functional.cross_entropy(x, labels)


def train(method: str, layout: str, seed: int, steps: int) -> dict[str, Any]:
    """Final loss, and bytes on the link per rank and step."""
    images, labels, owned = shares(layout)
    torch.manual_seed(seed)
    weights = [torch.empty(shape).uniform_(-1, 1) / shape[0] ** 0.5 for shape in SHAPES]
    biases = [torch.zeros(shape[1]) for shape in SHAPES]
    momenta = [torch.zeros_like(t) for t in (*weights, *biases)]  # of what is averaged densely
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.func.vmap(torch.func.grad(loss_of, argnums=(0, 1)), in_dims=(None, None, 0, 0))
    with variant(method):
        route = METHODS[method]
        ranks = [VirtualRank(weights, route) for _ in range(RANKS)] if route else []
        for step in range(steps):
            batch = torch.stack([own[torch.randint(len(own), (BATCH,), generator=generator)] for own in owned])
            by_weight, by_bias = gradient(weights, biases, images[batch], labels[batch])
            dense = [grads.mean(0) for grads in (*by_weight, *by_bias)]
            for momentum, mean, parameter in zip(momenta, dense, (*weights, *biases), strict=True):
                momentum.mul_(MOMENTUM).add_(mean)
                if parameter.dim() == 1 or route is None:
                    parameter.sub_(momentum, alpha=LR)
            if route:
                items = [rank.begin([g[i] for g in by_weight], step) for i, rank in enumerate(ranks)]
                update = through_owners(items) if route == "balanced" else to_everybody(items)
                for weight, part in zip(weights, update.split([w.numel() for w in weights]), strict=True):
                    weight.sub_(part.view(weight.shape), alpha=LR)
    numel = sum(weight.numel() for weight in weights)
    return {
        "loss": loss_of(weights, biases, images, labels).item(),
        "link_bytes_per_step": ranks[0].plan.link_bytes if ranks else cost.allreduce_bytes(RANKS, 4 * numel),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    print(f"{RANKS} ranks, {options.steps} steps, final training loss of {options.seeds} seeds")
    print(f"{'':24}{'bytes/step':>12} {'iid':>24} {'label-sorted':>24}", flush=True)
    for method in METHODS:
        runs: dict[str, list[dict[str, Any]]] = {"iid": [], "label-sorted": []}
        began = time.perf_counter()
        for layout, found in runs.items():
            found += [train(method, layout, seed, options.steps) for seed in range(options.seeds)]
        results[method] = {"seconds": time.perf_counter() - began, **runs}
        losses = {layout: "/".join(f"{run['loss']:.3f}" for run in found) for layout, found in runs.items()}
        nbytes = runs["iid"][0]["link_bytes_per_step"]
        print(f"{method:24}{nbytes:>12,} {losses['iid']:>24} {losses['label-sorted']:>24}", flush=True)
    if options.json:
        content = {
            "command": shlex.join(["python", *sys.argv]),
            "ranks": RANKS,
            "steps": options.steps,
            "density": DENSITY,
            "machine": machine(),
            "versions": versions(),
            "results": results,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

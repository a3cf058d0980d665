"""Many nodes in one process: the same rules and graphs as on real ranks, the same steps up to rounding."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from distopt.config import check_choice, check_count
from distopt.errors import CompatibilityError, ConfigError, in_a_line
from distopt.gossip.configuration import Gossip
from distopt.gossip.flat import Place, flatten, layout
from distopt.gossip.participant import Participant
from distopt.gossip.simulated_mixer import SimulatedExchange
from distopt.replica import trained

Batch = tuple[Tensor, ...]
Loss = Callable[[nn.Module, Batch], Tensor]
_log = logging.getLogger("distopt")


@dataclass
class GossipHistory:
    """What happened.

    Attributes:
        rows: One for each evaluation: "step", the named numbers of `evaluate` averaged over the nodes, "bytes_sent" by
            all nodes so far, "consensus_distance" (root of the mean over nodes of the squared distance to their mean
            model) and, with variance correction, "variance_ratio", the least that the last average left of a tensor's
            variance at any node.
        models: (n, d), the last parameters, node by node.
        names: Of the parameters, in the order in which they lie there.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    models: Tensor = field(default_factory=lambda: torch.empty(0))
    names: list[str] = field(default_factory=list)

    def first_step(self, name: str, at_least: float) -> int | None:
        """The step of the first evaluation in which a number was that high; None if none was."""
        return next((int(row["step"]) for row in self.rows if row.get(name, float("-inf")) >= at_least), None)


def simulate(
    gossip: Gossip,
    *,
    make_model: Callable[[], nn.Module],
    batches: Callable[[int], Batch],
    steps: int,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    loss: Loss | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    evaluate_every: int = 10,
    initial: str = "different",
    seed: int = 0,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    progress: Callable[[Mapping[str, float]], None] | None = None,
) -> GossipHistory:
    """Trains a node for each row of a batch, all in this process.

    The same arguments give the same history to the bit. Gradients of all nodes are computed at once (`torch.func.vmap`)
    where the model allows it, else node by node, with a line in the log that says why. Nodes go in step, so
    `exchange="asynchronous"` is simulated as "overlapped"; see `simulate_asynchronous` for nodes that do not.

    Args:
        gossip: The configuration.
        make_model: Makes a model of one node. Without buffers (BatchNorm's statistics) and with one floating dtype.
        batches: From a step, counted from 0, to tensors (n, batch, ...) with a node's batch in each row; see
            `NodeBatches`.
        steps: Of the optimizer.
        optimizer: Makes a torch optimizer of parameters; it gets one tensor (n, d) with a node's parameters in each
            row, so it must treat each element by itself, as SGD and Adam do.
        loss: `loss(model, batch)`, the mean over one node's batch; cross-entropy of (inputs, labels) if left out.
        evaluate: `evaluate(model)` gives named numbers of one node's model.
        evaluate_every: In steps; the last step always is evaluated.
        initial: "same" starts all nodes from one model, "different" each from its own.
        seed: Of the models: node i's is made after `torch.manual_seed(seed + i)`; and of what they draw in training.
        scheduler: Makes a learning-rate scheduler, which steps after each step.
        progress: Called with each row of the history.

    Raises:
        ConfigError: A value breaks its rule, or does not fit the graph or the number of nodes.
        CompatibilityError: The model cannot be simulated.
    """
    check_count("steps", steps, low=1, remedy="use 1000")
    check_count("evaluate_every", evaluate_every, low=1, remedy="use 10")
    check_choice("initial", initial, ("same", "different"))
    nodes = len(batches(0)[0])
    around = gossip.surroundings(nodes)
    models = []
    with torch.random.fork_rng(devices=[]):
        for node in range(nodes):
            torch.manual_seed(seed + (node if initial == "different" else 0))
            models.append(make_model())
    model = models[0]
    _check(model)
    parameters = trained(model, "gossip")
    places = layout(parameters)
    rows = torch.stack([flatten(list(trained(each, "gossip").values())) for each in models])
    del models
    exchange = SimulatedExchange(gossip.graphs, nodes, rows.device)
    weights = nn.Parameter(rows)
    steps_taken = optimizer([weights])
    schedule = None if scheduler is None else scheduler(steps_taken)
    all_nodes = Participant(gossip, around, [rows], [[place.segment for place in places]], exchange.perform)
    gradients = _Gradients(model, list(parameters), places, loss or cross_entropy)
    history = GossipHistory(names=list(parameters))
    for step in range(steps):
        batch = batches(step)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + nodes + step)  # of dropout and the like
            weights.grad = gradients(rows, batch)
        all_nodes.gradients_([weights.grad])
        lr = steps_taken.param_groups[0]["lr"]
        steps_taken.step()
        moments = [] if gossip.optimizer_state == "keep" else _moments(steps_taken, weights)
        all_nodes.stepped_([weights.data], [lr], moments)
        if schedule is not None:
            schedule.step()
        if (step + 1) % evaluate_every == 0 or step + 1 == steps:
            if step + 1 == steps:
                all_nodes.settle_([weights.data])
            row = {
                "step": float(step + 1),
                "bytes_sent": float(exchange.bytes_sent),
                "consensus_distance": _distance(weights.data),
            }
            if (ratio := all_nodes.variance_ratio) is not None:
                row["variance_ratio"] = ratio
            if evaluate is not None:
                row.update(
                    _evaluated(
                        model, parameters, {place.segment.name: place.view(weights.data) for place in places}, evaluate
                    )
                )
            history.rows.append(row)
            if progress is not None:
                progress(row)
    history.models = weights.data
    return history


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """The mean over (inputs, labels)."""
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)


class _WithLoss(nn.Module):
    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Batch) -> Tensor:
        return self._loss(self.model, batch)


class _Gradients:
    """(n, d) of (n, d), node by node or all at once."""

    def __init__(self, model: nn.Module, names: list[str], places: list[Place], loss: Loss) -> None:
        self._whole = _WithLoss(model, loss)
        self._names, self._places = names, places
        self._at_once = True

    def __call__(self, rows: Tensor, batch: Batch) -> Tensor:
        tensors = {f"model.{place.segment.name}": place.view(rows.detach()) for place in self._places}
        if self._at_once:
            try:
                found = vmap(grad(self._loss_at), randomness="different")(tensors, batch)
                return torch.cat([found[name].reshape(len(rows), -1) for name in tensors], 1)
            except Exception as error:  # whatever a model does that vmap cannot
                self._at_once = False
                _log.info("gradients are computed node by node: %s", in_a_line(error))
        each = [
            grad(self._loss_at)({name: tensor[node] for name, tensor in tensors.items()}, tuple(b[node] for b in batch))
            for node in range(len(rows))
        ]
        return torch.stack([torch.cat([found[name].reshape(-1) for name in tensors]) for found in each])

    def _loss_at(self, tensors: dict[str, Tensor], batch: Batch) -> Tensor:
        value: Tensor = functional_call(self._whole, tensors, (batch,))
        return value


def _check(model: nn.Module) -> None:
    parameters = trained(model, "gossip")
    if not parameters:
        raise CompatibilityError("the model must have parameters that are trained, got none")
    if len(dtypes := {parameter.dtype for parameter in parameters.values()}) > 1:
        raise CompatibilityError(
            f"a simulated model must have parameters of one dtype, got {sorted(map(str, dtypes))}; convert it, or "
            "train on real ranks"
        )
    if names := [name for name, _ in model.named_buffers()]:
        raise CompatibilityError(
            f"a simulated model must have no buffers, got {names[0]!r}; use GroupNorm or LayerNorm, or train on "
            "real ranks"
        )


def _moments(optimizer: torch.optim.Optimizer, weights: Tensor) -> list[Tensor]:
    state = optimizer.state.get(weights, {})
    return [each for each in state.values() if isinstance(each, Tensor) and each.shape == weights.shape]


def _distance(rows: Tensor) -> float:
    return float((rows - rows.mean(0)).double().square().sum(1).mean().sqrt())


@torch.no_grad()
def _evaluated(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    rows: Mapping[str, Tensor],
    evaluate: Callable[[nn.Module], Mapping[str, float]],
) -> dict[str, float]:
    count = len(next(iter(rows.values())))
    totals: dict[str, float] = {}
    mode = model.training
    model.eval()
    for node in range(count):
        for name, parameter in parameters.items():
            parameter.copy_(rows[name][node])
        for name, value in evaluate(model).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    model.train(mode)
    if taken := sorted(totals.keys() & {"step", "bytes_sent", "consensus_distance", "variance_ratio"}):
        raise ConfigError(f"evaluate must use other names than the history's own, got {taken[0]!r}; rename it")
    return {name: total / count for name, total in totals.items()}

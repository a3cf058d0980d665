"""Many workers in one process: the same fragments and rounds as on real ranks, without ranks and clocks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from distopt.config import check_count
from distopt.errors import CompatibilityError, ConfigError, NonFiniteGradientError
from distopt.local.configuration import LocalSteps
from distopt.local.fragment import Fragment, partition
from distopt.local.inner_steps import AtOnce, Batch, InnerSteps, Loss, MakeOptimizer, MakeScheduler, OneByOne
from distopt.local.rounds import first_step_of, round_of, sent_after, taken_after, under_way

_OWN_NAMES = ("step", "round", "loss", "bytes_sent", "bytes_dense")


@dataclass
class LocalHistory:
    """What happened.

    Attributes:
        rows: One for each evaluation: "step" (inner steps of a worker), "round" (how many are complete), "loss" (mean
            over the workers and the steps since the last row), "bytes_sent" (encoded by all workers so far),
            "bytes_dense" (the same in fp32), and the named numbers of `evaluate` for the model that all share.
        model: With the shared parameters at the end, and the workers' mean buffers.
        theta: (d,) float32, the same parameters one behind the other.
        models: (n, d) float32, each worker's own at the end.
        residuals: (n, d) float32, what each has not sent; zeros for DiLoCo.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    model: nn.Module = field(default_factory=nn.Module)
    theta: Tensor = field(default_factory=lambda: torch.empty(0))
    models: Tensor = field(default_factory=lambda: torch.empty(0))
    residuals: Tensor = field(default_factory=lambda: torch.empty(0))

    def first_step(self, name: str, at_least: float) -> int | None:
        """The step of the first evaluation in which a number was that high; None if none was."""
        return next((int(row["step"]) for row in self.rows if row.get(name, float("-inf")) >= at_least), None)


def simulate(
    algorithm: LocalSteps,
    *,
    make_model: Callable[[], nn.Module],
    batches: Callable[[int], Batch],
    steps: int,
    optimizer: MakeOptimizer,
    loss: Loss | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    evaluate_every: int | None = None,
    seed: int = 0,
    scheduler: MakeScheduler | None = None,
    taking_part: Callable[[int], Sequence[int]] | None = None,
    outer_lr: Callable[[int], float] | None = None,
    at_once: bool | None = None,
    progress: Callable[[Mapping[str, float]], None] | None = None,
) -> LocalHistory:
    """Trains a worker for each row of a batch, all in this process.

    The same arguments give the same history to the bit. All workers begin with one model. What is under way after the
    last step is taken in; steps behind the last complete round have not moved the shared model yet.

    Args:
        algorithm: `SparseLoCo(...)` or `DiLoCo(...)`.
        make_model: Makes the model, after `torch.manual_seed(seed)`.
        batches: From a step, counted from 0, to tensors (n, batch, ...) with a worker's batch in each row, such as
            `distopt.gossip.NodeBatches` makes.
        steps: Inner steps of each worker.
        optimizer: Makes a worker's torch optimizer of its parameters, any.
        loss: `loss(model, batch)`, the mean over one worker's batch; cross-entropy of (inputs, labels) if left out.
        evaluate: `evaluate(model)` gives named numbers of the model that all share.
        evaluate_every: In steps; at the end of each round if left out. The last step always is evaluated.
        seed: Of the model, and of what the workers draw in training.
        scheduler: Makes a worker's learning-rate scheduler, which steps after each of its steps.
        taking_part: From a round, counted from 0, to the numbers of the workers that take part; all if left out. Who
            does not stands still, and comes back with the shared model and an empty residual.
        outer_lr: From a round to its outer learning rate, instead of the configuration's.
        at_once: Whether all workers step at once, by `torch.func.vmap` and with one optimizer of tensors (n, ...) that
            must treat each element by itself; else one worker after the other. If left out: where it is the same up to
            rounding and pays, which is for small models.
        progress: Called with each row of the history.

    Raises:
        ConfigError: A value breaks its rule.
        CompatibilityError: The model has no parameters that are trained, or cannot step at once.
        NonFiniteGradientError: A worker's model holds NaN or Inf.
    """
    check_count("steps", steps, low=1, remedy="use 1000")
    if evaluate_every is not None:
        check_count("evaluate_every", evaluate_every, low=1, remedy="leave it out for the end of each round")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model()
        first = batches(0)
    if not _trained(model):
        raise CompatibilityError("the model must have parameters that are trained, got none")
    if at_once and (taking_part is not None or list(model.buffers())):
        raise CompatibilityError(
            "at_once=True needs a model without buffers and workers that all take part, got "
            f"{'taking_part' if taking_part is not None else 'buffers'}; leave at_once out"
        )
    if at_once is None:
        with torch.random.fork_rng(devices=[]):
            at_once = taking_part is None and AtOnce.suits(model, optimizer, loss or cross_entropy, first)
    kind = AtOnce if at_once else OneByOne
    inner = kind(model, len(first[0]), optimizer, scheduler, loss or cross_entropy)
    crew = _Crew(algorithm, model, inner, outer_lr)
    history = LocalHistory(model=model)
    losses: list[float] = []
    with torch.random.fork_rng(devices=[]):
        for step in range(1, steps + 1):
            round = round_of(algorithm, step - 1)
            if first_step_of(algorithm, round) == step - 1:
                crew.begin_round_(_present(taking_part, round, len(crew.workers)))
            torch.manual_seed(seed + step)  # of dropout and the like
            losses += crew.step_(first if step == 1 else batches(step - 1))
            crew.exchange_(step)
            ends_round = first_step_of(algorithm, round + 1) == step
            if step == steps or (ends_round if evaluate_every is None else step % evaluate_every == 0):
                if step == steps:
                    crew.settle_(step)
                row = {
                    "step": float(step), "round": float(round + ends_round), "loss": sum(losses) / len(losses),
                    "bytes_sent": float(crew.bytes_sent), "bytes_dense": float(crew.bytes_dense),
                }  # fmt: skip
                losses.clear()
                if evaluate is not None:
                    row.update(_evaluated(crew.shared_(), evaluate))
                history.rows.append(row)
                if progress is not None:
                    progress(row)
    history.model = crew.shared_()
    history.theta = torch.cat([each.theta for each in crew.lead])
    history.models = torch.stack([torch.cat([_flat(each) for each in worker.parts]) for worker in crew.workers])
    history.residuals = torch.stack([worker.residual() for worker in crew.workers])
    return history


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """The mean over (inputs, labels)."""
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)


class _Worker:
    """One worker's parameters and fragments, and where it was when a fragment that is under way was sent."""

    def __init__(self, parameters: list[Tensor], indices: Sequence[range], fragments: Sequence[Fragment]) -> None:
        self.parts = [[parameters[i] for i in own] for own in indices]
        self.fragments = fragments
        self.sent: dict[int, Tensor] = {}

    def residual(self) -> Tensor:
        return torch.cat([torch.zeros_like(f.theta) if f.residual is None else f.residual for f in self.fragments])

    def contribute_(self, number: int) -> Tensor:
        local = _flat(self.parts[number])
        self.sent[number] = local
        return self.fragments[number].contribute_(local)

    def follow_(self, number: int, *, at_once: bool) -> None:
        """Takes what the outer step has made of a fragment; what was learned since it was sent stays."""
        theta, sent = self.fragments[number].theta, self.sent.pop(number)
        _unflatten_(self.parts[number], theta if at_once else theta + (_flat(self.parts[number]) - sent))

    def restart_(self) -> None:
        """Comes back after a round that was missed."""
        for part, fragment in zip(self.parts, self.fragments, strict=True):
            _unflatten_(part, fragment.theta)
            if fragment.residual is not None:
                fragment.residual.zero_()


class _Crew:
    """All workers, and what is under way between them."""

    def __init__(
        self,
        algorithm: LocalSteps,
        model: nn.Module,
        inner: InnerSteps,
        outer_lr: Callable[[int], float] | None,
    ) -> None:
        parameters = _trained(model)
        sizes = [each.numel() for each in parameters]
        indices = partition(sizes, algorithm.fragments)
        self._algorithm, self._shared, self._inner, self._outer_lr = algorithm, model, inner, outer_lr
        self.lead = [
            Fragment(algorithm, [sizes[i] for i in own], _flat([parameters[i] for i in own])) for own in indices
        ]
        self.workers = [_Worker(own, indices, [each.twin() for each in self.lead]) for own in inner.parameters]
        self._present = list(range(len(self.workers)))
        self._gathered: dict[int, tuple[Tensor, int]] = {}
        self.bytes_sent = self.bytes_dense = 0

    def begin_round_(self, present: list[int]) -> None:
        for number in present:
            if number not in self._present:
                worker = self.workers[number]
                worker.restart_()
                worker.sent = {each: self.lead[each].theta.clone() for each in self._gathered}
        for number in set(self._present) - set(present):
            self.workers[number].sent.clear()
        self._present = present

    def step_(self, batch: Batch) -> list[float]:
        return self._inner.step_(self._present, batch)

    @torch.no_grad()
    def exchange_(self, step: int) -> None:
        for each in taken_after(self._algorithm, step):
            if each.sent < step:
                self._take_(each.fragment, each.round, at_once=False)
        for each in sent_after(self._algorithm, step):
            self._send_(each.fragment)
            if each.taken == step:
                self._take_(each.fragment, each.round, at_once=True)
        if (
            self._algorithm.buffers == "average"
            and first_step_of(self._algorithm, round_of(self._algorithm, step)) == step
        ):
            self._average_buffers_()

    @torch.no_grad()
    def settle_(self, step: int) -> None:
        """Takes in what is under way."""
        for each in under_way(self._algorithm, step):
            self._take_(each.fragment, each.round, at_once=False)

    def _send_(self, number: int) -> None:
        lead = self.lead[number]
        rows = []
        for each in self._present:
            try:
                rows.append(self.workers[each].contribute_(number))
            except NonFiniteGradientError as error:
                raise NonFiniteGradientError(f"worker {each}: {error}") from error
        self.bytes_sent += len(rows) * lead.nbytes
        self.bytes_dense += len(rows) * 4 * lead.theta.numel()
        gathered = torch.stack(rows)
        self._gathered[number] = (gathered.sum(0) if lead.reduces else gathered, len(rows))

    def _take_(self, number: int, round: int, *, at_once: bool) -> None:
        gathered, num_workers = self._gathered.pop(number)
        self.lead[number].take_(
            gathered, num_workers, outer_lr=None if self._outer_lr is None else self._outer_lr(round)
        )
        for each in self._present:
            self.workers[each].follow_(number, at_once=at_once)

    def _average_buffers_(self) -> None:
        for same in self._buffers():
            if same[0].is_floating_point():
                mean = torch.stack(same).mean(0)
                for each in same:
                    each.copy_(mean)

    def _buffers(self) -> list[tuple[Tensor, ...]]:
        """Each of the model's, of those who take part."""
        return list(zip(*(self._inner.buffers[each] for each in self._present), strict=True))

    @torch.no_grad()
    def shared_(self) -> nn.Module:
        """The model that all share, with the mean of the buffers of those who take part."""
        _unflatten_(_trained(self._shared), torch.cat([each.theta for each in self.lead]))
        for own, theirs in zip(self._shared.buffers(), self._buffers(), strict=True):
            own.copy_(torch.stack(theirs).mean(0) if own.is_floating_point() else theirs[0])
        return self._shared


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [each for each in model.parameters() if each.requires_grad]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """(d,) float32, a copy."""
    return torch.cat([each.detach().reshape(-1).float() for each in tensors])


@torch.no_grad()
def _unflatten_(tensors: Sequence[Tensor], vector: Tensor) -> None:
    for tensor, part in zip(tensors, vector.split([each.numel() for each in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def _present(taking_part: Callable[[int], Sequence[int]] | None, round: int, num_workers: int) -> list[int]:
    if taking_part is None:
        return list(range(num_workers))
    present = sorted(set(taking_part(round)))
    if not present or present[0] < 0 or present[-1] >= num_workers:
        raise ConfigError(
            f"taking_part must give one or more workers from 0 to {num_workers - 1}, got {present} for round {round}; "
            "let at least one take part"
        )
    return present


@torch.no_grad()
def _evaluated(model: nn.Module, evaluate: Callable[[nn.Module], Mapping[str, float]]) -> dict[str, float]:
    mode = model.training
    model.eval()
    found = {name: float(value) for name, value in evaluate(model).items()}
    model.train(mode)
    if taken := sorted(found.keys() & set(_OWN_NAMES)):
        raise ConfigError(f"evaluate must use other names than the history's own, got {taken[0]!r}; rename it")
    return found

"""A batch that grows: what `AdaptiveBatch(...).attach(...)` returns.

A test costs some passes over the gradient in its step. What the ranks add up for it travels while the next step is
computed, and counts from that step's end on.
"""

import collections
import contextlib
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distopt.batch import estimator
from distopt.batch.fitness import check_beside, check_sampler, largest_batch, sampler_of
from distopt.batch.probe import Probe
from distopt.batch.sampler import StepPlan
from distopt.batch.scaled_rates import ScaledRates
from distopt.batch.sums import DenseSums, ProbeSums, Sums, from_probe, is_finite
from distopt.comm import agree
from distopt.errors import CompatibilityError, DesyncError, DistoptError, StateMismatchError
from distopt.gradients import Observable
from distopt.spans import span
from distopt.step_clock import Scaler, StepClock
from distopt.version import __version__

if TYPE_CHECKING:
    from distopt.batch.configuration import AdaptiveBatch

_log = logging.getLogger("distopt")
_FORMAT = 1
_GRADIENTS_PER_TEST = 20  # a test costs up to a tenth of a short step
_ROUNDS_PER_PROBE = 4  # a probe may be as large as what a sparse outer step sends


class BatchController:
    """Made by `AdaptiveBatch(...).attach(...)`; see there for arguments and errors. Also a context manager.

    ::

        for micro_batches in batch.steps():
            for inputs, targets in micro_batches:
                batch.backward(loss_fn(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()

    Attributes:
        algorithm: The configuration at work.
        start_batch: Samples of a step at the start, over all ranks.
        max_batch: Likewise at most: `max_batch` of the configuration, or the data set where it is smaller.
    """

    family: ClassVar = "batch"

    def __init__(
        self,
        algorithm: "AdaptiveBatch",
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: Any,
        *,
        beside: Observable | None,
        scaler: Scaler | None,
    ) -> None:
        self.algorithm = algorithm
        self._model = getattr(model, "_orig_mod", model)  # of torch.compile
        self._loader = loader
        self._beside = beside
        group: dist.ProcessGroup | None = getattr(beside, "process_group", None)
        problem: DistoptError | None = None
        own: dict[str, Any] = {}
        try:
            check_beside(beside, group)
            self._sampler = sampler_of(loader)
            self._num_ranks = 1 if group is None else group.size()
            check_sampler(self._sampler, self._model, 0 if group is None else group.rank(), self._num_ranks)
            self.start_batch = self._sampler.batch_size
            self.max_batch = largest_batch(algorithm.max_batch, self._sampler, self._num_ranks)
            own = self._facts()
        except DistoptError as error:
            problem = error
        if group is not None:
            agree(own, problem, group, getattr(beside, "device", torch.device("cpu")))
        elif problem is not None:
            raise problem

        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        device = self._parameters[0].device
        self._is_dense = beside is not None and beside.makes_dense_mean
        self._sums: DenseSums | ProbeSums
        if self._is_dense and self._num_ranks > 1 and algorithm.test != "coordinate":
            self._sums = DenseSums(self._parameters, projects=algorithm.test == "augmented", device=device)
        else:
            probe = Probe(self._parameters, size=algorithm.probe, seed=self._sampler.seed)
            self._sums = ProbeSums(probe, device=device)
        local_steps = beside is not None and beside.family != "ddp"
        self._averages_locally = local_steps  # then a rank's gradient is the mean over its own samples
        per_round = 1 if isinstance(self._sums, DenseSums) else _ROUNDS_PER_PROBE
        usual = per_round if local_steps else _GRADIENTS_PER_TEST
        self._every = algorithm.every or usual
        if self._num_ranks == 1:
            self._every = max(self._every, 2)  # a test needs two gradients

        self._averages = estimator.Averages(algorithm.ema)
        self._steps = self._begun_steps = 0
        self._begun_samples = 0
        self._gradients = self._tests = self._dropped = self._grown = 0
        self._bytes_sent = 0
        self._seconds = 0.0
        # The samples of the latest steps: as many of them as a gradient is made of.
        inner_steps = getattr(getattr(beside, "algorithm", None), "inner_steps", 1)
        self._recent: collections.deque[int] = collections.deque(maxlen=inner_steps)
        self._told_at = 0  # steps when a gradient was told of last
        self._heard: tuple[float, int] | None = None  # samples of a rank, and steps, of the gradient that is told of
        self._is_heard = False
        self._first: tuple[Tensor, Tensor, float] | None = None  # one rank: the first of two gradients
        self._pending: Callable[[], tuple[Sums, int]] | None = None
        self._arrived: tuple[dict[str, float], int] | None = None
        self._needed: float | None = None
        self._factor = 1.0
        self._weight = 1.0
        self._weighs = True  # whether the step's losses have been weighted
        self._plan: StepPlan | None = None
        self._rates = ScaledRates(optimizer)
        self._handles: list[Any] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        if beside is not None:
            self._handles.append(beside.observe_gradients(self))
        # Local steps of ranks differ, and so does what a scaler skips: what is collective is not left to hooks.
        self._clock = StepClock(optimizer, scaler, self._tick) if local_steps else None
        self._attached = True

    # -- the user's side ---------------------------------------------------------------------------------------------

    def steps(self, batches: Iterable[Any] | None = None) -> Iterator[Iterator[Any]]:
        """The rest of the epoch in steps of the optimizer, each an iterator over this rank's micro-batches.

        Gradients are synchronised on the last micro-batch of each, by DDP's `no_sync`.

        Args:
            batches: What yields the loader's batches in its place: the loader wrapped by a progress bar, say.

        Raises:
            CompatibilityError: A step's micro-batches were not all used, or the batches are not those of the loader; in
                the optimizer's step: the losses were not weighted, see `backward`.
        """
        source = iter(self._loader if batches is None else batches)
        nothing = object()
        while (first := next(source, nothing)) is not nothing:
            try:
                self._plan = plan = self._sampler.take()
            except IndexError as error:
                raise CompatibilityError(
                    "steps needs the batches of the loader that attach was given, got others; call steps() without them"
                ) from error
            self._begun_steps += 1
            self._begun_samples += plan.samples
            self._recent.append(plan.samples)
            self._weighs = False
            micro_batches = self._micro_batches(plan, first, source)
            yield micro_batches
            if not self._sampler.is_between_steps:
                raise CompatibilityError(
                    f"all {plan.micro_batches} micro-batches of a step must be used before the next one, got a loop "
                    "that has left some; go through each of them, or take a smaller batch"
                )
            micro_batches.close()  # out of no_sync, if the loop over them was left at the last
        self._sampler.end_epoch()
        self._plan = None

    def backward(self, loss: Tensor, **options: Any) -> None:
        """`loss.backward()`, weighted so that the step's gradient is the mean over all of its samples.

        Args:
            loss: The mean over the samples of a micro-batch, scaled by a GradScaler where there is one.
            options: Of `Tensor.backward`.
        """
        (loss * self.weight).backward(**options)

    @property
    def weight(self) -> float:
        """What `backward` multiplies the micro-batch's loss by, for a loop that calls another backward."""
        self._weighs = True
        return self._weight

    @property
    def batch_size(self) -> int:
        """Samples of a step over all ranks, from the first step on that no loader has begun to fetch."""
        return self._sampler.batch_size

    @property
    def noise_scale(self) -> float | None:
        """TrS over the squared norm of G, in samples, averaged over tests; None before the first, inf where G is 0."""
        values = self._averages.values
        return estimator.noise_scale(values["trace"], values["square"]) if values else None

    @property
    def rank(self) -> int:
        """Of this process."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def step(self) -> int:
        """Steps of the optimizer, those before a checkpoint included."""
        return self._steps

    def stats(self) -> dict[str, Any]:
        """Numbers of this rank, without a collective; those before a checkpoint included, but for bytes and seconds.

        `batch_size`, `micro_batch` (of a rank) and `accumulation` (micro-batches of a step) as they are now, `samples`
        (of all ranks, handed out), `tests`, `dropped` (that say nothing: Inf, NaN), `grown` (how often), `noise_scale`,
        `trace` and `square` (trS and the squared norm of G, averages), `needed` (the batch that just passes the test),
        `learning_rate_factor` (of the latest step), `bytes_sent` (for tests) and `seconds_testing`.
        """
        values = self._averages.values
        micro = self._sampler.micro_batch
        return {
            "algorithm": self.algorithm.name,
            "test": self.algorithm.test,
            "beside": "" if self._beside is None else self._beside.family,
            "steps": self._steps,
            "samples": self._begun_samples,
            "batch_size": self.batch_size,
            "micro_batch": micro,
            "accumulation": -(-self.batch_size // (self._num_ranks * micro)),
            "start_batch": self.start_batch,
            "max_batch": self.max_batch,
            "tests": self._tests,
            "dropped": self._dropped,
            "grown": self._grown,
            "noise_scale": self.noise_scale,
            "trace": values.get("trace"),
            "square": values.get("square"),
            "needed": self._needed,
            "learning_rate_factor": self._factor,
            "bytes_sent": self._bytes_sent,
            "seconds_testing": self._seconds,
        }

    def notes(self) -> dict[str, float]:
        """What is written beside the numbers of another attachment: `samples`, `batch_size` and `noise_scale`."""
        found: dict[str, float] = {"samples": self._begun_samples, "batch_size": self.batch_size}
        return found if self.noise_scale is None else {**found, "noise_scale": self.noise_scale}

    def state_dict(self) -> dict[str, Any]:
        """The state, the same on every rank, to be taken between steps. Waits for a test that is under way.

        Not a collective: one rank alone may take and keep it, but beside local steps, where each has its own.
        """
        self._fetch()
        return {
            "format": _FORMAT,
            "test": self.algorithm.test,
            "start_batch": self.start_batch,
            "step": self._steps,
            "counts": [self._gradients, self._tests, self._dropped, self._grown],
            "begun": [self._begun_samples, self._begun_steps, self._told_at, *self._recent],
            "averages": [self._averages.count, dict(self._averages.values)],
            "hearing": self._hearing(),
            "arrived": None if self._arrived is None else [dict(self._arrived[0]), self._arrived[1]],
            "first": None if self._first is None else [self._first[0].clone(), self._first[1].clone(), self._first[2]],
            "needed": self._needed,
            "sampler": self._sampler.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes a state back, the sampler's included: the next iteration of the loader goes on behind its last step.

        Raises:
            StateMismatchError: It is of another test or of other data.
        """
        for name, own in (("format", _FORMAT), ("test", self.algorithm.test)):
            if (saved := state_dict.get(name)) != own:
                raise StateMismatchError(
                    f"the state of a batch and this run must agree in {name}, got {saved!r} then and {own!r} now; load "
                    "it into the configuration that it was saved from"
                )
        self._fetch()
        self._sampler.load_state_dict(state_dict["sampler"])
        self.start_batch = int(state_dict["start_batch"])
        self._steps = int(state_dict["step"])
        self._gradients, self._tests, self._dropped, self._grown = map(int, state_dict["counts"])
        self._begun_samples, self._begun_steps, self._told_at, *recent = map(int, state_dict["begun"])
        self._recent.clear()
        self._recent.extend(recent)
        self._averages.count, values = state_dict["averages"]
        self._averages.values = dict(values)
        arrived = state_dict["arrived"]
        self._arrived = None if arrived is None else (dict(arrived[0]), int(arrived[1]))
        first, device = state_dict["first"], self._parameters[0].device
        self._first = None if first is None else (first[0].to(device), first[1].to(device), float(first[2]))
        self._needed = state_dict["needed"]
        self._is_heard, self._heard = False, None
        if (hearing := state_dict["hearing"]) is not None:
            self._heard = (float(hearing[0]), int(hearing[1]))
            self._sums.load(int(hearing[2]), hearing[3])

    def detach(self) -> None:
        """Stops testing and growing; the sampler keeps its size. Not a collective."""
        if self._attached:
            try:
                self._fetch()
            finally:
                self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.detach()
        elif self._attached:  # what is under way may never arrive
            self._release()

    def _release(self) -> None:
        self._attached = False
        self._pending = None
        self._rates.restore()
        for handle in self._handles:
            handle.remove()
        if self._clock is not None:
            self._clock.stop()

    def _hearing(self) -> list[Any] | None:
        """Of a gradient that has been told of in part: fragments of a round are sent one after the other."""
        if self._clock is None or self._heard is None:
            return None
        return [*self._heard, self._test_number, [tensor.clone() for tensor in self._sums.tensors()]]

    # -- what an attachment tells, see GradientObserver --------------------------------------------------------------

    def begin(self) -> bool:
        """See `GradientObserver.begin`."""
        self._is_heard = False
        self._gradients += 1
        steps = min(self._begun_steps - self._told_at, len(self._recent))
        self._told_at = self._begun_steps
        self._heard = (sum(list(self._recent)[-steps:]) / self._num_ranks, steps)
        is_whole = self._plan is not None and steps > 0  # else it is from outside of the loop
        if is_whole and not self._averages_locally:
            assert self._plan is not None
            is_whole = self._plan.samples % self._num_ranks == 0  # in the last step of an epoch shares may differ
        is_due = self._gradients % self._every == 0
        if self._num_ranks == 1 and not is_due:
            is_due = (self._gradients + 1) % self._every == 0  # the first of two
        if is_whole and is_due:
            with self._timed():
                self._sums.clear(self._test_number)
        else:
            self._heard = None
        return is_whole and is_due

    @property
    def _test_number(self) -> int:
        """Of the test that the gradient belongs to; one rank takes two for each."""
        return (self._gradients + (self._num_ranks == 1)) // self._every

    def local(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """See `GradientObserver.local`."""
        with self._timed(), span("batch", "test"):
            self._sums.local(parameters, gradients)

    def mean(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """See `GradientObserver.mean`."""
        with self._timed(), span("batch", "test"):
            self._sums.mean(parameters, gradients)

    def end(self) -> None:
        """See `GradientObserver.end`."""
        self._is_heard = True

    # -- steps -------------------------------------------------------------------------------------------------------

    def _micro_batches(self, plan: StepPlan, first: Any, source: Iterator[Any]) -> Generator[Any, None, None]:
        sizes = plan.sizes(self._sampler.rank, self._num_ranks)
        whole = sum(sizes) if self._averages_locally else plan.samples / self._num_ranks
        for number, size in enumerate(sizes):
            is_last = number == len(sizes) - 1
            try:
                micro_batch = next(source) if number else first
            except StopIteration:
                raise CompatibilityError(
                    f"a step has {len(sizes)} micro-batches, got the end of the batches behind {number}; call steps() "
                    "without batches, and break out of the loop over steps to end early"
                ) from None
            self._weight = size / whole
            if is_last:
                self._sampler.handed_out()
            with contextlib.nullcontext() if is_last else self._no_sync():
                yield micro_batch

    def _no_sync(self) -> contextlib.AbstractContextManager[Any]:
        """What keeps gradients from being exchanged; nothing where the model itself exchanges none."""
        no_sync = getattr(self._model, "no_sync", contextlib.nullcontext)
        context: contextlib.AbstractContextManager[Any] = no_sync()
        return context

    def _before_step(self, *_: Any) -> None:
        if not self._weighs:  # with one micro-batch all would be well, until the batch grows
            raise CompatibilityError(
                "a step's gradient must be the mean over all of its samples, got one whose losses were not weighted; "
                "use batch.backward(loss) in place of loss.backward(), or multiply the loss by batch.weight"
            )
        if self._beside is None and self.begin():
            found = [(p, p.grad) for p in self._parameters if p.grad is not None]
            self.local([p for p, _ in found], [g for _, g in found if g is not None])
            self.end()
        if self._clock is None:
            self._turn()
        self._factor = self._learning_rate_factor()
        self._rates.scale(self._factor)

    def _after_step(self, *_: Any) -> None:
        self._rates.restore()
        if self._clock is None:
            self._steps += 1

    def _tick(self) -> None:
        """Behind each local step, and behind the exchange that it may have made."""
        self._steps += 1
        self._turn()

    def _turn(self) -> None:
        """Once in each step: the test of an earlier gradient counts, that of a new one begins."""
        self._fetch()
        self._take_in()
        self._ask()

    def _learning_rate_factor(self) -> float:
        rule, values = self.algorithm.learning_rate, self._averages.values
        if rule is None or self._plan is None or (rule.needs_noise and not values):
            return 1.0
        var = max(0.0, values.get("trace", 0.0)) / self.start_batch
        sqr = max(0.0, values.get("square", 0.0))
        return rule.factor(self._plan.batch_size, self.start_batch, var=var, sqr=sqr)

    # -- tests -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began

    def _ask(self) -> None:
        """Begins to add up what has been heard, if a whole gradient has."""
        if not self._is_heard:
            return
        assert self._heard is not None
        self._is_heard = False
        samples, steps = self._heard
        self._heard = None
        with self._timed(), span("batch", "test"):
            if isinstance(self._sums, DenseSums):
                self._pending = self._ask_dense(self._sums, samples, steps)
            elif self._num_ranks > 1:
                self._pending = self._ask_probe(self._sums, samples, steps)
            else:
                self._pair(self._sums, samples, steps)

    def _ask_dense(self, sums: DenseSums, samples: float, steps: int) -> Callable[[], tuple[Sums, int]]:
        own = sums.summands()
        total = torch.cat([own.new_tensor([self.batch_size]), own])
        wait = self._add_up(total)

        def arrive() -> tuple[Sums, int]:
            num_ranks = wait()
            self._check_batch(float(total[0]), num_ranks)
            return sums.sums(total[1:], num_ranks, samples), steps

        return arrive

    def _ask_probe(self, sums: ProbeSums, samples: float, steps: int) -> Callable[[], tuple[Sums, int]]:
        row, coordinate = sums.row, self.algorithm.test == "coordinate"
        scalars = torch.stack([row.new_tensor(self.batch_size), sums.square.float(), torch.dot(row, row)])
        total = torch.cat([scalars, row, *([row.square()] if coordinate else [])])
        wait = self._add_up(total)
        projection: Tensor | None = None
        if self.algorithm.test == "augmented":
            # Waited for here, as its second sum needs the first one. Both are asked for at the optimizer's step, where
            # all ranks are: one alone may take a state_dict, which then must not be a collective.
            num_gradients = wait()
            self._check_batch(float(total[0]), num_gradients)
            mean = total[3 : 3 + row.numel()].double() / num_gradients
            projection = torch.dot(row.double(), mean).square().view(1)
            wait = self._add_up(projection)

        def arrive() -> tuple[Sums, int]:
            num_ranks = wait()
            batch, squares, probe_squares = total[:3].tolist()
            self._check_batch(batch, num_ranks)
            found = from_probe(
                total[3 : 3 + row.numel()] / num_ranks,
                num_gradients=num_ranks,
                samples=samples,
                squares=squares,
                probe_squares=probe_squares,
                projections=0.0 if projection is None else float(projection),
                coordinate_squares=total[3 + row.numel() :] if coordinate else None,
            )
            return found, steps

        return arrive

    def _pair(self, sums: ProbeSums, samples: float, steps: int) -> None:
        """One rank: a test of this gradient and the one before it."""
        if self._gradients % self._every:
            self._first = (sums.row, sums.square, samples)
            return
        first, self._first = self._first, None
        if first is None or first[2] != samples:  # the batch has grown between the two
            return
        rows = torch.stack([first[0], sums.row])
        mean = rows.mean(0)
        found = from_probe(
            mean,
            num_gradients=2,
            samples=samples,
            squares=float(first[1] + sums.square),
            probe_squares=float(rows.double().square().sum()),
            projections=float((rows.double() @ mean.double()).square().sum()),
            coordinate_squares=rows.square().sum(0) if self.algorithm.test == "coordinate" else None,
        )
        self._arrived = (found.quantities(self.algorithm.test), steps)

    def _add_up(self, total: Tensor) -> Callable[[], int]:
        assert self._beside is not None
        self._bytes_sent += total.numel() * total.element_size()
        return self._beside.add_up(total)

    def _fetch(self) -> None:
        """Waits for the test that is under way; it counts at the next step."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with self._timed(), span("batch", "test"):
                sums, steps = pending()
                self._arrived = (sums.quantities(self.algorithm.test), steps)

    def _take_in(self) -> None:
        """Counts the test that has arrived, and grows the batch if it says so."""
        arrived, self._arrived = self._arrived, None
        if arrived is None:
            return
        quantities, steps = arrived
        if not is_finite(quantities):
            self._dropped += 1
            return
        self._tests += 1
        self._averages.add(quantities)
        self._needed = self.algorithm.needed(self._averages.values) / steps
        if not self._averages.is_settled:
            return
        before = self.batch_size
        after = estimator.grown(
            before, self._needed, growth=self.algorithm.growth, largest=self.max_batch, multiple=self._num_ranks
        )
        if after > before:
            self._grow(after)

    def _grow(self, batch_size: int) -> None:
        """First by more micro-batches, then by larger ones."""
        self._grown += 1
        micro = max(self._sampler.micro_batch, -(-batch_size // (self._num_ranks * self.algorithm.max_accumulation)))
        self._sampler.resize(batch_size, micro)
        _log.info("step %d: the batch grows to %d samples, %d of a rank at a time", self._steps, batch_size, micro)

    def _check_batch(self, total: float, num_ranks: int) -> None:
        if abs(total / num_ranks - self.batch_size) > 1e-6 * self.batch_size:  # it has travelled in float32
            raise DesyncError(
                f"every rank must have the same batch, got {self.batch_size} here and {total / num_ranks:g} on average;"
                " load the same checkpoint on every rank"
            )

    def _facts(self) -> dict[str, Any]:
        sampler = self._sampler
        return {
            "distopt version": __version__,
            "configuration": self.algorithm.to_dict(),
            "data": {
                name: getattr(sampler, name)
                for name in ("length", "seed", "shuffle", "drop_last", "batch_size", "micro_batch")
            },
            "loader": {name: getattr(self._loader, name, None) for name in ("num_workers", "prefetch_factor")},
        }

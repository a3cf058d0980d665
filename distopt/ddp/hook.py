"""The communication hook: orders the buckets of a step and decides when, and whether, they are exchanged.

Two modes. *Streaming*: each bucket is compressed and sent as soon as DDP hands it over, behind the rest of the backward
pass. *Deferred*: what needs the whole gradient before anything may change (local clipping, leaving out non-finite
steps, a GradScaler) waits for the last bucket; nothing overlaps then, and `stats()["overlap"]` says so.
"""

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.futures import Future

from distopt.comm import Channels, all_gather
from distopt.compress import Header, allgather_bytes
from distopt.ddp.arrival import check_steps
from distopt.ddp.bucket import Bucket
from distopt.ddp.exchange import Exchange
from distopt.ddp.finite import agree_on_nonfinite, describe, first_nonfinite, nonfinite_error
from distopt.ddp.inflight import future_for
from distopt.ddp.parameters import TrackedParameter, shaped_like
from distopt.ddp.peers import Peers
from distopt.ddp.plan import BucketPlan, Slot, plan_bucket
from distopt.ddp.policy import Routing, StepPolicy
from distopt.ddp.statistics import Statistics
from distopt.ddp.unused import UsageTracker
from distopt.errors import CompatibilityError, DesyncError, DistoptError, PeerLostError
from distopt.gradients import GradientObserver
from distopt.spans import span

_log = logging.getLogger("distopt")


class LossScale(Protocol):
    """The part of `torch.amp.GradScaler` that the hook needs."""

    def get_scale(self) -> float:
        """The factor that the loss, and so every gradient, is multiplied by."""


class CommHook:
    """Feed it every bucket of every step, in order, on every rank of the group.

    Args:
        tracked: All parameters that can occur in a bucket, in an order that all ranks share.
        policy: What is done with a step.
        channels: Between the ranks.
        routing: The ways between the ranks.
        scale: The loss scale in use, or None.
        usage: Watches which parameters take part; None if all always do.
        peers: Know when ranks are lost.
        makes_dense_mean: Whether what a bucket holds in the end is the mean of the gradients.

    Attributes:
        step: Completed steps; warm-up counts in these.
        sends_whole: While true, every parameter is sent whole (the off switch).
        left_out: The latest step was left out on all ranks because a gradient was not finite.
        observers: Who is told of the gradients, by number.
    """

    def __init__(
        self,
        tracked: list[TrackedParameter],
        policy: StepPolicy,
        channels: Channels,
        routing: Routing,
        *,
        scale: LossScale | None = None,
        usage: UsageTracker | None = None,
        peers: Peers | None = None,
        makes_dense_mean: bool = False,
    ) -> None:
        self._loss_scale = scale
        if policy.nonfinite == "ignore":  # then Inf may pass, and averaging does not mind the unit
            scale = None
        self.statistics = Statistics()
        self.step = 0
        self.sends_whole = False
        self.left_out = False
        self.deferred = scale is not None or policy.clip is not None or policy.nonfinite == "skip"
        # A RemovableHandle wants a dict that can be referred to weakly.
        self.observers: collections.OrderedDict[int, GradientObserver] = collections.OrderedDict()
        self._told: list[GradientObserver] | None = None  # who wants the step under way; None: nobody has been asked
        self._told_scale = 1.0
        self._telling = threading.Lock()
        self._makes_dense_mean = makes_dense_mean
        self._policy = policy
        self._channels = channels
        self._group = channels.world
        self._routing = routing
        self._scale = scale
        self._usage = usage
        self._peers = peers or Peers()
        self._exchange = Exchange(channels, self.statistics, self._peers.explain)
        self._tracked: Mapping[int, TrackedParameter] = {id(entry.parameter): entry for entry in tracked}
        self._names = [entry.name for entry in tracked]
        self._order = {entry.name: i for i, entry in enumerate(tracked)}
        self._final_densities = sorted({entry.density for entry in tracked if entry.density is not None})
        self._entries: dict[tuple[int, ...], list[TrackedParameter]] = {}
        self._plans: dict[tuple[object, ...], BucketPlan] = {}
        self._waiting: list[tuple[Bucket, BucketPlan, Future[Tensor]]] = []
        self._lock = threading.Lock()
        self._open_buckets = 0
        self._saw_last = False
        self._agreed = False
        self._refusing = False
        self._flushed_at = -2
        self._fatal: DistoptError | None = None

    def start_at(self, step: int, *, sends_whole: bool) -> None:
        """Goes on from a checkpoint: on every rank, because the next step begins with a collective that compares."""
        self.take_failure()  # of a step that no longer counts
        self.step = step
        self.sends_whole = sends_whole
        self._agreed = False
        self._flushed_at = -2
        self._exchange.forget_groups()

    def __call__(self, bucket: Bucket) -> Future[Tensor]:
        """Takes one bucket of local gradients; the future holds its buffer with the update.

        Raises:
            CompatibilityError: The host hands over something that is not a bucket, or a parameter never seen.
        """
        plan = self._plan(bucket)
        self.left_out = False
        if self._fatal is not None:
            return self._refuse(bucket)
        if not self._agreed and not self._refusing:
            self._agree_on_start(bucket.buffer().device)
        if self._refusing:
            return self._refuse(bucket)
        self._announce_flush(plan)
        with self._lock:
            self._open_buckets += 1
            self._saw_last = bucket.is_last()
        if self.observers and self._told is None:
            self._ask_observers()
        if not self.deferred:
            if self._told:
                self._tell(bucket, plan)
            # Where one pass takes the gradients in, it also finds what is not finite.
            checks = self._policy.nonfinite == "error" and not plan.takes_gradients(bucket.buffer().device)
            bad = first_nonfinite(bucket) if checks else None
            return self._send(bucket, plan, nonfinite=0 if bad is None else bad + 1)
        future = future_for(bucket)
        self._waiting.append((bucket, plan, future))
        if bucket.is_last():
            waiting, self._waiting = self._waiting, []
            self._run_deferred(waiting)
        return future

    @property
    def routing(self) -> Routing:
        """The ways between the ranks, and what chooses among them."""
        return self._routing

    def choose_by(self, predict: Callable[[BucketPlan], float]) -> None:
        """Chooses routes by another prediction from the next step on; the same on every rank."""
        self._routing = dataclasses.replace(self._routing, predict=predict)
        self._plans.clear()

    def density_of(self, entry: TrackedParameter) -> float:
        """The density of a parameter in the step under way; 1.0 sends it whole."""
        return 1.0 if entry.density is None else self._density_on_the_way_to(entry.density)

    def _density_on_the_way_to(self, final: float) -> float:
        if self.sends_whole:
            return 1.0
        return self._policy.warmup.density_at(self.step, final) if self._policy.warmup else final

    def take_failure(self) -> DistoptError | None:
        """What went wrong in the latest step, once: the error to raise where the user can catch it."""
        if self._fatal is not None:
            return self._fatal
        failure, self._exchange.failure = self._exchange.failure, None
        reports, self._exchange.nonfinite = self._exchange.nonfinite, []
        if failure is None and reports:  # buckets land in any order, the message is the same on every rank
            failure = nonfinite_error(sorted(set(reports), key=lambda r: (self._order[r.name], r.rank)))
        return failure

    def fail(self, error: DistoptError) -> None:
        """Ends the exchange for good, from any thread: open buckets and all that follow are completed with zeros.

        The error is raised at every `optimizer.step()` from now on, although the collectives never complete.
        """
        self._fatal = error
        self._exchange.abort(error)

    def _agree_on_start(self, device: torch.device) -> None:
        """Compares what sizes depend on: ranks that disagree would start collectives that do not fit each other."""
        own = torch.tensor([self.step, self.sends_whole], device=device)
        try:
            with span("ddp", "agree"):
                starts, done = all_gather(own, self._group)
                self._peers.wait(done)
            check_steps([int(step) for step, _ in starts], self.step)
            if any(bool(paused) != self.sends_whole for _, paused in starts):
                raise DesyncError(
                    "all ranks must be paused or none, got both; call pause() on every rank in the same step"
                )
        except (DesyncError, PeerLostError) as error:
            self._exchange.failure = error
            self._refusing = True
        self._agreed = not self._refusing

    def _refuse(self, bucket: Bucket) -> Future[Tensor]:
        """Completes a bucket with zeros: every rank does, and raises at `optimizer.step()`, which DDP survives."""
        future = future_for(bucket)
        future.set_result(bucket.buffer().zero_())
        waiting, self._waiting = self._waiting, []
        for earlier, _, outer in waiting:
            outer.set_result(earlier.buffer().zero_())
        if bucket.is_last():
            self._refusing = False
            self._end_step(skipped=True)
        return future

    def _announce_flush(self, plan: BucketPlan) -> None:
        """Says, once, that what sparse steps held back now goes out (of a parameter without gradient: again later)."""
        if any(slot.tracked.memory.holds_back for slot in plan.whole):
            if self.step > self._flushed_at + 1 and self._group.rank() == 0:
                _log.warning("step %d sends gradients whole again, and with them all that was held back", self.step)
            self._flushed_at = self.step

    def _plan(self, bucket: Bucket) -> BucketPlan:
        try:
            parameters, dtype = tuple(map(id, bucket.parameters())), bucket.buffer().dtype
        except AttributeError as error:
            raise CompatibilityError(
                f"a communication hook must be given a gradient bucket, got {type(bucket).__name__}; "
                'torch._dynamo.config.optimize_ddp = "python_reducer" does not give one: set it to True'
            ) from error
        entries = self._entries_of(parameters)
        densities = tuple(map(self._density_on_the_way_to, self._final_densities))
        fates = tuple([(entry.memory.holds_back, entry.memory.owes) for entry in entries])
        key = (dtype, parameters, densities, fates)
        if key not in self._plans:
            if len(self._plans) > 64 + 4 * len(self._tracked):
                self._plans.clear()  # warm-up stages and rebuilt buckets leave old ones behind
            self._plans[key] = plan_bucket(entries, dtype, self.density_of, self._policy.wire, self._routing)
        return self._plans[key]

    def _entries_of(self, parameters: tuple[int, ...]) -> list[TrackedParameter]:
        """What is known of a bucket's parameters (given by id), looked up once."""
        if parameters not in self._entries:
            try:
                found = [self._tracked[parameter] for parameter in parameters]
            except KeyError as error:
                raise CompatibilityError(
                    "a bucket holds a parameter that the model did not have at attach; detach and attach again after "
                    "changing the model"
                ) from error
            if len(self._entries) > len(self._tracked):
                self._entries.clear()  # of buckets that have been rebuilt
            self._entries[parameters] = found
        return self._entries[parameters]

    def _send(self, bucket: Bucket, plan: BucketPlan, *, nonfinite: int = 0) -> Future[Tensor]:
        unused: frozenset[Slot] = frozenset()
        used: tuple[bool, ...] = ()
        if self._usage is not None:
            unused = frozenset(slot for slot in plan.slots if not self._usage.was_used(slot.tracked.parameter))
            used = tuple(slot not in unused for slot in plan.slots)
        if not nonfinite:
            for slot in plan.decayed_locally:
                gradient = shaped_like(slot.of(bucket.buffer()), slot.tracked.parameter)
                gradient.add_(slot.tracked.parameter.detach(), alpha=slot.tracked.local_decay)
        header = Header(step=self.step, nonfinite=nonfinite, used=used)
        return self._exchange.start(bucket, plan, header, unused=unused).then(partial(self._bucket_done, bucket, plan))

    def _bucket_done(self, bucket: Bucket, plan: BucketPlan, future: Future[Tensor]) -> Tensor:
        if self._told and self._makes_dense_mean and not self._exchange.failure:
            self._tell(bucket, plan, averaged=True)
        with self._lock:
            self._open_buckets -= 1
            completed = self._saw_last and self._open_buckets == 0
        if completed:
            self._end_step(skipped=bool(self._exchange.failure or self._exchange.nonfinite))
        return future.value()

    def _ask_observers(self) -> None:
        """Once in a step: who wants its gradients."""
        self._told = [each for each in self.observers.values() if each.begin()]
        if self._told:
            self._told_scale = 1.0 if self._loss_scale is None else self._loss_scale.get_scale()

    def _tell(self, bucket: Bucket, plan: BucketPlan, *, averaged: bool = False) -> None:
        """Tells who listens of a bucket, which holds this rank's gradients or the mean."""
        buffer = bucket.buffer()
        if self._told_scale != 1.0:  # in float32: what the scale keeps from vanishing must not vanish here
            buffer = buffer.to(torch.promote_types(buffer.dtype, torch.float32)) / self._told_scale
        parameters = [slot.tracked.parameter for slot in plan.slots]
        gradients = [shaped_like(slot.of(buffer), slot.tracked.parameter) for slot in plan.slots]
        with self._telling:
            for observer in self._told or ():
                (observer.mean if averaged else observer.local)(parameters, gradients)

    def _end_step(self, *, skipped: bool) -> None:
        told, self._told = self._told, None
        if not skipped:
            for observer in told or ():
                observer.end()
        self._saw_last = False
        if self._usage is not None:
            self._usage.clear()
        self.step += not skipped
        self.statistics.end_step(skipped=skipped)

    def _run_deferred(self, waiting: list[tuple[Bucket, BucketPlan, Future[Tensor]]]) -> None:
        try:
            if self._policy.nonfinite != "ignore" and self._leave_out_if_nonfinite(waiting):
                return
        except PeerLostError as error:
            self._exchange.failure = error
            self._end_deferred(waiting, fill=0.0)
            return
        if self._told:
            for bucket, plan, _ in waiting:
                self._tell(bucket, plan)
        scale = self._scale.get_scale() if self._scale is not None else 1.0
        factor = self._clip_factor(waiting, scale) / scale
        for bucket, plan, future in waiting:
            if factor != 1.0:
                bucket.buffer().mul_(factor)
            self._send(bucket, plan).then(_hand_on(future, scale))

    def _leave_out_if_nonfinite(self, waiting: list[tuple[Bucket, BucketPlan, Future[Tensor]]]) -> bool:
        """Asks all ranks whether their whole gradient is finite; if not, ends the step with nothing changed."""
        first = None
        for bucket, plan, _ in waiting:
            position = first_nonfinite(bucket)
            if position is not None:
                first = self._order[plan.slots[position].tracked.name]
                break
        device = waiting[0][0].buffer().device
        with span("ddp", "agree"):
            reports = agree_on_nonfinite(first, self._names, self._group, device, self._peers.wait)
        status = torch.int32.itemsize
        self.statistics.add(bytes_sent=status, link_bytes_sent=allgather_bytes(self._group.size(), status))
        if not reports:
            return False
        self.left_out = True
        if self._scale is None and self._policy.nonfinite == "error":
            self._exchange.nonfinite = reports
        elif self._scale is None:
            _log.warning("step %d is left out: NaN or Inf in %s", self.step, describe(reports))
        # GradScaler looks for inf in p.grad: every rank must find it, so that all of them skip and rescale.
        self._end_deferred(waiting, fill=torch.inf if self._scale is not None else 0.0)
        return True

    def _end_deferred(self, waiting: list[tuple[Bucket, BucketPlan, Future[Tensor]]], *, fill: float) -> None:
        """Ends a step of which nothing has been sent."""
        with self._lock:
            self._open_buckets = 0
        self._end_step(skipped=True)
        for bucket, _, future in waiting:
            future.set_result(bucket.buffer().fill_(fill))

    def _clip_factor(self, waiting: list[tuple[Bucket, BucketPlan, Future[Tensor]]], scale: float) -> float:
        """Local gradient clipping: `min(1, threshold N^-1/2 / ||g||)` over the whole gradient (DGC, section 3.2)."""
        if self._policy.clip is None:
            return 1.0
        norms = [_norm(bucket.buffer()) for bucket, _, _ in waiting]
        norm = float(torch.linalg.vector_norm(torch.stack(norms))) / scale
        threshold = self._policy.clip * self._group.size() ** -0.5
        return float(min(1.0, threshold / (norm + 1e-6)))


def _norm(flat: Tensor) -> Tensor:
    """The 2-norm in float32, computed in no less than that."""
    norm: Tensor = torch.linalg.vector_norm(flat, dtype=torch.promote_types(flat.dtype, torch.float32))
    return norm.float()


def _hand_on(outer: Future[Tensor], scale: float) -> Callable[[Future[Tensor]], None]:
    """A callback that completes `outer` with the update, in scaled units where a loss scale is in use."""

    def done(inner: Future[Tensor]) -> None:
        try:
            update = inner.value()
        except Exception as error:
            outer.set_exception(error)  # type: ignore[arg-type]  # torch annotates it as a tensor
            return
        outer.set_result(update.mul_(scale) if scale != 1.0 else update)

    return done

"""One bucket through the network: on the route of its plan to the other ranks, and decoded into its buffer.

Every bucket has a future of our own, so that it can be completed although a collective never is.
"""

import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.futures import Future

from distopt.comm import Channels, KeptUntilDone
from distopt.compress import Header
from distopt.ddp.arrival import NonFiniteReport, check_steps, nonfinite_reports, write_update
from distopt.ddp.bucket import Bucket
from distopt.ddp.groups import Groups
from distopt.ddp.inflight import InFlight, future_for
from distopt.ddp.plan import BucketPlan, Slot
from distopt.ddp.routes import ROUTES
from distopt.ddp.statistics import Statistics
from distopt.errors import DistoptError
from distopt.spans import span


class Exchange:
    """Carries buckets between the ranks of a group.

    Args:
        channels: Between the ranks.
        statistics: Where to count.
        explain: What to report instead of the error of a failed collective; may take a while.

    Attributes:
        failure: The first thing that went wrong in a callback, to be raised where the user can catch it.
        nonfinite: Who reported a non-finite gradient in the step under way.
    """

    def __init__(
        self, channels: Channels, statistics: Statistics, explain: Callable[[Exception], Exception] | None = None
    ) -> None:
        self.failure: DistoptError | None = None
        self._explain = explain
        self.nonfinite: list[NonFiniteReport] = []
        self._channels = channels
        self._statistics = statistics
        self._workspaces: dict[tuple[int, int], Tensor] = {}
        self._groups: dict[BucketPlan, Groups] = {}
        self._open: set[InFlight] = set()
        self._aborted = False
        self._kept = KeptUntilDone()
        self._lock = threading.Lock()

    def start(
        self, bucket: Bucket, plan: BucketPlan, header: Header, *, unused: frozenset[Slot] = frozenset()
    ) -> Future[Tensor]:
        """Sends this rank's contribution; the future holds the bucket's buffer with the update in it.

        Args:
            bucket: Local gradients; the buffer is overwritten.
            plan: What to do with it; the same on every rank.
            header: This rank's status. With `nonfinite` set nothing of the gradient is used.
            unused: Slots that this rank's backward pass did not reach.
        """
        item = InFlight(
            bucket=bucket,
            update=self._workspace(bucket, plan),
            plan=plan,
            header=header,
            unused=unused,
            groups=self._joined(plan, bucket.buffer().device),
            future=future_for(bucket),
            began=time.perf_counter(),
        )
        with self._lock:
            aborted = self._aborted
            if not aborted:
                self._open.add(item)
        if aborted:  # while this bucket was handed over: nobody else will complete it
            item.buffer.zero_()
            item.complete()
            return item.future
        self._statistics.add(
            bytes_sent=plan.sent_bytes,
            bytes_dense=4 * plan.numel,
            link_bytes_sent=plan.link_bytes,
            link_bytes_dense=2 * (plan.num_ranks - 1) * 4 * plan.numel // plan.num_ranks,
            node_bytes_sent=plan.node_bytes,
            entries_sent=plan.count,
            buckets_sparse=plan.route not in ("whole", "dense"),
            buckets_dense=plan.route in ("whole", "dense"),
        )
        if self._channels.node is not None:
            for slot in plan.whole if plan.route == "hierarchical" else plan.slots:
                slot.tracked.memory.at_leader = False
        ROUTES[plan.route](item, self._channels, self._statistics, self._land)
        return item.future

    def forget_groups(self) -> None:
        """Joins memories anew: somebody has replaced their tensors."""
        self._groups.clear()

    def abort(self, error: DistoptError) -> None:
        """Completes every open bucket with zeros, and all that come, whatever their collectives do; keeps the error."""
        self.failure = self.failure or error
        with self._lock:
            self._aborted = True
            items, self._open = self._open, set()
        for item in items:
            item.buffer.zero_()
            item.complete()

    def _joined(self, plan: BucketPlan, device: torch.device) -> Groups:
        if plan not in self._groups:
            groups = Groups(plan, device)
            if groups.moved or len(self._groups) > 256:  # warm-up stages leave old ones behind
                self._groups.clear()
            self._groups[plan] = groups
        return self._groups[plan]

    def _land(self, item: InFlight, error: Exception | None) -> None:
        """Ends a bucket's way, in the thread of its last collective: decodes, and completes its future."""
        with self._lock:
            if item not in self._open:  # aborted meanwhile: the buffer is not ours any more
                return
        self._statistics.landed()
        if error is not None and self._explain is not None and not isinstance(error, DistoptError):
            # Takes a while, and this thread belongs to the collectives.
            threading.Thread(target=self._land_broken, args=(item, error), name="distopt broken", daemon=True).start()
            return
        began = time.perf_counter()
        try:
            if error is not None:
                raise error
            with span("ddp", "decode"):
                self._decode(item)
        except DistoptError as problem:
            # Raised at optimizer.step(): from here the user would see a bare RuntimeError.
            self.failure = self.failure or problem
            item.buffer.zero_()
        except Exception as problem:
            self._complete(item, problem)
            return
        ended = time.perf_counter()
        self._statistics.add(seconds_decoding=ended - began)
        self._statistics.took_route(item.plan.route, predicted_s=item.plan.predicted_s, measured_s=ended - item.began)
        self._complete(item)

    def _land_broken(self, item: InFlight, error: Exception) -> None:
        assert self._explain is not None
        problem = self._explain(error)
        if isinstance(problem, DistoptError):
            self.abort(problem)
        else:
            self._complete(item, problem)

    def _complete(self, item: InFlight, error: Exception | None = None) -> None:
        self._kept.keep(item, item.buffer.device)
        with self._lock:
            self._open.discard(item)
        item.complete(error)

    def _decode(self, item: InFlight) -> None:
        buffer = item.buffer
        check_steps([header.step for header in item.headers], item.header.step)
        reports = nonfinite_reports(item.plan, item.headers)
        if reports:  # of this bucket only: what becomes of the others must not depend on which one lands first
            self.nonfinite += reports
            buffer.zero_()
            return
        write_update(item)
        if item.update is not buffer:
            buffer.copy_(item.update)

    def _workspace(self, bucket: Bucket, plan: BucketPlan) -> Tensor:
        """Where the update is put together: the buffer, or for 16-bit buckets a float32 tensor that is reused."""
        buffer = bucket.buffer()
        if buffer.dtype.itemsize >= 4:
            return buffer
        key = (bucket.index(), plan.numel)
        if key not in self._workspaces:
            self._workspaces[key] = torch.empty(plan.numel, dtype=torch.float32, device=buffer.device)
        return self._workspaces[key]

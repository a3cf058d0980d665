"""One bucket on its way: what was sent of it, what is needed when it arrives, and the future that DDP waits for."""

import dataclasses
import threading
from typing import Any

from torch import Tensor
from torch.futures import Future

from distopt.compress import Header
from distopt.ddp.bucket import Bucket
from distopt.ddp.contribution import Contribution
from distopt.ddp.groups import Groups
from distopt.ddp.plan import BucketPlan, Slot


@dataclasses.dataclass(eq=False, kw_only=True)
class InFlight:
    """A bucket between its launch and its landing.

    Attributes:
        bucket: Local gradients; its buffer is overwritten with the update.
        plan: What is done with it; the same on every rank.
        header: This rank's status.
        unused: Slots that this rank's backward pass did not reach.
        groups: The joined memories.
        update: Where the update is put together: the buffer, or a wider tensor beside it.
        future: Completed when the buffer holds the update.
        began: When it was handed over, by `time.perf_counter`.
        contribution: What this rank sends.
        snapshots: A slot's memory before this step, where the step may turn out not to count.
        headers: What every rank said, in rank order; empty where nobody says anything.
        arrived: Selected entries as they came in, (bucket positions int32, values), in an order that all ranks share.
        reduced: The sum of the dense parts.
    """

    bucket: Bucket
    plan: BucketPlan
    header: Header
    unused: frozenset[Slot]
    groups: Groups
    update: Tensor
    future: Future[Tensor]
    began: float
    contribution: Contribution | None = None
    snapshots: dict[Slot, dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    headers: list[Header] = dataclasses.field(default_factory=list)
    arrived: list[tuple[Tensor, Tensor]] = dataclasses.field(default_factory=list)
    reduced: Tensor | None = None
    _cleared: bool = False
    _completed: bool = False
    _lock: Any = dataclasses.field(default_factory=threading.Lock)

    @property
    def buffer(self) -> Tensor:
        """The bucket's flat tensor."""
        return self.bucket.buffer()

    def take_snapshots(self) -> None:
        """Remembers the memories of sparse slots that perhaps no rank's backward pass has reached."""
        for slot in self.unused:
            if slot.k:
                self.snapshots[slot] = slot.tracked.memory.snapshot()

    @property
    def takes(self) -> bool:
        """Whether gradients are checked and cleared in the pass that takes them in."""
        return self.plan.takes_gradients(self.buffer.device)

    def found_nonfinite(self, position: int) -> None:
        """Notes in the header that the gradient of the slot at this position must not be used."""
        self.header = dataclasses.replace(self.header, nonfinite=position + 1)

    def gradients_are_taken(self) -> None:
        """Notes that the buffer's sparse slots are zero, and whole ones no longer needed."""
        self._cleared = self.update is self.buffer

    def clear_update(self) -> None:
        """Sets the update to zero, once. From then on the gradient is gone."""
        if not self._cleared:
            self._cleared = True
            self.update.zero_()

    def complete(self, error: Exception | None = None) -> bool:
        """Completes the future, once; False if that has been done."""
        with self._lock:
            if self._completed:
                return False
            self._completed = True
        if error is None:
            self.future.set_result(self.buffer)
        else:
            self.future.set_exception(error)  # type: ignore[arg-type]  # torch annotates it as a tensor
        return True


def future_for(bucket: Bucket) -> Future[Tensor]:
    """A future that can hold the bucket's buffer."""
    return Future(devices=[bucket.buffer().device] if bucket.buffer().is_cuda else None)

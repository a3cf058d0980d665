"""The samples of each step, whose number may change from one step to the next while a loader is at work.

The sampler plans whole steps: each takes the next samples of the epoch's order (one permutation for all ranks), deals
them out to the ranks, and splits a rank's share into micro-batches of as equal a size as can be. A change of size
counts from the first step that is not begun: a loader whose workers fetch ahead has drawn some batches by then. No
sample of an epoch is lost or seen twice, whatever the sizes.

Limits: samples are equal in cost; every rank must have as much of each step, so that ranks end an epoch together.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sized
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import IterableDataset, Sampler

from distopt.config import check_count, check_switch
from distopt.errors import ConfigError, StateMismatchError

_FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One step of the optimizer.

    Attributes:
        start: The first of its samples, as a position in the epoch's order.
        samples: How many, over all ranks.
        micro_batches: In how many parts each rank takes its share.
        batch_size: How many were wanted: the last step of an epoch takes what is left.
    """

    start: int
    samples: int
    micro_batches: int
    batch_size: int

    def share(self, rank: int, num_replicas: int) -> int:
        """Samples of one rank; the first ranks have one more where they do not come out even."""
        return (self.samples - rank + num_replicas - 1) // num_replicas

    def sizes(self, rank: int, num_replicas: int) -> list[int]:
        """Of one rank's micro-batches."""
        whole, more = divmod(self.share(rank, num_replicas), self.micro_batches)
        return [whole + (i < more) for i in range(self.micro_batches)]


class GrowingBatchSampler(Sampler[list[int]]):
    """A batch sampler for `DataLoader(dataset, batch_sampler=...)`, distributed and seeded, whose batch size can grow.

    Without a controller it gives batches of `batch_size`, as a `DistributedSampler` does, but neither repeats nor drops
    samples: where they do not come out even, ranks differ by one in the last step of an epoch.

    Args:
        data: The data set, or its length.
        batch_size: Samples of one rank in a step at the start.
        num_replicas: Ranks; those of the default process group if left out, 1 without one.
        rank: Which of them this is; likewise.
        shuffle: Whether every epoch has an order of its own.
        seed: Of these orders; the same on every rank.
        drop_last: Leaves the last step of an epoch out where fewer samples are left than it needs.

    Raises:
        ConfigError: A value breaks its rule; the data set has no length, not a sample for each rank, or with
            `drop_last` not those of one step.
    """

    def __init__(
        self,
        data: Sized | int,
        *,
        batch_size: int,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        check_count("batch_size", batch_size, low=1, remedy="use 32: samples of one rank in a step")
        check_count("seed", seed, low=0, remedy="use 0")
        check_switch("shuffle", shuffle)
        check_switch("drop_last", drop_last)
        default = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        self.num_replicas = default[0] if num_replicas is None else num_replicas
        self.rank = default[1] if rank is None else rank
        check_count("num_replicas", self.num_replicas, low=1, remedy="leave it out to ask the process group")
        check_count("rank", self.rank, low=0, remedy="leave it out to ask the process group")
        if self.rank >= self.num_replicas:
            raise ConfigError(
                f"rank must be below num_replicas, got {self.rank} of {self.num_replicas}; leave both out"
            )
        self.length = _length_of(data)
        if self.length < self.num_replicas:
            raise ConfigError(
                f"the data set must have a sample for each rank, got {self.length} for {self.num_replicas} ranks; use "
                "fewer ranks"
            )
        if drop_last and self.length < self.num_replicas * batch_size:
            raise ConfigError(
                f"with drop_last the data set must have the samples of a step, got {self.length} for "
                f"{self.num_replicas} ranks of {batch_size}: no step would be left; use drop_last=False, or a smaller "
                "batch_size"
            )
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.batch_size = self.num_replicas * batch_size  # of a step, over all ranks
        self.micro_batch = batch_size  # of one rank, at most
        self.at_least = 1  # samples of a micro-batch; normalisation over a batch needs two
        self.epoch = 0
        self._position = 0  # of the first step that has not been handed out
        self._over = False
        self._steered = False  # a controller says how far the epoch is; a loader that fetches ahead does not know
        self._planned: collections.deque[StepPlan] = collections.deque()  # begun, in order
        self._current: StepPlan | None = None
        self._again: collections.deque[StepPlan] = collections.deque()  # of a checkpoint: begun then

    def resize(self, batch_size: int, micro_batch: int) -> None:
        """Counts from the first step that is not begun.

        Args:
            batch_size: Samples of a step over all ranks, a multiple of their number.
            micro_batch: The most that one rank takes at a time.
        """
        assert batch_size % self.num_replicas == 0
        self.batch_size, self.micro_batch = batch_size, micro_batch

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order. Not needed: epochs follow each other. The epoch under way goes on where it is."""
        check_count("epoch", epoch, low=0, remedy="count epochs from 0")
        if epoch != self.epoch or self._over:
            self._begin(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        if self._over:
            self._begin(self.epoch + 1)
        order = self._order()
        self._planned.clear()
        self._current = None
        start, again = self._position, collections.deque(self._again)
        while True:
            plan = again.popleft() if again else self._plan(start)
            if plan is None:
                self._over = self._over or not self._steered
                return
            self._planned.append(plan)
            start = plan.start + plan.samples
            own = order[plan.start : start][self.rank :: self.num_replicas]
            for part in own.split(plan.sizes(self.rank, self.num_replicas)):
                yield part.tolist()

    def __len__(self) -> int:
        """Micro-batches that are left of the epoch, at the size of now."""
        count, start = sum(plan.micro_batches for plan in self._again), self._position
        if self._again:
            start = self._again[-1].start + self._again[-1].samples
        start = 0 if self._over else start
        whole = max(0, (self.length - start) // self.batch_size - 2)  # those behind them may differ
        if whole:
            first = self._plan(start)
            assert first is not None
            count += whole * first.micro_batches
            start += whole * self.batch_size
        while (plan := self._plan(start)) is not None:
            count += plan.micro_batches
            start += plan.samples
        return count

    # -- for the controller ------------------------------------------------------------------------------------------

    def take(self) -> StepPlan:
        """The plan of the step whose first micro-batch a loader has handed out just now."""
        self._current = self._planned.popleft()
        self._steered, self._over = True, False
        return self._current

    def handed_out(self) -> None:
        """The last micro-batch of that step has been handed out: a checkpoint from now on goes on behind it."""
        assert self._current is not None
        if self._again and self._again[0] == self._current:
            self._again.popleft()
        self._position = self._current.start + self._current.samples
        self._current = None

    @property
    def is_between_steps(self) -> bool:
        """Whether all micro-batches of the steps taken have been handed out."""
        return self._current is None

    def end_epoch(self) -> None:
        """All of the epoch has been handed out."""
        self._steered, self._over = False, True

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, the same on every rank: the steps handed out, and the sizes of those begun."""
        begun = [*([] if self._current is None else [self._current]), *self._planned]
        begun += [plan for plan in self._again if not begun or plan.start > begun[-1].start]
        return {
            "format": _FORMAT,
            "length": self.length,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "num_replicas": self.num_replicas,
            "epoch": self.epoch,
            "position": self._position,
            "over": self._over,
            "batch_size": self.batch_size,
            "micro_batch": self.micro_batch,
            "begun": [[plan.start, plan.samples, plan.micro_batches, plan.batch_size] for plan in begun],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from there at the next iteration, also in the middle of an epoch and with another number of ranks.

        With another number of ranks the size of a step is rounded up to a multiple of it.

        Raises:
            StateMismatchError: The state is of other data or another order.
        """
        for name, own in (
            ("format", _FORMAT), ("length", self.length), ("seed", self.seed), ("shuffle", self.shuffle),
            ("drop_last", self.drop_last),
        ):  # fmt: skip
            if (saved := state_dict.get(name)) != own:
                raise StateMismatchError(
                    f"the sampler's state and this run must agree in {name}, got {saved!r} then and {own!r} now; give "
                    "the sampler the same data and settings"
                )
        self._begin(int(state_dict["epoch"]))
        self._position, self._over = int(state_dict["position"]), bool(state_dict["over"])
        batch_size = -(-int(state_dict["batch_size"]) // self.num_replicas) * self.num_replicas
        self.resize(batch_size, int(state_dict["micro_batch"]))
        if state_dict["num_replicas"] == self.num_replicas:
            self._again.extend(
                StepPlan(start=start, samples=samples, micro_batches=parts, batch_size=size)
                for start, samples, parts, size in state_dict["begun"]
            )

    def _begin(self, epoch: int) -> None:
        self.epoch, self._position, self._over = epoch, 0, False
        self._planned.clear()
        self._again.clear()
        self._current = None

    def _order(self) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.length)
        return torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed + self.epoch))

    def _plan(self, start: int) -> StepPlan | None:
        """The step that begins there, of the size of now; None at the end of the epoch."""
        left = self.length - start
        samples = min(self.batch_size, left)
        if samples < self.batch_size and (self.drop_last or samples < self.num_replicas):
            return None
        if left - samples < self.num_replicas * self.at_least and not self.drop_last:
            samples = left  # too few are left for a step of their own
        most, least = -(-samples // self.num_replicas), samples // self.num_replicas
        micro_batches = max(1, min(-(-most // self.micro_batch), least // self.at_least))
        return StepPlan(start=start, samples=samples, micro_batches=micro_batches, batch_size=self.batch_size)


def _length_of(data: Sized | int) -> int:
    if isinstance(data, IterableDataset):
        raise ConfigError(
            f"a batch size can change only where samples are chosen by number, got {type(data).__name__}, an iterable "
            "data set, which yields them by itself; use a data set with __getitem__ and __len__"
        )
    if isinstance(data, int):
        check_count("the length of the data set", data, low=1, remedy="give the data set itself")
        return data
    try:
        return len(data)
    except TypeError as error:
        raise ConfigError(
            f"the data set must have a length, got {type(data).__name__} without one; give its length in its place"
        ) from error

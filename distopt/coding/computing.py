"""What a worker computes: for each task the gradient of the sum of its parts' losses, the same on whoever computes it.

Every part has random numbers of its own: torch's, numpy's and Python's generators are seeded by (seed, step, part)
while its loss is computed, so dropout and augmentation do not depend on the worker, and they are put back afterwards.
"""

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distopt.coding.answer import NUM_PROJECTIONS, Answer, TaskResult
from distopt.coding.data_parts import Batches, DataPart, part_of
from distopt.coding.flat import FlatModel
from distopt.coding.parity import fingerprint
from distopt.coding.scheme import Task
from distopt.errors import CompatibilityError
from distopt.spans import span

# The SUM of the losses of a part's samples; with its number of samples where `part.samples` is None.
PartLoss = Callable[[DataPart], "Tensor | tuple[Tensor, float]"]


class Computation:
    """The worker's side of a scheme: parts, their losses and gradients.

    Args:
        models: The models; job t is for model t modulo their number.
        weights: (parts,) the fraction of the samples in each part.
        batches: Which samples a step takes; None if the loss finds its own.
        seed: Of the parts' random numbers.
    """

    def __init__(
        self, models: Sequence[FlatModel], weights: NDArray[np.float64], batches: Batches | None, seed: int
    ) -> None:
        self.models = models
        self._weights = weights
        self._batches = batches
        self._seed = seed

    def part(self, job: int, index: int) -> DataPart:
        """One part of one job's data."""
        samples = None
        if self._batches is not None:
            samples = part_of(self._batches.indices(job), self._weights, index)
        return DataPart(job, index, len(self._weights), samples, job % len(self.models))

    def answer(
        self,
        tasks: Sequence[Task],
        parameters: Mapping[int, list[Tensor]] | None,
        loss: PartLoss,
        interrupted: Callable[[], bool],
    ) -> Answer | None:
        """The results of a round's tasks; None if `interrupted` said so between two parts.

        Args:
            tasks: What to compute.
            parameters: The flat parameters of each job in the tasks; None if the models hold them.
            loss: Of one part.
            interrupted: Whether nobody waits for the result any more.
        """
        began = time.perf_counter()
        results = []
        with span("coding", "gradient"):
            for task in tasks:
                flat = self.models[task.job % len(self.models)]
                if parameters is not None:
                    flat.write(parameters[task.job])
                flat.clear_gradients()
                total_loss = total_count = 0.0
                for chunk, coefficient in task.row:
                    if interrupted():
                        flat.clear_gradients()
                        return None
                    value, count = self.backward(self.part(task.job, chunk), loss, coefficient)
                    total_loss += coefficient * value
                    total_count += coefficient * count
                vectors, used = flat.read_gradients()
                flat.clear_gradients()
                results.append(TaskResult(total_loss, total_count, projections(vectors), vectors, used))
        return Answer(time.perf_counter() - began, results)

    def backward(self, part: DataPart, loss: PartLoss, coefficient: float = 1.0) -> tuple[float, float]:
        """Adds the part's gradient times the coefficient to `p.grad`; returns the loss and the number of samples."""
        if part.samples is not None and not len(part.samples):
            return 0.0, 0.0  # fewer samples than parts
        with self.seeded(part):
            value, count = self.loss_of(part, loss)
            (value if coefficient == 1.0 else coefficient * value).backward()
        return value.item(), count

    def loss_of(self, part: DataPart, loss: PartLoss) -> tuple[Tensor, float]:
        """The loss of a part and its number of samples.

        Raises:
            CompatibilityError: It is not the scalar that the rules ask for.
        """
        returned = loss(part)
        value, count = returned if isinstance(returned, tuple) else (returned, None)
        if count is None:
            if part.samples is None:
                raise CompatibilityError(
                    "without batches the loss of a part must say how many samples it is of; return (loss, number), or "
                    "give attach(batches=Batches(len(data), batch_size))"
                )
            count = len(part.samples)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise CompatibilityError(
                f"the loss of a part must be one number, the sum over its samples, got {shape}; use reduction='sum'"
            )
        return value, float(count)

    @contextlib.contextmanager
    def seeded(self, part: DataPart) -> Iterator[None]:
        """Random numbers that belong to the part, and not to the worker."""
        seed = int(np.random.SeedSequence((self._seed, part.step, part.index)).generate_state(1)[0])
        numpy_state, python_state = np.random.get_state(), random.getstate()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            try:
                yield
            finally:
                np.random.set_state(numpy_state)
                random.setstate(python_state)


def projections(vectors: Sequence[Tensor]) -> tuple[float, ...]:
    """The fingerprint of several flat tensors together: linear, the sum of the fingerprints of each."""
    total = sum(fingerprint(vector, NUM_PROJECTIONS, seed=index) for index, vector in enumerate(vectors))
    return tuple(np.asarray(total).tolist())

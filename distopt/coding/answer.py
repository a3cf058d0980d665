"""What a worker sends back for one round, and its form as a message. See `distopt.coding.orders` for the other way."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from distopt.comm import Message, TensorSpec
from distopt.errors import DecodeError

NUM_PROJECTIONS = 2  # of each result's fingerprint


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """The result of one task.

    Attributes:
        loss: The sum of coefficient * loss over the task's parts.
        count: The sum of coefficient * number of samples.
        fingerprint: Of the vectors.
        vectors: The sum of coefficient * gradient, a flat tensor per dtype of the model.
        used: (parameters,) uint8, 1 for each that has a gradient.
    """

    loss: float
    count: float
    fingerprint: tuple[float, ...]
    vectors: list[Tensor]
    used: Tensor


@dataclasses.dataclass(frozen=True)
class Answer:
    """The results of one round's tasks, in their order.

    Attributes:
        compute_s: Seconds that the worker computed.
        results: One for each task.
    """

    compute_s: float
    results: list[TaskResult]


def to_message(kind: int, round: int, sender: int, answer: Answer) -> Message:
    """The answer as a message."""
    scalars = [[result.loss, result.count, *result.fingerprint] for result in answer.results]
    used = torch.stack([result.used for result in answer.results])
    vectors = [vector for result in answer.results for vector in result.vectors]
    return Message(
        kind, round, sender, (torch.tensor(scalars, dtype=torch.float64), used, *vectors), (answer.compute_s,)
    )


def specs(num_tasks: int, num_parameters: int, vectors: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The tensors of an answer to so many tasks."""
    return [
        TensorSpec((num_tasks, 2 + NUM_PROJECTIONS), torch.float64),
        TensorSpec((num_tasks, num_parameters), torch.uint8),
        *(list(vectors) * num_tasks),
    ]


def from_message(message: Message, num_tasks: int, num_parameters: int, vectors: Sequence[TensorSpec]) -> Answer:
    """The answer in a message.

    Raises:
        DecodeError: The message has not the shape of an answer to so many tasks.
    """
    expected = specs(num_tasks, num_parameters, vectors)
    found = [TensorSpec(tuple(tensor.shape), tensor.dtype) for tensor in message.tensors]
    if found != expected or len(message.numbers) != 1:
        raise DecodeError(f"an answer to {num_tasks} tasks has tensors {expected}, got {found}")
    scalars, used, *flats = message.tensors
    results = []
    for i, (loss, count, *projections) in enumerate(scalars.tolist()):
        own = flats[i * len(vectors) : (i + 1) * len(vectors)]
        results.append(TaskResult(loss, count, tuple(projections), own, used[i]))
    return Answer(message.numbers[0], results)

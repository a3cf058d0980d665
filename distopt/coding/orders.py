"""What a master tells its workers, as messages: parameters of a job, the tasks of a round, and when a loop is over.

Parameters and tasks are messages of their own: the parameters of a job are one frame that all workers are sent, the
tasks are small and differ. Between two ranks messages keep their order, so parameters are there before their tasks.
"""

import enum
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distopt.coding.scheme import Task
from distopt.comm import Message
from distopt.errors import DecodeError

_REASON_CHARACTERS = 5_000  # at most 12 bytes each in JSON, which every transport of a training carries


class Kind(enum.IntEnum):
    """What a message is."""

    HELLO = 1  # worker: who I am
    WELCOME = 2  # master: you may begin, or why not
    PARAMETERS = 3  # master: of the job that `round` names
    TASKS = 4  # master: of a round
    ANSWER = 5  # worker: to a round's tasks
    SKIPPED = 12  # worker: a round's tasks, for newer ones
    DONE = 6  # master: the loop is over, and `round` comes next
    SEEN = 7  # worker: so it is
    FAILED = 8  # worker: I do not go on, and why
    END = 9  # master: no more of anything; with a text if it failed
    SLICE = 10  # sharded: a slice of a coded gradient
    DECODED = 11  # sharded: a slice of the gradient


def tasks_message(round: int, sender: int, tasks: Sequence[Task]) -> Message:
    """The tasks of one worker in one round."""
    jobs = torch.tensor([task.job for task in tasks], dtype=torch.int64)
    lengths = torch.tensor([len(task.row) for task in tasks], dtype=torch.int64)
    chunks = torch.tensor([chunk for task in tasks for chunk, _ in task.row], dtype=torch.int64)
    coefficients = torch.tensor([c for task in tasks for _, c in task.row], dtype=torch.float64)
    return Message(Kind.TASKS, round, sender, (jobs, lengths, chunks, coefficients))


def tasks_of(message: Message) -> list[Task]:
    """The tasks in a message.

    Raises:
        DecodeError: It does not hold tasks.
    """
    shapes = [tensor.dim() == 1 for tensor in message.tensors]
    if shapes != [True] * 4:
        raise DecodeError(f"a message of tasks has 4 flat tensors, got {[tuple(t.shape) for t in message.tensors]}")
    jobs, lengths, chunks, coefficients = (tensor.tolist() for tensor in message.tensors)
    if len(jobs) != len(lengths) or sum(lengths) != len(chunks) or len(chunks) != len(coefficients):
        raise DecodeError(f"tasks for {len(jobs)} jobs do not fit {len(chunks)} chunks in rows of {lengths}")
    tasks, at = [], 0
    for job, length in zip(jobs, lengths, strict=True):
        row = zip(chunks[at : at + length], coefficients[at : at + length], strict=True)
        tasks.append(Task(job, tuple(row)))
        at += length
    return tasks


def text_message(kind: int, round: int, sender: int, content: Any, tensors: Sequence[Tensor] = ()) -> Message:
    """A message with something that JSON can hold, and tensors behind it."""
    text = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
    return Message(kind, round, sender, (text, *tensors))


def reason_message(kind: int, round: int, sender: int, reason: str) -> Message:
    """A message that says why somebody ends; what is too long for a frame is cut off."""
    return text_message(kind, round, sender, reason[:_REASON_CHARACTERS])


def text_of(message: Message) -> Any:
    """What `text_message` was given.

    Raises:
        DecodeError: It is not JSON.
    """
    try:
        return json.loads(bytes(message.tensors[0].tolist()))
    except (IndexError, TypeError, ValueError) as error:
        raise DecodeError(f"message of kind {message.kind} holds no text: {error}") from error

"""Broadcasts and replies as Flower's records: arrays in numpy's format, numbers, and one text. Nothing is unpickled.

A compressed reply travels as its payloads (`distopt.federated.UplinkCompression`), uint8.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from distopt.errors import DecodeError, in_a_line
from distopt.federated import Broadcast, Layout, Reply
from distopt.integrations.flower.job import Job
from distopt.ops import all_finite

MODEL = "model"
ROUND = "distopt"
EXTRAS = "extras"
TENSORS = "tensors"
NUMBERS = "numbers"


def to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """A record of tensors; their dtype must be one that numpy has."""
    record = ArrayRecord()
    for name, tensor in tensors.items():
        record[name] = Array(tensor.detach().cpu().contiguous().numpy())
    return record


def from_arrays(record: ArrayRecord) -> dict[str, Tensor]:
    """The tensors of a record.

    Raises:
        DecodeError: What is in it is no array.
    """
    try:
        return {name: torch.from_numpy(array.numpy()) for name, array in record.items()}
    except Exception as error:  # whatever numpy makes of bytes that somebody else wrote
        raise DecodeError(
            f"a record must hold arrays in numpy's format, got one that does not ({in_a_line(error)})"
        ) from error


def write_broadcast(broadcast: Broadcast, job: Job, *, saved: int, run: str) -> RecordDict:
    """A broadcast for clients that know nothing yet.

    Args:
        broadcast: Of the server.
        job: Of all.
        saved: The version that the server can fall back to: clients keep what they need to go on from there.
        run: Names the strategy, of which a server app may have several one after the other.
    """
    content = RecordDict(
        {
            MODEL: to_arrays({MODEL: broadcast.model}),
            ROUND: ConfigRecord({"version": broadcast.version, "saved": saved, "run": run, "job": job.to_text()}),
        }
    )
    if broadcast.extras:
        content[EXTRAS] = to_arrays(broadcast.extras)
    return content


def read_broadcast(content: RecordDict, layout: Layout) -> Broadcast:
    """The broadcast in a message.

    Raises:
        DecodeError: It is none, or none for this model.
    """
    try:
        version = content.config_records[ROUND]["version"]
        model = from_arrays(content.array_records[MODEL])[MODEL]
    except KeyError as error:
        raise DecodeError(f"a broadcast must have {error}, got one without; use FederatedStrategy") from error
    extras = from_arrays(content.array_records[EXTRAS]) if EXTRAS in content.array_records else {}
    if not isinstance(version, int) or model.shape != (layout.num_elements,) or model.dtype != layout.dtype:
        raise DecodeError(
            f"the broadcast model must be {layout.num_elements} elements of {layout.dtype}, got {tuple(model.shape)} "
            f"of {model.dtype}; server and clients must make the same model"
        )
    return Broadcast(version=version, model=model, extras=extras)


def write_reply(reply: Reply, job: Job) -> RecordDict:
    """A reply as it travels; one that is not finite as it is, because 16-bit payloads would make it finite."""
    tensors = dict(reply.tensors)
    if job.uplink is not None and reply.num_samples and all(all_finite(t.contiguous()) for t in tensors.values()):
        # What `compress` left are at most as many entries as a payload has, rounded: it takes them all, exactly.
        tensors |= {name: job.uplink.send(tensors[name])[0] for name in job.uplink.compressed(job.algorithm)}
    numbers = MetricRecord()
    numbers.update({"num-examples": reply.num_samples, "num-steps": reply.num_steps, "version": reply.version})
    return RecordDict({TENSORS: to_arrays(tensors), NUMBERS: numbers})


def read_reply(content: RecordDict, job: Job, layout: Layout, client: int) -> Reply:
    """The reply in a message of a client.

    Raises:
        DecodeError: It is none.
    """
    try:
        numbers = {name: content.metric_records[NUMBERS][name] for name in ("version", "num-examples", "num-steps")}
        tensors = from_arrays(content.array_records[TENSORS])
    except KeyError as error:
        raise DecodeError(f"a reply must have {error}, got one without") from error
    version, num_samples, num_steps = numbers.values()
    if not (isinstance(version, int) and isinstance(num_samples, int) and isinstance(num_steps, int)):
        raise DecodeError(f"the numbers of a reply must be integers, got {numbers}")
    reply = Reply(client=client, version=version, num_samples=num_samples, num_steps=num_steps, tensors=tensors)
    return reply if job.uplink is None else _opened(reply, job, layout)


def _opened(reply: Reply, job: Job, layout: Layout) -> Reply:
    assert job.uplink is not None
    tensors = dict(reply.tensors)
    try:
        for name in job.uplink.compressed(job.algorithm):
            if tensors[name].dtype == torch.uint8:
                tensors[name] = job.uplink.receive(tensors[name], layout.num_trained, layout.dtype)
        reply = replace(reply, tensors=tensors)
        return replace(reply, wire_bytes=job.uplink.reply_bytes(job.algorithm, reply))
    except (RuntimeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DecodeError(f"a reply must hold payloads of {layout.num_trained} elements, got {error}") from error

"""A reply on its way: compressed vectors as their payloads, everything else as it is.

A client's `Reply` holds what the server will see, compressed and taken apart again, so packing it once more loses
nothing. One that is not finite travels as it is: 16-bit payloads would make it finite, and the server has to refuse it.
"""

from dataclasses import replace

import torch
from torch import Tensor

from distopt.errors import DecodeError
from distopt.federated.algorithm import FederatedAlgorithm
from distopt.federated.messages import Reply
from distopt.federated.network.letters import Answer
from distopt.federated.uplink import UplinkCompression
from distopt.ops import all_finite


def pack(
    reply: Reply, algorithm: FederatedAlgorithm, uplink: UplinkCompression | None, *, sender: int, session: str
) -> Answer:
    """The reply as a letter."""
    whole = uplink is None or reply.num_samples == 0
    if uplink is None or whole or not all(all_finite(tensor.contiguous()) for tensor in reply.tensors.values()):
        return Answer(sender=sender, session=session, reply=reply)
    names = uplink.compressed(algorithm)
    tensors = {name: uplink.send(t)[0] if name in names else t for name, t in reply.tensors.items()}
    packed = replace(reply, tensors=tensors)
    return Answer(sender=sender, session=session, reply=packed, packed=frozenset(names))


def unpack(
    answer: Answer,
    algorithm: FederatedAlgorithm,
    uplink: UplinkCompression | None,
    *,
    num_trained: int,
    dtype: torch.dtype,
) -> Reply:
    """The reply in a letter; whether its tensors fit the model is for the server to say.

    Raises:
        DecodeError: A payload is none of such a vector, or nothing was to be packed.
    """
    reply = answer.reply
    if uplink is None:
        if answer.packed:
            raise DecodeError(f"replies of this job are not compressed, got {sorted(answer.packed)} as payloads")
        return reply
    if answer.packed and answer.packed != set(uplink.compressed(algorithm)):
        raise DecodeError(f"payloads must be of {uplink.compressed(algorithm)}, got {sorted(answer.packed)}")

    def opened(name: str, tensor: Tensor) -> Tensor:
        return uplink.receive(tensor, num_trained, dtype) if name in answer.packed else tensor

    try:
        reply = replace(reply, tensors={name: opened(name, tensor) for name, tensor in reply.tensors.items()})
        return replace(reply, wire_bytes=uplink.reply_bytes(algorithm, reply))
    except (RuntimeError, IndexError, KeyError) as error:
        raise DecodeError(f"a payload does not describe a vector of {num_trained} elements: {error}") from error

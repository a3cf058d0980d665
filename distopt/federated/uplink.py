"""Compressed replies: each client sends the largest entries of what it has to say, and keeps the rest for later.

    a = v + unsent;  sent = the k entries of largest magnitude of a, rounded;  unsent = a - sent

so nothing is lost, only late (error feedback; Seide et al., *1-bit Stochastic Gradient Descent*, Interspeech 2014; for
top-k Stich et al., *Sparsified SGD with Memory*, NeurIPS 2018). Payloads are those of `distopt.compress`.

Limits: what is unsent belongs to a model of some rounds ago, and a client that comes rarely brings it late. What was
in a reply that the server refuses is lost. Broadcasts are not compressed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distopt.compress import INDEX_FORMATS, WIRE_DTYPES, Header, PayloadLayout, round_to_wire
from distopt.config import Configurable, check_choice, check_density, check_switch
from distopt.federated.algorithm import FederatedAlgorithm
from distopt.federated.messages import DELTA, Reply
from distopt.ops import all_finite, topk_abs

_UNSENT = "unsent "


@dataclass(frozen=True, kw_only=True)
class UplinkCompression(Configurable, tag="uplink", name="top-k"):
    """How clients' vectors travel up.

    Args:
        density: Fraction of the entries that are sent, at least one; 1 sends all, without positions.
        values: Dtype of the values on the wire, "fp32", "fp16" or "bf16".
        indices: Format of the positions, "int32", "block16" or "elias-fano".
        error_feedback: Whether clients keep what was not sent.

    Raises:
        ConfigError: A value breaks its rule.
    """

    density: float = 0.01  # lower: fewer bytes, later news
    values: str = "fp16"  # fp32 loses nothing to rounding, for twice the bytes
    indices: str = "block16"
    error_feedback: bool = True  # False forgets what was not sent, which biases

    def __post_init__(self) -> None:
        check_density("density", self.density)
        check_choice("values", self.values, tuple(WIRE_DTYPES))
        check_choice("indices", self.indices, tuple(INDEX_FORMATS))
        check_switch("error_feedback", self.error_feedback)

    def kept(self, algorithm: FederatedAlgorithm) -> tuple[str, ...]:
        """Names of the vectors (d,) that each client keeps for this."""
        return tuple(_UNSENT + name for name in self.compressed(algorithm)) if self.error_feedback else ()

    def compressed(self, algorithm: FederatedAlgorithm) -> tuple[str, ...]:
        """Names of the vectors (d,) of a reply that travel compressed."""
        return (DELTA, *(name for name in algorithm.sends if name not in algorithm.sends_whole))

    def reply_bytes(self, algorithm: FederatedAlgorithm, reply: Reply) -> int:
        """How many bytes such a reply is on the wire; 0 for one of no samples."""
        if reply.num_samples == 0:
            return 0
        names = self.compressed(algorithm)
        whole = sum(tensor.nbytes for name, tensor in reply.tensors.items() if name not in names)
        return whole + sum(self.layout(reply.tensors[name].numel()).nbytes for name in names)

    def layout(self, numel: int) -> PayloadLayout:
        """Of the payload of a vector of so many entries."""
        count = max(1, round(self.density * numel)) if self.density < 1 else 0
        return PayloadLayout(
            numel=numel,
            count=count,
            num_flags=0,
            value_dtype=WIRE_DTYPES[self.values],
            index_format=INDEX_FORMATS[self.indices],
            num_dense=0 if count else numel,
            dense_dtype=WIRE_DTYPES[self.values],
        )

    def send(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """The payload of a vector (d,), uint8, and what of it was not sent, (d,)."""
        layout = self.layout(vector.numel())
        if not layout.count:
            values, error = round_to_wire(vector, layout.dense_dtype)
            nothing = torch.empty(0, dtype=torch.int32)
            payload = layout.pack(Header(step=0), nothing, nothing.to(layout.value_dtype), values)
            return payload, torch.zeros_like(vector) if error is None else error
        selected, indices = topk_abs(vector, layout.count)
        values, error = round_to_wire(selected, layout.value_dtype)
        unsent = vector.clone()
        unsent[indices.long()] = 0.0 if error is None else error
        return layout.pack(Header(step=0), indices, values), unsent

    def receive(self, payload: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """(numel,), the vector that a payload describes, zeros where nothing was sent.

        Raises:
            DecodeError: It is no payload of such a vector.
        """
        layout = self.layout(numel)
        layout.unpack_header(payload)
        if not layout.count:
            return layout.unpack_dense(payload).to(dtype)
        indices, values = layout.unpack(payload)
        vector = torch.zeros(numel, dtype=dtype)
        vector[indices.long()] = values.to(dtype)
        return vector

    def compress(
        self, algorithm: FederatedAlgorithm, reply: Reply, kept: Mapping[str, Tensor]
    ) -> tuple[Reply, Mapping[str, Tensor]]:
        """A reply as the server gets it, and what the client keeps then.

        A reply of no samples, which counts for nothing, sends nothing; one that is not finite, which will be refused,
        changes nothing that is kept.

        Args:
            algorithm: Says what is sent whole.
            reply: As it left the algorithm.
            kept: Of the client, the unsent vectors among them.
        """
        if reply.num_samples == 0:
            return replace(reply, wire_bytes=0), kept
        tensors, keeps = dict(reply.tensors), dict(kept)
        num_bytes = self.reply_bytes(algorithm, reply)
        for name in self.compressed(algorithm):
            vector = tensors[name] + kept[_UNSENT + name] if self.error_feedback else tensors[name]
            if not all_finite(vector):
                return replace(reply, wire_bytes=num_bytes), kept
            payload, unsent = self.send(vector)
            tensors[name] = self.receive(payload, vector.numel(), vector.dtype)
            if self.error_feedback:
                keeps[_UNSENT + name] = unsent
        return replace(reply, tensors=tensors, wire_bytes=num_bytes), keeps

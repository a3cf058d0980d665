"""SCAFFOLD: control variates correct each local step by how this client's gradients differ from everybody's.

Karimireddy et al., *SCAFFOLD: Stochastic Controlled Averaging for Federated Learning*, ICML 2020, option II:

    client:  gradient grad F_i(y) - c_i + c;  after K steps  c_i+ = c_i - c + (x - y) / (K eta_l)
    server:  x + eta_g mean_S (y_i - x);      c + (1/N) sum_S (c_i+ - c_i)

so c stays the mean of the c_i of all N clients. The server remembers their sum: when clients join, with c_i = 0, the
mean follows by itself.

Limits: twice FedAvg's bytes, both ways. `(x - y) / (K eta_l)` is a mean gradient where the local optimizer is plain
SGD only: no momentum, no clipping. A reply that the server refuses or never gets leaves c_i+ with the client, and c
without its part.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from distopt.federated.algorithm import LocalRound, Vectors, WeightedSum
from distopt.federated.deltas import SummedDeltas, mean_weights
from distopt.federated.memory import ServerMemory
from distopt.federated.messages import DELTA, Reply

CONTROL = "control"
CONTROL_CHANGE = "control_change"
CONTROL_SUM = "control_sum"


@dataclass(frozen=True, kw_only=True)
class Scaffold(SummedDeltas, name="scaffold"):
    """Uniform mean of the deltas of locally corrected steps; see the module.

    Args:
        server_lr: See `SteppingServer`.
        server_optimizer: See `SteppingServer`.

    Raises:
        ConfigError: A value breaks its rule.
    """

    kept = (CONTROL,)
    remembered = (CONTROL_SUM,)
    sends = (CONTROL_CHANGE,)
    assumes_plain_sgd = True

    def direction(
        self, gradient: Callable[[Tensor | None], Tensor], moved: Tensor, kept: Vectors, extras: Vectors
    ) -> Tensor:
        """See `FederatedAlgorithm.direction`."""
        return gradient(None) - kept[CONTROL] + extras[CONTROL]

    def finish(self, local: LocalRound) -> tuple[Vectors, Vectors]:
        """See `FederatedAlgorithm.finish`."""
        change = -local.extras[CONTROL] - local.moved / (local.num_steps * local.lr)
        return {CONTROL: local.kept[CONTROL] + change}, {DELTA: local.moved, CONTROL_CHANGE: change}

    def extras(self, memory: ServerMemory) -> Vectors:
        """See `FederatedAlgorithm.extras`."""
        return {CONTROL: memory.vectors[CONTROL_SUM] / memory.num_clients}

    def weights(self, memory: ServerMemory, replies: Sequence[Reply]) -> list[float]:
        """See `FederatedAlgorithm.weights`."""
        return mean_weights("uniform", replies)

    def sums(self, replies: Sequence[Reply], weights: Sequence[float]) -> Mapping[str, WeightedSum]:
        """See `LinearAlgorithm.sums`."""
        changed = WeightedSum(CONTROL_CHANGE, [1.0] * len(replies))
        return {**super().sums(replies, weights), CONTROL_CHANGE: changed}

    def move(self, memory: ServerMemory, model: Tensor, sums: Vectors) -> Tensor:
        """See `LinearAlgorithm.move`."""
        memory.vectors[CONTROL_SUM] = memory.vectors[CONTROL_SUM] + sums[CONTROL_CHANGE]
        return super().move(memory, model, sums)

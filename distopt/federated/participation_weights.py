"""How much a client's update counts where nobody knows how often it takes part: FedAU's estimate of 1/p.

The server counts, for each client, the rounds from one participation to the next, cut off at `cutoff`; the weight is
the mean of these intervals. With it the sum of the participants' updates, divided by the number of all registered
clients, has the uniform average of all clients as its expectation, whoever takes part more often than others.

Source: Wang & Ji, *A Lightweight Method for Tackling Unknown Participation Statistics in Federated Averaging* (FedAU),
ICLR 2024, 2306.03401, algorithm 2. It keeps three numbers per client, 24 bytes.

Limits: one object counts one sequence of rounds. The cutoff trades variance for bias: the mean of the intervals tends
to (1 - (1-p)^cutoff) / p, so a client with p much below 1/cutoff counts too little. Not safe for use from several
threads.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distopt.config import check_count
from distopt.errors import ConfigError, StateMismatchError

# Keys of the state: what must agree, and what is taken over, with the dtype of each.
_AGREES = "cutoff"
_PER_CLIENT = {"weights": torch.float64, "num_intervals": torch.int64, "waited": torch.int64}


class ParticipationWeights:
    """The weight of each registered client in the next round.

    A round uses `weights` of its participants and then calls `update` or `update_ids` once, also where nobody took
    part: those who were away wait one round longer. An upload that failed is no participation.

    Args:
        num_clients: How many are registered; their ids are 0 to num_clients - 1.
        cutoff: The longest interval in rounds, an integer >= 1 or math.inf. Lower: less variance, more bias against
            clients that come rarely; 1 makes all weights 1.

    Raises:
        ConfigError: A value breaks its rule.
    """

    def __init__(self, num_clients: int, cutoff: float = 50) -> None:
        check_count("num_clients", num_clients, low=0, remedy="give how many clients are registered")
        if cutoff != math.inf:
            remedy = "use 50, or math.inf for none"
            if not isinstance(cutoff, int) or isinstance(cutoff, bool) or cutoff < 1:
                raise ConfigError(f"cutoff must be an integer of at least 1 or math.inf, got {cutoff!r}; {remedy}")
        self.cutoff = cutoff
        self._weights = torch.ones(num_clients, dtype=torch.float64)
        self._num_intervals = torch.zeros(num_clients, dtype=torch.int64)
        self._waited = torch.zeros(num_clients, dtype=torch.int64)

    @property
    def num_clients(self) -> int:
        """How many clients are registered: what the weighted sum of the updates is divided by."""
        return self._weights.numel()

    @property
    def weights(self) -> Tensor:
        """(num_clients,) float64, for the next round. Later updates do not change this tensor; do not write to it."""
        return self._weights

    def update(self, participated: Tensor) -> None:
        """Ends a round. Call it once per round, after the aggregation.

        Args:
            participated: (num_clients,) bool: whose update was aggregated.

        Raises:
            ConfigError: The tensor has another shape or dtype; nothing was counted.
        """
        if participated.dtype != torch.bool or participated.shape != (self.num_clients,):
            raise ConfigError(
                f"participated must be a bool tensor of shape ({self.num_clients},), got {participated.dtype} of "
                f"shape {tuple(participated.shape)}; give one entry for each registered client"
            )
        self._waited += 1
        ended = participated.cpu()
        if self.cutoff != math.inf:
            ended = ended | (self._waited >= self.cutoff)
        clients = ended.nonzero().squeeze(1)
        before = self._num_intervals[clients]
        # The first interval replaces the weight of 1 that a client starts with: it is multiplied by 0.
        mean = (before * self._weights[clients] + self._waited[clients]) / (before + 1)
        self._weights = self._weights.index_copy(0, clients, mean)  # not in place: the old one was handed out
        self._num_intervals[clients] = before + 1
        self._waited[clients] = 0

    def update_ids(self, ids: Sequence[int] | Tensor) -> None:
        """Ends a round, as `update`, given who took part.

        Args:
            ids: The clients whose update was aggregated, in any order, each once; empty if nobody's was.

        Raises:
            ConfigError: An id is not registered or comes twice; nothing was counted.
        """
        clients = torch.as_tensor(ids).cpu() if len(ids) else torch.empty(0, dtype=torch.int64)
        if clients.dim() != 1 or clients.dtype not in (torch.int64, torch.int32):
            raise ConfigError(
                f"ids must be a list of integers, got {clients.dtype} of shape {tuple(clients.shape)}; give a bool "
                "tensor to update instead"
            )
        unknown = clients[(clients < 0) | (clients >= self.num_clients)]
        if unknown.numel():
            raise ConfigError(
                f"ids must be in [0, {self.num_clients}), got {int(unknown[0])}; register new clients with add_clients"
            )
        participated = torch.zeros(self.num_clients, dtype=torch.bool)
        participated[clients.long()] = True
        if int(participated.sum()) != clients.numel():
            twice = clients.sort().values
            twice = twice[1:][twice[1:] == twice[:-1]]
            raise ConfigError(f"ids must not repeat, got {int(twice[0])} twice; count one reply of a client per round")
        self.update(participated)

    def add_clients(self, m: int) -> None:
        """Registers `m` more clients, with the ids that follow; they start as the first ones did.

        Raises:
            ConfigError: m is not an integer of at least 0.
        """
        check_count("m", m, low=0, remedy="give how many clients join")
        self._weights = torch.cat([self._weights, torch.ones(m, dtype=torch.float64)])
        none = torch.zeros(m, dtype=torch.int64)
        self._num_intervals = torch.cat([self._num_intervals, none])
        self._waited = torch.cat([self._waited, none])

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything that the next rounds depend on."""
        tensors = {key: getattr(self, f"_{key}").clone() for key in _PER_CLIENT}
        return {_AGREES: self.cutoff, **tensors}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes back a state, with as many clients as it has.

        Raises:
            StateMismatchError: It is of another cutoff or of fewer clients, or incomplete; nothing was changed.
        """
        if missing := [key for key in (_AGREES, *_PER_CLIENT) if key not in state_dict]:
            raise StateMismatchError(f"the state must have the key {missing[0]!r}; it is not of ParticipationWeights")
        if state_dict[_AGREES] != self.cutoff:
            raise StateMismatchError(
                f"the state must be of cutoff {self.cutoff}, got {state_dict[_AGREES]}; make the object with that"
            )
        num_saved = len(state_dict["weights"])
        if num_saved < self.num_clients:
            raise StateMismatchError(
                f"the state must be of at least {self.num_clients} clients, got {num_saved}; call add_clients after "
                "loading, not before"
            )
        for key, dtype in _PER_CLIENT.items():
            tensor = state_dict[key]
            if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.shape != (num_saved,):
                raise StateMismatchError(f"{key!r} in the state must be ({num_saved},) {dtype}; the state is damaged")
        for key in _PER_CLIENT:
            setattr(self, f"_{key}", state_dict[key].cpu().clone())

"""The clients of a round spread over ranks: every rank is the whole server, and computes some of the clients.

Ranks run the same script under torchrun and hold the same model, memory and history, because they add up and decide
with equal bits. A linear rule costs one all-reduce per round; another one gathers the replies on every rank.

A client that keeps vectors is always computed by the same rank, `client % num_ranks`, which has them; else the clients
of a round are shared out by their number of local steps.

Limits: on the CPU, by gloo. Tables of the server (FedVarp, MIFA) are on every rank. Float tensors outside the averaged
part, such as an excluded BatchNorm's, would differ between ranks, so they are refused. Other numbers of ranks round
sums otherwise.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.comm.agreement import gather_json, raise_together
from distopt.comm.collectives import all_gather, all_reduce_sum
from distopt.comm.shutdown import end_quietly
from distopt.errors import ConfigError, DistoptError, StateMismatchError
from distopt.federated.algorithm import WeightedSum
from distopt.federated.exchange import WhyNot
from distopt.federated.execution.averaged import check_all_averaged
from distopt.federated.execution.trainer import Trainer
from distopt.federated.messages import Broadcast, Reply
from distopt.federated.rows import weighted_rows

T = TypeVar("T")
_CPU = torch.device("cpu")


class RankExchange:
    """Replies whose tensors are with one rank each; see `Exchange`.

    Args:
        group: The ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        end_quietly()
        self.rank, self.num_ranks = group.rank(), group.size()
        self.leads = self.rank == 0

    def announce(self, own: Sequence[Reply]) -> list[Reply]:
        """The replies of all ranks by client, those of others without tensors."""
        mine = [[r.client, r.version, r.num_samples, r.num_steps, r.num_bytes] for r in own]
        everybody = list(own)
        for rank, facts in enumerate(gather_json(mine, self._group, _CPU)):
            if rank != self.rank:
                everybody += [
                    Reply(client=c, version=v, num_samples=n, num_steps=k, tensors={}, wire_bytes=num_bytes)
                    for c, v, n, k, num_bytes in facts
                ]
        return sorted(everybody, key=lambda reply: reply.client)

    def reasons(self, replies: Sequence[Reply], why_not: WhyNot) -> list[str | None]:
        """See `Exchange.reasons`."""
        mine = [[i, why_not(reply)] for i, reply in enumerate(replies) if reply.tensors]
        told = {i: reason for facts in gather_json(mine, self._group, _CPU) for i, reason in facts}
        return [told[i] for i in range(len(replies))]

    def sums(
        self, asked: Mapping[str, WeightedSum], replies: Sequence[Reply], like: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """See `Exchange.sums`; one all-reduce."""
        here = [i for i, reply in enumerate(replies) if reply.tensors]
        parts = []
        for key, each in asked.items():
            rows = [replies[i].tensors[each.tensor] for i in here]
            part = weighted_rows(rows, [each.weights[i] for i in here]) if rows else torch.zeros_like(like[key])
            parts.append(part if part.dtype is torch.float64 else part.float())
        total = torch.cat(parts)
        all_reduce_sum(total, self._group).wait()
        split = total.split([like[key].numel() for key in asked])
        return {key: part.to(like[key].dtype) for key, part in zip(asked, split, strict=True)}

    def complete(self, replies: Sequence[Reply]) -> list[Reply]:
        """See `Exchange.complete`."""
        own = [reply for reply in replies if reply.tensors]
        names = gather_json(sorted({name for reply in own for name in reply.tensors}), self._group, _CPU)
        found: dict[int, dict[str, Tensor]] = {reply.client: {} for reply in replies}
        for name in max(names, key=len):
            clients, rows = self.gather_rows([r.client for r in own], [r.tensors[name] for r in own])
            for client, row in zip(clients, rows, strict=True):
                found[client][name] = row
        return [replace(reply, tensors=found[reply.client], wire_bytes=reply.num_bytes) for reply in replies]

    def gather_rows(self, clients: Sequence[int], rows: Sequence[Tensor]) -> tuple[list[int], list[Tensor]]:
        """All ranks' clients, and a flat tensor of each, all of one length and dtype. Collective."""
        form = [rows[0].numel(), str(rows[0].dtype).removeprefix("torch.")] if rows else None
        facts = gather_json([list(clients), form], self._group, _CPU)
        forms = [form for _, form in facts if form is not None]
        if not forms:
            return [], []
        numel, dtype = forms[0]
        padded = torch.zeros(max(len(listed) for listed, _ in facts), numel, dtype=getattr(torch, dtype))
        for i, row in enumerate(rows):
            padded[i] = row
        gathered, done = all_gather(padded.view(-1), self._group)
        done.wait()
        gathered = gathered.view(self.num_ranks, *padded.shape)
        everybody = [client for listed, _ in facts for client in listed]
        return everybody, [
            row for (listed, _), rank in zip(facts, gathered, strict=True) for row in rank[: len(listed)]
        ]

    def said_by_leader(self, fact: Callable[[], T]) -> T:
        """See `Exchange.said_by_leader`; it must be something that JSON can hold. Errors are raised on all ranks."""
        problem: DistoptError | None = None
        own: T | None = None
        try:
            own = fact() if self.leads else None
        except Exception as error:
            problem = _problem(error)
        raise_together(problem, self._group, _CPU, what="failed")
        found: T = gather_json(own, self._group, _CPU)[0]
        return found

    def check_same(self, facts: Mapping[str, str]) -> None:
        """See `Exchange.check_same`."""
        first, *others = gather_json(dict(facts), self._group, _CPU)
        for rank, told in enumerate(others, 1):
            for name, fact in first.items():
                if told.get(name) != fact:
                    raise StateMismatchError(
                        f"{name} must be the same on all ranks, got {fact:.200} on rank 0 and {told.get(name)!s:.200} "
                        f"on rank {rank}; every rank must run the same script with the same seeds and files"
                    )

    def fail_together(self, problem: DistoptError | None) -> None:
        """See `Exchange.fail_together`."""
        raise_together(problem, self._group, _CPU, what="could not train its clients")


class ShardedTrainer(Trainer):
    """See the module.

    Args:
        inner: The class of trainer that computes a rank's share.
        settings: Of `Trainer`.

    Raises:
        ConfigError: There is no process group, or one that is not on the CPU.
        CompatibilityError: Float tensors of the model are not averaged.
    """

    mode = "sharded"

    def __init__(self, inner: Callable[..., Trainer], **settings: Any) -> None:
        super().__init__(**settings)
        if not dist.is_initialized():
            raise ConfigError(
                'mode "sharded" needs a process group, got none; start with torchrun and call '
                'torch.distributed.init_process_group("gloo")'
            )
        group = dist.group.WORLD
        assert group is not None
        if "gloo" not in dist.get_backend(group):
            raise ConfigError(f'mode "sharded" needs the backend "gloo", got {dist.get_backend(group)!r}; use that')
        check_all_averaged(self.model, self.layout, "mode 'sharded'")
        self.exchange: RankExchange = RankExchange(group)
        self._inner = inner(**settings)
        self.kept = self._inner.kept

    @property
    def why_within(self) -> str:
        """Why a rank computes its share as it does."""
        return self._inner.why

    def train(self, broadcast: Broadcast, clients: Sequence[int]) -> list[Reply]:
        """See `Trainer.train`; replies of other ranks' clients are without tensors."""
        problem: DistoptError | None = None
        replies: list[Reply] = []
        try:
            replies = self._inner.train(broadcast, self._share(clients))
        except Exception as error:
            problem = _problem(error)
        self.exchange.fail_together(problem)
        return self.exchange.announce(replies)

    def _share(self, clients: Sequence[int]) -> list[int]:
        rank, num_ranks = self.exchange.rank, self.exchange.num_ranks
        if self.kept:
            return [client for client in clients if client % num_ranks == rank]
        work = {client: self.local.num_steps(self.data.num_samples(client)) for client in clients}
        loads = [0] * num_ranks
        mine = []
        for client in sorted(clients, key=lambda client: (-work[client], client)):
            lightest = loads.index(min(loads))
            loads[lightest] += work[client]
            if lightest == rank:
                mine.append(client)
        return sorted(mine)

    def state_dict(self) -> dict[str, Any]:
        """See `Trainer.state_dict`; of all ranks' clients. Collective."""
        state = {}
        for name, table in self.kept.items():
            own = list(table)
            clients, rows = self.exchange.gather_rows(own, [table.get(client) for client in own])
            stacked = torch.stack(rows) if rows else table.state_dict()["rows"]
            state[name] = {"clients": torch.tensor(clients, dtype=torch.int64), "rows": stacked}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Trainer.load_state_dict`; each rank takes its own clients', of however many ranks there were."""
        rank, num_ranks = self.exchange.rank, self.exchange.num_ranks
        for name, table in self.kept.items():
            mine = state[name]["clients"] % num_ranks == rank
            table.load_state_dict({key: tensor[mine] for key, tensor in state[name].items()})


def _problem(error: Exception) -> DistoptError:
    if isinstance(error, DistoptError):
        return error
    problem = DistoptError(f"{type(error).__name__}: {error}")
    problem.__cause__ = error
    return problem

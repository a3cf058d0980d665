"""`distopt.Gossip`: the configuration of decentralised training."""

import dataclasses
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from distopt.config import Algorithm, check_choice, check_count, check_seconds
from distopt.errors import ConfigError
from distopt.gossip.correction import CORRECTIONS
from distopt.gossip.description import check_connected
from distopt.gossip.mixing.dpsgd import DPSGD
from distopt.gossip.mixing.rule import Mixing, Surroundings
from distopt.gossip.topologies.exponential import OnePeerExponential
from distopt.gossip.topologies.given import EdgeList
from distopt.gossip.topology import Topology, make_topology

if TYPE_CHECKING:
    from distopt.gossip.attachment import GossipAttachment
    from distopt.step_clock import Scaler

OPTIMIZER_STATES = ("keep", "average")
BUFFERS = ("keep", "average")
EXCHANGES = ("synchronous", "overlapped", "asynchronous")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gossip(Algorithm, name="gossip"):
    """Averaging with neighbours only.

    Args:
        topology: A topology, or the name of one with its defaults.
        mixing: A mixing rule, or the name of one with its defaults.

    Raises:
        ConfigError: A value breaks its rule, or two cannot be combined.
    """

    topology: Topology | str = dataclasses.field(  # more neighbours agree sooner, and cost more bytes
        default=OnePeerExponential(), metadata={"configurable": Topology}
    )
    mixing: Mixing | str = dataclasses.field(default=DPSGD(), metadata={"configurable": Mixing})
    correction: str = "auto"  # of the variance: "off", "on", or "auto" while averaging shrinks it
    every: int = 1  # steps from one exchange to the next; more send less, and ranks drift apart further
    exchange: str = "synchronous"  # "overlapped" mixes models one exchange old, "asynchronous" of any age: no waiting
    optimizer_state: str = "keep"  # "average" mixes momentum and moments as well: more bytes
    buffers: str = "average"  # of BatchNorm's statistics; "keep" leaves each rank its own. Counters always stay
    peer_timeout: float = 600.0  # s that a connected rank may be silent in an exchange before others go on without it
    grace: float = 5.0  # s that ranks which meet anew wait for others that do not answer; longer splits less easily

    def __post_init__(self) -> None:
        object.__setattr__(self, "topology", make_topology(self.topology))
        if isinstance(self.mixing, str):
            object.__setattr__(self, "mixing", Mixing.from_dict({"mixing": self.mixing}))
        if not isinstance(self.mixing, Mixing):
            raise ConfigError(f"mixing must be a name or a mixing rule, got {self.mixing!r:.200}; use 'd-psgd'")
        check_choice("correction", self.correction, CORRECTIONS)
        check_count("every", self.every, low=1, remedy="use 1 to exchange after every step")
        check_choice("exchange", self.exchange, EXCHANGES)
        for name in ("peer_timeout", "grace"):
            check_seconds(name, getattr(self, name))
        check_choice("optimizer_state", self.optimizer_state, OPTIMIZER_STATES)
        check_choice("buffers", self.buffers, BUFFERS)
        if self.correction == "on" and not self.mixing.can_correct:
            raise ConfigError(
                "variance correction needs an algorithm that stays right when averages are rescaled, got "
                f"correction='on' with {self.mixing.name!r}; use correction='off', or d-psgd, push-sum, choco or "
                "quasi-global-momentum"
            )
        if self.exchange != "synchronous" and not self.mixing.can_overlap:
            raise ConfigError(
                f"exchange={self.exchange!r} needs an algorithm that may mix older models, got {self.mixing.name!r}; "
                "use exchange='synchronous', or d-psgd, push-sum or a2cid2"
            )
        if self.exchange != "synchronous" and self.optimizer_state == "average":
            raise ConfigError(
                f"optimizer_state='average' needs exchange='synchronous', got {self.exchange!r}; use 'keep'"
            )

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scaler: "Scaler | None" = None,
        process_group: dist.ProcessGroup | None = None,
        interface: str | None = None,
        join: str | None = None,
    ) -> "GossipAttachment":
        """Averages the model with its neighbours' after the optimizer's steps. Collective, but for `join`.

        The ranks' models may differ; to start from one, broadcast it first.

        Args:
            model: Not wrapped in DDP. Its parameters move into one vector where they allow it.
            optimizer: Its optimizer, any; some algorithms need plain SGD.
            scaler: The `torch.amp.GradScaler` in use, if any.
            process_group: The ranks that begin together; all by default. It is used at the start only.
            interface: Address of this machine that the other ranks reach; found out if left out.
            join: For a process that comes later, and belongs to no process group: the `address` of an attachment that
                is at work. It takes the others' average.

        Raises:
            ConfigError: The configuration cannot work with so many ranks.
            CompatibilityError: The model or optimizer cannot be combined with this algorithm.
            DesyncError: The ranks have different versions, configurations or models; names both.
            PeerLostError: Nobody answers at `join`, or a rank cannot reach another.
        """
        from distopt.gossip.attachment import GossipAttachment  # which imports this module

        return GossipAttachment(
            self, model, optimizer, scaler=scaler, process_group=process_group, interface=interface, join=join
        )

    @property
    def rule(self) -> Mixing:
        """The mixing rule."""
        assert isinstance(self.mixing, Mixing)
        return self.mixing

    @property
    def graphs(self) -> Topology:
        """The topology."""
        assert isinstance(self.topology, Topology)
        return self.topology

    @property
    def corrects(self) -> bool:
        """Whether averages are corrected; "auto" leaves algorithms alone that must not be."""
        return self.correction != "off" and self.rule.can_correct

    def surroundings(self, num_ranks: int) -> Surroundings:
        """What the rule may know of a job of so many ranks.

        Raises:
            ConfigError: The graph is not connected, the rule cannot work on it, or needs other weights.
        """
        return self._checked(self.graphs, num_ranks)

    def among(self, members: tuple[int, ...]) -> Surroundings:
        """What the rule may know after ranks have gone or come: the topology is `Topology.among` them.

        Where the rule needs weights that keep the mean and the directed graph that is left has none, its edges are used
        in both directions.

        Args:
            members: Numbers of those who are there, ascending.

        Raises:
            ConfigError: The rule cannot work among them.
        """
        topology = self.graphs.among(members)
        size = len(members)
        if self.rule.needs_mean and not topology.graph(size).keeps_mean:
            topology = EdgeList(edges=tuple(topology.graph(size).edges))
        return self._checked(topology, size)

    def _checked(self, topology: Topology, num_ranks: int) -> Surroundings:
        around = Surroundings(topology=topology, num_ranks=num_ranks, every=self.every)
        check_connected(topology, num_ranks)
        if self.rule.needs_mean and not topology.graph(num_ranks).keeps_mean:
            raise ConfigError(
                f"{self.rule.name} needs weights whose rows add up to 1 as their columns do, got those of "
                f"{topology.name!r} with {num_ranks} ranks; use mixing='push-sum', or an undirected graph"
            )
        self.rule.check(around)
        return around

"""What the algorithms of this family have in common: the fields of the compressed ones, and `attach`."""

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distopt.comm import Link, LinkModel
from distopt.compress import INDEX_FORMATS, WIRE_DTYPES
from distopt.config import Algorithm, FrozenMapping, check_choice, check_count, check_density, check_number
from distopt.ddp.attachment import Attachment
from distopt.ddp.densities import choose_densities
from distopt.ddp.hook import LossScale
from distopt.ddp.host import DDPHost, Host
from distopt.ddp.memory import Memory
from distopt.ddp.parameters import Hyperparameters
from distopt.ddp.policy import StepPolicy, WirePolicy
from distopt.ddp.schedule import Schedule
from distopt.errors import ConfigError

EXCHANGES = ("auto", "allgather", "balanced", "hierarchical", "dense")


def check_peer_timeout(value: object) -> None:
    """Raises `ConfigError` unless value is a number of seconds, or 0 for no watch (not None: TOML has none)."""
    if value != 0 or isinstance(value, bool):
        rule, remedy = "a number of seconds of at least 0", "use 120.0, or 0 to not watch the other ranks"
        check_number("peer_timeout", value, rule=rule, remedy=remedy, low=0.0, high=1e6)


class DDPAlgorithm(Algorithm):
    """Base of the algorithms that attach to a `DistributedDataParallel` model.

    Attributes:
        corrects_momentum: Whether the algorithm replaces the momentum of SGD (and refuses other optimizers).
        makes_dense_mean: Whether the update is the mean of the ranks' gradients, of all entries.
        peer_timeout: Seconds of silence after which another rank is lost; 0 to not watch the others.
    """

    corrects_momentum: bool = False
    makes_dense_mean: ClassVar[bool] = False
    peer_timeout: float = 120.0

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scaler: LossScale | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> Attachment:
        """Puts the algorithm between the backward pass and the optimizer. Collective.

        While attached, `p.grad` holds the update (what the ranks agreed on), not the gradient.

        Args:
            model: The DDP model (also one wrapped by `torch.compile`), before or between training steps.
            optimizer: Its optimizer.
            scaler: The `torch.amp.GradScaler` in use, if any.
            process_group: The ranks to exchange with; the DDP model's own by default.

        Raises:
            CompatibilityError: The model, optimizer or host cannot be combined with this algorithm.
            DesyncError: The ranks have different versions, configurations or models; names both.
        """
        return Attachment(self, DDPHost(model), optimizer, scaler=scaler, process_group=process_group)

    def attach_to(self, host: Host, optimizer: torch.optim.Optimizer) -> Attachment:
        """As `attach`, in a system that is not DDP: the host says where gradients come from. Collective.

        Args:
            host: The system, as `distopt.ddp.FeedHost` or a host of its own.
            optimizer: The optimizer whose `step()` uses the updates.

        Raises:
            CompatibilityError: The model, optimizer or host cannot be combined with this algorithm.
            DesyncError: The ranks have different versions, configurations or models; names both.
        """
        return Attachment(self, host, optimizer, scaler=None, process_group=None)

    @abstractmethod
    def step_policy(self, *, tracks_usage: bool) -> StepPolicy:
        """What is done with a whole step."""

    @abstractmethod
    def densities_for(self, parameters: Mapping[str, Tensor]) -> dict[str, float | None]:
        """The final density of each parameter; None sends it whole."""

    @abstractmethod
    def memory_for(self, parameter: Tensor, whole: bool, hyperparameters: Hyperparameters) -> Memory:
        """A new, empty memory; `whole` says that the parameter is never sent sparse."""

    def decays_locally(self) -> bool:
        """Whether weight decay that was taken over is part of the local gradient."""
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressedAlgorithm(DDPAlgorithm):
    """The fields that every compressing algorithm has. See `distopt.DGC` and `distopt.TopK`."""

    density: float = 1e-3  # fraction of each tensor sent per step; smaller sends less and delays more
    warmup: Schedule | None = dataclasses.field(default=None, metadata={"configurable": Schedule})  # denser at first
    values: str = "fp32"  # on the wire: "fp16" and "bf16" halve the values, and their rounding error stays behind
    indices: str = "int32"  # on the wire: "block16" and, slower, "elias-fano" send fewer bytes and lose nothing
    exchange: str = "auto"  # "allgather", "balanced", "hierarchical" or "dense"; "auto" takes what will be fastest
    link: Link | None = dataclasses.field(default=None, metadata={"configurable": LinkModel})  # given, not measured
    ranks_per_node: int | None = None  # consecutive ranks that share a node, where the launcher does not say
    residuals: str = "fp32"  # what is kept between steps: "bf16" halves the memory and forgets the smallest gradients
    nonfinite: str = "error"  # "skip" leaves steps with NaN or Inf out on all ranks, at the price of overlap
    skip: tuple[str, ...] = ()  # name patterns of parameters to send whole: more exact, more bytes
    densities: Mapping[str, float] = FrozenMapping()  # name pattern to a density of its own; the first match counts
    peer_timeout: float = 120.0  # s; shorter notices a lost rank sooner and mistakes a busy one for it; 0: no watch

    def __post_init__(self) -> None:
        check_density("density", self.density)
        if self.warmup is not None and not isinstance(self.warmup, Schedule):
            raise ConfigError(
                f"warmup must be a schedule or None, got {self.warmup!r}; use distopt.ddp.PaperWarmup(stage=500)"
            )
        check_choice("values", self.values, tuple(WIRE_DTYPES))
        check_choice("indices", self.indices, tuple(INDEX_FORMATS))
        check_choice("exchange", self.exchange, EXCHANGES)
        if self.link is not None and not isinstance(self.link, Link):
            raise ConfigError(
                f"link must be a distopt.ddp.Link or None, got {self.link!r}; leave it out to have the link measured"
            )
        if self.ranks_per_node is not None:
            remedy = "leave it out to ask the launcher"
            check_count("ranks_per_node", self.ranks_per_node, low=1, remedy=remedy)
        check_choice("residuals", self.residuals, ("fp32", "bf16"))
        check_peer_timeout(self.peer_timeout)
        check_choice("nonfinite", self.nonfinite, ("error", "skip"))
        if not isinstance(self.skip, tuple) or not all(isinstance(pattern, str) for pattern in self.skip):
            raise ConfigError(f'skip must be a tuple of name patterns, got {self.skip!r}; use ("*.bias", "head.*")')
        if not isinstance(self.densities, Mapping):
            raise ConfigError(
                f'densities must map name patterns to densities, got {self.densities!r}; use {{"fc*": 0.01}}'
            )
        for pattern, density in self.densities.items():
            if not isinstance(pattern, str):
                raise ConfigError(f'densities must have name patterns as keys, got {pattern!r}; use {{"fc*": 0.01}}')
            check_density(f"densities[{pattern!r}]", density)
        object.__setattr__(self, "densities", FrozenMapping(self.densities))  # a copy of its own, and hashable

    def step_policy(self, *, tracks_usage: bool) -> StepPolicy:
        """See `DDPAlgorithm.step_policy`."""
        wire = WirePolicy(
            value_dtype=WIRE_DTYPES[self.values],
            index_format=INDEX_FORMATS[self.indices],
            exchange=self.exchange,
            link=self.link,
            ranks_per_node=self.ranks_per_node,
            with_status=True,
            with_used_flags=tracks_usage,
        )
        return StepPolicy(warmup=self.warmup, clip=None, nonfinite=self.nonfinite, wire=wire)

    def densities_for(self, parameters: Mapping[str, Tensor]) -> dict[str, float | None]:
        """See `DDPAlgorithm.densities_for`."""
        return choose_densities(parameters, self.density, self.skip, self.densities)

    def residual_dtype(self, parameter: Tensor) -> torch.dtype:
        """Dtype of what is kept of a parameter: float32 or bfloat16 as asked, float64 for float64 parameters."""
        if parameter.dtype == torch.float64:
            return torch.float64
        return WIRE_DTYPES[self.residuals]

    def keeps_residual(self, parameter: Tensor, whole: bool) -> bool:
        """Whether something can stay behind: unsent entries, or rounding errors of a 16-bit wire."""
        return not whole or WIRE_DTYPES[self.values].itemsize < parameter.dtype.itemsize

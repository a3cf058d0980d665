"""`distopt.SparseLoCo` and `distopt.DiLoCo`: the configurations of training by many local steps and one outer step.

H inner steps of any optimizer lead a rank from the model theta, which all share, to its own; the difference `Delta =
theta - local` (the pseudo-gradient) is exchanged, and theta moves by an outer step. SparseLoCo (arXiv:2508.15706) sends
the largest entries of it with error feedback, DiLoCo (arXiv:2311.08105) all of it with outer Nesterov momentum; the
fragments are those of Streaming DiLoCo (arXiv:2501.18512).
"""

import dataclasses
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from distopt.compress import INDEX_FORMATS, VALUE_FORMATS
from distopt.config import Algorithm, check_choice, check_count, check_number, check_seconds, check_switch
from distopt.errors import ConfigError
from distopt.local.rounds import inner_steps_of

if TYPE_CHECKING:
    from distopt.local.attachment import LocalAttachment
    from distopt.step_clock import Scaler

BUFFERS = ("average", "keep")
AVERAGES = ("world", "senders")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalSteps(Algorithm):
    """Base of both: when ranks exchange, and the outer step."""

    inner_steps: int = 15  # H, from one exchange to the next; more send less, and ranks drift apart further
    warmup_rounds: int = 0  # H grows linearly from 1 over so many rounds; more keep ranks together while steps are wild
    outer_lr: float = 1.0  # alpha; 1 takes the mean of the ranks' models, less moves more carefully
    outer_momentum: float = 0.0  # more remembers more rounds
    nesterov: bool = False  # the outer momentum looks ahead
    fragments: int = 1  # parts of the model, sent in turn within a round: more spread the traffic evenly
    overlap: int = 0  # inner steps during which an exchange travels behind the computation; more hide a slower link
    buffers: str = "average"  # of BatchNorm's statistics; "keep" leaves each rank its own. Counters always stay
    peer_timeout: float = 600.0  # s that a connected rank may be silent in an exchange before others go on without it
    grace: float = 5.0  # s that ranks which meet anew wait for others that do not answer; longer splits less easily

    def __post_init__(self) -> None:
        check_count("inner_steps", self.inner_steps, low=1, remedy="use 15")
        check_count("warmup_rounds", self.warmup_rounds, low=0, remedy="use 0 to begin with the full number of steps")
        check_number("outer_lr", self.outer_lr, rule="a number above 0", remedy="use 1.0", low=0.0, high=100.0)
        _check_momentum(self.outer_momentum)
        check_switch("nesterov", self.nesterov)
        check_count("fragments", self.fragments, low=1, remedy="use 1 to send the model whole")
        check_count("overlap", self.overlap, low=0, remedy="use 0 to wait for each exchange")
        check_choice("buffers", self.buffers, BUFFERS)
        for name in ("peer_timeout", "grace"):
            check_seconds(name, getattr(self, name))
        if self.nesterov and self.outer_momentum == 0:
            raise ConfigError(
                "nesterov=True needs an outer momentum to look ahead with, got outer_momentum=0; use "
                "outer_momentum=0.9, or nesterov=False"
            )
        if self.overlap >= self.inner_steps and self.overlap:
            raise ConfigError(
                f"overlap must be less than inner_steps={self.inner_steps}, got {self.overlap}: an exchange must be "
                f"taken in before the next begins; use at most {self.inner_steps - 1}, or more inner steps"
            )
        if self.fragments > self.inner_steps:
            raise ConfigError(
                f"fragments must be at most inner_steps={self.inner_steps}, got {self.fragments}: each is sent after a "
                f"step of its own; use {self.inner_steps} or fewer"
            )

    def inner_steps_of(self, round: int) -> int:
        """Inner steps of a round, counted from 0, with warm-up."""
        return inner_steps_of(self, round)

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scaler: "Scaler | None" = None,
        process_group: dist.ProcessGroup | None = None,
        interface: str | None = None,
        join: str | None = None,
    ) -> "LocalAttachment":
        """Takes an outer step with the other ranks after `inner_steps` steps of the optimizer. Collective, but `join`.

        All ranks begin with the first one's model.

        Args:
            model: Not wrapped in DDP.
            optimizer: Its optimizer, any; its state stays on this rank.
            scaler: The `torch.amp.GradScaler` in use, if any: steps that it skips count too.
            process_group: The ranks that begin together; all by default. It is used at the start only.
            interface: Address of this machine that the other ranks reach; found out if left out.
            join: For a process that comes later, and belongs to no process group: the `address` of an attachment that
                is at work. It takes the others' model.

        Raises:
            ConfigError: The configuration does not fit the model.
            CompatibilityError: The model or optimizer cannot be combined with this algorithm.
            DesyncError: The ranks have different versions, configurations or models; names both.
            PeerLostError: Nobody answers at `join`, or a rank cannot reach another.
        """
        from distopt.local.attachment import LocalAttachment  # which imports this module

        return LocalAttachment(
            self, model, optimizer, scaler=scaler, process_group=process_group, interface=interface, join=join
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseLoCo(LocalSteps, name="sparseloco"):
    """Many local steps, then the largest entries of what they changed, in two bits each, with error feedback.

    `e = beta e + Delta; D = Q(top k of each chunk of e); e -= D; theta -= alpha mean(D)` (arXiv:2508.15706).

    Raises:
        ConfigError: A value breaks its rule, or two cannot be combined.
    """

    chunk: int = 4096  # elements of a tensor among which the largest are chosen; longer chunks cost more bits per index
    k: int = 64  # entries sent of each chunk; fewer send less, and more waits in the residual
    decay: float = 0.95  # beta of the residual; 1 forgets nothing, less forgets sooner what is stale
    values: str = "2bit"  # on the wire: more bits leave less in the residual; "2bit-bins" is the published quantiser
    indices: str = "elias-fano"  # on the wire: "int32" and "block16" are larger, nothing is lost either way
    average: str = "world"  # "senders" divides by the ranks that sent an entry: larger steps, and mass is made up

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("chunk", self.chunk, low=1, remedy="use 4096")
        check_count("k", self.k, low=1, remedy="use 64")
        rule, remedy = "a number in (0, 1]", "use 0.95, or 1.0 to forget nothing"
        check_number("decay", self.decay, rule=rule, remedy=remedy, low=0.0, high=1.0)
        check_choice("values", self.values, tuple(VALUE_FORMATS))
        check_choice("indices", self.indices, tuple(INDEX_FORMATS))
        check_choice("average", self.average, AVERAGES)
        if self.k > self.chunk:
            raise ConfigError(
                f"k must be at most chunk={self.chunk}, got {self.k}; use k={self.chunk} to send every entry"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiLoCo(LocalSteps, name="diloco"):
    """Many local steps, then all that they changed, averaged, with outer Nesterov momentum (arXiv:2311.08105).

    Raises:
        ConfigError: A value breaks its rule, or two cannot be combined.
    """

    outer_lr: float = 0.7  # alpha; less moves more carefully
    outer_momentum: float = 0.9
    nesterov: bool = True


def _check_momentum(value: object) -> None:
    valid = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
    if not valid:
        raise ConfigError(
            f"outer_momentum must be a number in [0, 1), got {value!r}; use 0.9 to remember about ten rounds"
        )

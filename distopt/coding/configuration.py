"""Gradient coding as a configuration: which code, how many stragglers, when to stop waiting."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distopt.coding.attachment import CodedTraining
from distopt.coding.code import CODES
from distopt.coding.data_parts import Batches
from distopt.coding.one_round import OneRound
from distopt.coding.scheme import Scheme
from distopt.coding.sequential import SequentialCode
from distopt.coding.stopping import STOP_RULES, StopRule, stop_rule
from distopt.comm import Transport
from distopt.config import Algorithm, FrozenMapping, check_choice, check_count, check_number, check_switch
from distopt.errors import ConfigError

_OF_ONE_MASTER = ("stop", "mu", "amplification_limit", "replicas", "replica_tolerance")
_OF_CODES = ("code", "stragglers", "options", "amplification_limit", "replica_tolerance")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientCoding(Algorithm, name="gradient-coding"):
    """An exact full-batch step that does not wait for the slowest ranks (Tandon et al., ICML 2017).

    The data of a step is split into parts; each part is on several workers. Rank 0, the master, decodes the gradient
    from the first workers that suffice::

        coded = distopt.GradientCoding(stragglers=1).attach(model, optimizer, batches=Batches(len(data), 256))
        for step in coded.steps(1000):
            loss = coded.backward(lambda part: loss_sum(model, data[part.samples]))
            optimizer.step()

    Args:
        code: A name in `distopt.coding.CODES`, or "auto": fractional where s + 1 divides the workers, else binary.
        stragglers: s, how many workers no step waits for.
        options: Further arguments of the code's constructor, such as {"copies": 3} of "approximate".
        scheme: In place of a code: a sequential one, or its configuration, {"scheme": "m-sgc", "burst": 1, ...}.
        master: "first" (rank 0 decodes and does not compute) or "sharded" (every rank computes and decodes a slice).
        stop: When a round ends; see `distopt.coding.stopping`.
        mu: Of the stop rules "paper" and "minimal".
        amplification_limit: Norm of the decoding's coefficients above which one more worker is waited for.
        deadline_s: Seconds that a round may take.
        replicas: "error" or "warn" where workers of the same parts differ, "ignore" to not look.
        replica_tolerance: Relative difference that counts as rounding; None for 1e-4, or 0.05 of 16-bit parameters.
        check_rules: Whether the first step checks the loss and the model.
        seed: Of the parts' random numbers.
    """

    code: str = "auto"  # "cyclic" and "cyclic_mds" have less load for odd sizes and larger rounding errors
    stragglers: int = 1  # more tolerates more and makes every worker compute s + 1 parts
    options: Mapping[str, Any] = FrozenMapping()  # of the code
    scheme: Mapping[str, Any] | SequentialCode | None = None  # decodes T rounds later, with less load
    master: str = "first"  # "sharded" spreads what rank 0 receives, and takes the fractional code only
    stop: str = "decodable"  # "minimal" and "paper" wait longer
    mu: float = 1.0  # larger waits longer before anybody counts as a straggler
    amplification_limit: float = 100.0  # smaller waits for more workers, for smaller rounding errors
    deadline_s: float = 300.0  # shorter gives a job up sooner that cannot go on
    replicas: str = "error"  # "warn" goes on with what arrives first
    replica_tolerance: float | None = None  # smaller finds smaller differences, and rounding
    check_rules: bool = True  # False saves two gradients of one part, once
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("code", self.code, ("auto", *sorted(CODES)))
        check_count("stragglers", self.stragglers, low=0, remedy="give how many workers may be slow; 0 waits for all")
        check_choice("master", self.master, ("first", "sharded"))
        check_choice("stop", self.stop, STOP_RULES)
        stop_rule("minimal", mu=self.mu)  # checks mu, also where the rule does not use it
        positive: dict[str, Any] = {"rule": "a number above 0", "low": 0.0, "high": 1e12}
        check_number("amplification_limit", self.amplification_limit, remedy="use 100.0", **positive)
        check_number("deadline_s", self.deadline_s, remedy="use 300.0", **positive)
        check_choice("replicas", self.replicas, ("error", "warn", "ignore"))
        if self.replica_tolerance is not None:
            check_number("replica_tolerance", self.replica_tolerance, remedy="leave it out", **positive)
        check_switch("check_rules", self.check_rules)
        check_count("seed", self.seed, low=0, remedy="give the same seed on every rank")
        if not isinstance(self.options, Mapping):
            raise ConfigError(f'options must be a mapping, got {self.options!r}; use {{"copies": 3}}')
        object.__setattr__(self, "options", FrozenMapping(self.options))
        if isinstance(self.scheme, Mapping):
            complete = "n" in self.scheme  # else it is made when the number of workers is known
            made = SequentialCode.from_dict(self.scheme) if complete else FrozenMapping(self.scheme)
            object.__setattr__(self, "scheme", made)
        elif self.scheme is not None and not isinstance(self.scheme, SequentialCode):
            raise ConfigError(
                f"scheme must be a sequential code or its configuration, got {self.scheme!r}; use "
                '{"scheme": "m-sgc", "burst": 1, "window": 2, "stragglers": 1}'
            )
        if self.master == "sharded" and (self.code not in ("auto", "fractional") or self.scheme is not None):
            raise ConfigError(
                f"master='sharded' takes the fractional code only, got {self.scheme or self.code!r}: the slices that "
                "different ranks decode must be equal to the last bit, whoever was slow; leave code out"
            )
        self._check_without_effect()

    def _check_without_effect(self) -> None:
        """What would be passed over in silence is refused."""
        if self.master == "sharded":
            reason, names = "master='sharded' compares bits, and waits for what decodes", _OF_ONE_MASTER
        elif self.scheme is not None:
            reason, names = "a sequential scheme has a code and a number of stragglers of its own", _OF_CODES
        else:
            return
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise ConfigError(f"{name} must be left out, got {getattr(self, name)!r}: {reason}")

    def attach(
        self,
        model: nn.Module | Sequence[nn.Module],
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        batches: Batches | None = None,
        process_group: dist.ProcessGroup | None = None,
        transport: str | Transport = "auto",
    ) -> CodedTraining:
        """Makes this rank the master or a worker of a coded training. To be called on every rank.

        Args:
            model: The bare model, on any device; T + 1 models to be trained in turns with a sequential scheme.
            optimizer: Its optimizer, or theirs.
            batches: Which samples each step takes; without it the loss must find them by step and part.
            process_group: The ranks, under torchrun; all by default.
            transport: "gloo", "mpi" or an open `distopt.comm.Transport`; "auto" takes gloo where torch.distributed is
                initialised, else MPI.

        Raises:
            CompatibilityError: The model, the optimizer or the number of ranks cannot be used; on every rank.
            ConfigError: An option breaks its rule.
            PeerLostError: A rank does not answer within `deadline_s`.
        """
        models = [model] if isinstance(model, nn.Module) else list(model)
        optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        return CodedTraining(
            self, models, optimizers, batches=batches, process_group=process_group, transport=transport
        )

    def scheme_for(self, num_workers: int) -> Scheme:
        """What this configuration means for so many workers.

        Raises:
            ConfigError: It does not fit that number.
        """
        if isinstance(self.scheme, SequentialCode):
            if self.scheme.n != num_workers:
                raise ConfigError(f"the scheme is for {self.scheme.n} workers, but the job has {num_workers}; give n")
            return self.scheme
        if self.scheme is not None:
            return SequentialCode.for_workers(self.scheme, num_workers)
        name = self.code
        if name == "auto":
            name = "fractional" if num_workers % (self.stragglers + 1) == 0 or self.master == "sharded" else "binary"
        constructor = CODES[name]
        known = inspect.signature(constructor).parameters
        given = {key: value for key, value in {"n": num_workers, "s": self.stragglers}.items() if key in known}
        if unknown := sorted(set(self.options) - set(known)):
            raise ConfigError(f"code {name!r} knows the options {', '.join(known)}, got {', '.join(unknown)}")
        if "s" not in known and self.stragglers != 1:
            raise ConfigError(
                f"code {name!r} has no number of stragglers, got {self.stragglers}: leave it out, and say in options "
                f"how much it tolerates: {', '.join(key for key in known if key != 'n')}"
            )
        try:
            code = constructor(**{**given, **self.options})
        except TypeError as error:
            raise ConfigError(f"code {name!r}: {error}; give it in options") from error
        if code.num_workers != num_workers:
            raise ConfigError(
                f"the options of {name!r} are for {code.num_workers} workers, but the job has {num_workers}; give one "
                "value per worker"
            )
        return OneRound(code)

    def rule(self) -> StopRule:
        """A new stop rule for one training."""
        return stop_rule(self.stop, mu=self.mu)

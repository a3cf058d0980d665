"""An algorithm at work on one model: what `attach` returns, and what `detach` undoes."""

import contextlib
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from distopt import ops
from distopt.comm import agree, all_reduce_sum, raise_together
from distopt.ddp import state as states
from distopt.ddp.compatibility import fingerprint
from distopt.ddp.decay import DecayMomentum
from distopt.ddp.hook import CommHook, LossScale
from distopt.ddp.host import Host
from distopt.ddp.late import step_late
from distopt.ddp.parameters import Hyperparameters, TrackedParameter
from distopt.ddp.peers import Peers
from distopt.ddp.prediction import Predictor
from distopt.ddp.routing import open_routes
from distopt.ddp.takeover import Takeover, averaged_momentum
from distopt.ddp.unused import UsageTracker
from distopt.errors import CompatibilityError, DistoptError, StateMismatchError
from distopt.gradients import GradientObserver
from distopt.ops import native

if TYPE_CHECKING:
    from distopt.ddp.algorithm import DDPAlgorithm  # which imports this module, to make attachments

_log = logging.getLogger("distopt")

_STEPS_PER_DEVICE_CHECK = 100


class Attachment:
    """Made by `DGC(...).attach(model, optimizer)`; see there for arguments and errors. Also a context manager.

    Attributes:
        algorithm: The configuration at work.
        process_group: The ranks it exchanges with.
    """

    family: ClassVar = "ddp"

    def __init__(
        self,
        algorithm: "DDPAlgorithm",
        host: Host,
        optimizer: torch.optim.Optimizer,
        *,
        scaler: LossScale | None,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self.algorithm = algorithm
        self.process_group = process_group or host.process_group
        self._host = host
        self._optimizer = optimizer
        self._scaled = scaler is not None and getattr(scaler, "is_enabled", lambda: True)()
        self._device = host.device

        tracks_usage = host.tracks_usage
        problem: DistoptError | None = None
        own = None
        parameters: dict[str, Tensor] = {}
        densities: dict[str, float | None] = {}
        self._takeover: Takeover | None = None
        try:
            parameters = host.parameters()
            if algorithm.corrects_momentum:
                names = {id(p): name for name, p in parameters.items()}
                self._takeover = Takeover(optimizer, names, host.stands_for())
            densities = algorithm.densities_for(parameters)
            own = fingerprint(
                algorithm.to_dict(),
                parameters,
                self._optimized(parameters),
                taken_over=self._takeover.describe() if self._takeover else "",
                host={"tracks unused parameters": tracks_usage, "GradScaler": self._scaled},
            )
            host.claim()  # last: DDP's slot cannot be given back
        except DistoptError as error:
            problem = error
        agree(own, problem, self.process_group, self._device)

        self._usage = UsageTracker(list(parameters.values())) if tracks_usage else None
        self._tracked = self._track(parameters, densities)
        self._late = self._by_optimizer([entry for entry in self._tracked if entry.late])
        self._stepped = 0
        policy = algorithm.step_policy(tracks_usage=tracks_usage)
        self._measures = policy.wire.exchange == "auto" and policy.wire.link is None
        routing, self._channels = open_routes(policy.wire, self.process_group, self._device)
        self._peers = Peers()
        self._hook = CommHook(
            self._tracked,
            policy,
            self._channels,
            routing,
            scale=scaler if self._scaled else None,
            usage=self._usage,
            peers=self._peers,
            makes_dense_mean=algorithm.makes_dense_mean,
        )
        self._undo_keeping = host.keep_in_step(self.process_group, self._tracked)
        host.connect(self._hook)
        if self._takeover is not None:
            self._takeover.take(self._tracked)
        self._step_handle = optimizer.register_step_pre_hook(self._before_optimizer_step)
        self._attached = True
        self._peers.watch(self.process_group, self._device, algorithm.peer_timeout, self._hook.fail)
        # The heartbeat's thread keeps nothing of this alive, and ends with it.
        weakref.finalize(self, self._peers.close).atexit = False
        self._announce()

    @property
    def rank(self) -> int:
        """Of this process among all of the job, not only those of `process_group`."""
        return dist.get_rank() if dist.is_initialized() else self.process_group.rank()

    @property
    def step(self) -> int:
        """Completed steps, those before a checkpoint included."""
        return self._hook.step

    @property
    def shard(self) -> str:
        """Which part of every parameter this rank has, "0 of 2" say; empty for all of it."""
        return self._host.shard

    def stats(self) -> dict[str, Any]:
        """Numbers since attach, of this rank, without a collective; under "last" those of the latest step.

        `bytes_sent` is what this rank encoded (values, indices, headers, dense parts), `bytes_dense` the same gradient
        in fp32; `link_bytes_sent` and `link_bytes_dense` are what the collectives put on the link, which depends on the
        number of ranks. Seconds are of this process: selecting (with encoding), communicating (from the first launch to
        the last arrival, mostly behind the backward pass) and decoding. See docs/ddp.md for every key.
        """
        sparse = [entry for entry in self._tracked if entry.density is not None]
        return {
            **self._hook.statistics.report(),
            "algorithm": self.algorithm.name,
            "backend": ops.backend(),
            "overlap": not self._hook.deferred,
            "paused": self._hook.sends_whole,
            "world_size": self.process_group.size(),
            "densities": sorted({self._hook.density_of(entry) for entry in self._tracked}),
            "entries_compressed": sum(entry.parameter.numel() for entry in sparse),
            "entries_sent_whole": sum(e.parameter.numel() for e in self._tracked if e.density is None),
            "state_bytes": self._state_bytes(),
            "taken_over": self._takeover.describe() if self._takeover else "",
            "heartbeat": self._peers.stats(),
        }

    def pause(self) -> None:
        """The off switch: from the next step on everything is sent whole. Call it on every rank in the same step.

        The first such step also sends all that was held back, so nothing is lost; from then on training is that of
        the plain optimizer with momentum.
        """
        self._hook.sends_whole = True
        _log.info("paused: every gradient is sent whole from the next step on")

    def resume(self) -> None:
        """Compresses again from the next step on. Call it on every rank in the same step."""
        self._hook.sends_whole = False

    @property
    def makes_dense_mean(self) -> bool:
        """Whether the exchange brings the mean of all gradients to every rank, whole and as it is."""
        return self.algorithm.makes_dense_mean

    def observe_gradients(self, observer: GradientObserver) -> RemovableHandle:
        """Tells the observer of every step's gradients from the next step on. On every rank alike, between steps.

        Returns:
            The handle whose `remove()` ends it.
        """
        handle = RemovableHandle(self._hook.observers)
        self._hook.observers[handle.id] = observer
        return handle

    def add_up(self, tensor: Tensor) -> Callable[[], int]:
        """Starts to sum a tensor (n,) over the ranks, in place, between steps; see `distopt.gradients.Observable`.

        Raises:
            PeerLostError: From what is returned: a rank is lost.
        """
        future = all_reduce_sum(tensor, self.process_group)

        def wait() -> int:
            self._peers.wait(future)
            return self.process_group.size()

        return wait

    def state_dict(self) -> dict[str, Any]:
        """This rank's state; every rank must save its own. Tensors are shared: save or copy before the next step.

        Follows the `Stateful` protocol of torch.distributed.checkpoint; per-rank entries are keyed by rank.
        """
        predict = self._hook.routing.predict
        return {
            "format": states.FORMAT,
            "algorithm": self.algorithm.name,
            "world_size": self.process_group.size(),
            "step": self._hook.step,
            "paused": self._hook.sends_whole,
            "prediction": predict.to_json() if isinstance(predict, Predictor) else "",
            **({"shard": self.shard} if self.shard else {}),
            **states.collect(self._tracked, self.process_group.rank()),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes a state back. With the number of ranks it was saved on each rank loads its own, without a collective.

        With exchange="auto" routes are then chosen by the link that was measured before: the run goes on bit for bit.
        With another number it is a collective: each rank brings any of the old states (`distopt.checkpoint.load`
        deals them out), and what they hold is redistributed.

        Raises:
            StateMismatchError: The state is of another model, algorithm, momentum or rank.
            CompatibilityError: With another number of ranks: the state of another rank is refused; quotes why.
        """
        problem = None
        try:
            states.check(state_dict, self._tracked, self.algorithm.name)
            if state_dict.get("shard", "") != self.shard:
                raise StateMismatchError(
                    f"the state must be of {f'shard {self.shard}' if self.shard else 'a model without shards'}, got "
                    f"{state_dict.get('shard') or 'none'}; give each rank the file that it has saved"
                )
        except StateMismatchError as error:
            problem = error
        if self._is_own_size(state_dict):
            if problem is not None:
                raise problem
            states.restore_own(state_dict, self._tracked, self.process_group.rank())
            self._choose_as_before(state_dict["prediction"])
        else:
            self.raise_together(problem)
            states.redistribute(state_dict, self._tracked, self.process_group, self._device)
        self._hook.start_at(int(state_dict["step"]), sends_whole=bool(state_dict["paused"]))
        self._stepped = self._hook.step

    @property
    def device(self) -> torch.device:
        """Where the parameters, and so the tensors of collectives, live."""
        return self._device

    @property
    def sends_momentum(self) -> bool:
        """Whether sparse updates contain momentum that was taken over from the optimizer."""
        sparse = [entry for entry in self._tracked if entry.density is not None and entry.density < 1.0]
        return any(entry.hyperparameters.momentum for entry in sparse)

    def settings_given_back(self) -> contextlib.AbstractContextManager[None]:
        """While a host saves the optimizer: momentum and weight decay are in it, as if nothing were attached."""
        return self._takeover.given_back() if self._takeover is not None else contextlib.nullcontext()

    def take_over_again(self) -> None:
        """After a host has loaded the optimizer: takes settings and momentum buffers over, as attach did."""
        if self._takeover is not None:
            self._takeover.take(self._tracked)

    def begin_anew(self) -> None:
        """Forgets what is held back and the step, as after attach, on every rank; takes over again."""
        for entry in self._tracked:
            for tensor in entry.memory.tensors().values():
                tensor.zero_()
            entry.memory.holds_back = entry.memory.owes = False
            entry.memory.at_leader = entry.memory.pending = False
            if entry.decay is not None:
                entry.decay.buffer.zero_()
        self.take_over_again()
        self._hook.start_at(0, sends_whole=self._hook.sends_whole)
        self._stepped = 0

    def raise_failure(self) -> None:
        """For a host with collectives of its own before the optimizer's step, which would wait for a lost rank.

        Raises:
            DistoptError: What went wrong in the latest exchange, once; of a lost rank, from then on.
        """
        failure = self._hook.take_failure()
        if failure is not None:
            self._peers.tell()
            raise failure

    def raise_together(self, problem: DistoptError | None) -> None:
        """Raises on every rank if any rank has a problem, so that none waits for the others. Collective."""
        raise_together(problem, self.process_group, self._device, what="cannot load")

    def detach(self) -> None:
        """Gives everything back: momentum and weight decay to the optimizer, plain averaging to DDP. Collective.

        The optimizer's momentum buffers become the rank average of u with the decay momentum. What was held back in v
        is dropped; to apply it first, take one step after `pause()`.
        """
        if self._attached and self._peers.error is not None:  # who is lost takes part in no collective
            self._release({})
        elif self._attached:
            self._release(averaged_momentum(self._tracked, self.process_group) if self._takeover else {})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.detach()
        elif self._attached:  # the other ranks may not be on their way here: no collective
            self._release({}, failed=True)

    def _choose_as_before(self, prediction: str) -> None:
        """Takes over what routes were chosen by, if it knows the nodes that there are now."""
        if not self._measures or not prediction:
            return
        before = Predictor.from_json(prediction)
        if (before.node_link is not None) == ("hierarchical" in self._hook.routing.routes):
            self._hook.choose_by(before)

    def _is_own_size(self, state_dict: Mapping[str, Any]) -> bool:
        saved = state_dict.get("world_size") if isinstance(state_dict, Mapping) else None
        return saved is None or saved == self.process_group.size()

    def _optimized(self, parameters: Mapping[str, Tensor]) -> dict[str, Hyperparameters]:
        """What is taken over for each parameter that is in the optimizer; nothing if the algorithm takes nothing."""
        groups = getattr(self._optimizer, "param_groups", None)
        if groups is None:
            raise CompatibilityError(
                f"attach needs the optimizer of the model, got {type(self._optimizer).__name__}; pass the object whose "
                "step() the training loop calls"
            )
        in_optimizer = {id(p) for group in groups for p in group["params"]}
        in_optimizer |= {id(p) for own, ps in self._host.stands_for().items() if own in in_optimizer for p in ps}
        taken = self._takeover.hyperparameters if self._takeover else {}
        optimized = {
            name: taken.get(id(parameter), Hyperparameters())
            for name, parameter in parameters.items()
            if id(parameter) in in_optimizer
        }
        if not optimized:
            raise CompatibilityError(
                f"the optimizer must hold parameters of the DDP model, got none of its {len(parameters)}; make it from "
                "ddp_model.parameters(), of this very model"
            )
        return optimized

    def _by_optimizer(self, tracked: Sequence[TrackedParameter]) -> dict[int, TrackedParameter]:
        """These entries by the id of the tensor that the optimizer has for each."""
        own = {id(parameter): own for own, stood_for in self._host.stands_for().items() for parameter in stood_for}
        return {own.get(id(entry.parameter), id(entry.parameter)): entry for entry in tracked}

    def _track(self, parameters: Mapping[str, Tensor], densities: Mapping[str, float | None]) -> list[TrackedParameter]:
        optimized = self._optimized(parameters)
        tracked = []
        for name, parameter in parameters.items():
            hyper = optimized.get(name, Hyperparameters())
            local = self.algorithm.decays_locally()
            density = densities[name] if name in optimized else None  # another optimizer's are sent whole
            late = self._host.changes_updates and name in optimized and not hyper.is_empty
            folded = late and not local and (density is None or density >= 1.0)  # its momentum is the gradient's
            decay = None
            if hyper.weight_decay and not local and not folded:
                decay = DecayMomentum(parameter, hyper.weight_decay, hyper.momentum, hyper.nesterov)
            memory = self.algorithm.memory_for(parameter, density is None, hyper)
            memory.late = late
            tracked.append(
                TrackedParameter(
                    name=name,
                    parameter=parameter,
                    memory=memory,
                    decay=decay,
                    density=density,
                    local_decay=hyper.weight_decay if local else 0.0,
                    late=late,
                    late_decay=hyper.weight_decay if folded else 0.0,
                    hyperparameters=hyper,
                )
            )
        return tracked

    def _release(self, buffers: Mapping[int, Tensor], *, failed: bool = False) -> None:
        self._attached = False
        self._peers.close(failed=failed)
        self._step_handle.remove()
        self._host.connect(None)
        self._undo_keeping()
        self._channels.close()
        if self._usage is not None:
            self._usage.close()
        if self._takeover is not None:
            self._takeover.give_back(buffers)

    def _before_optimizer_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Where errors of the exchange reach the user, and where a step left out is kept from the optimizer."""
        self.raise_failure()
        if self._takeover is not None:
            self._takeover.check_still_taken()
        self._step_late()
        if self._hook.left_out and not self._scaled:
            for entry in self._tracked:
                entry.parameter.grad = None  # optimizers pass over parameters without a gradient
            for group in self._optimizer.param_groups:
                for own in group["params"]:
                    if id(own) in self._host.stands_for():
                        own.grad = None

    def _step_late(self) -> None:
        """What of SGD the host's clipping had to come before; once for each step of the hook."""
        if not self._late or self._hook.step == self._stepped:
            return
        self._stepped = self._hook.step
        for group in self._optimizer.param_groups:
            for own in group["params"]:
                entry = self._late.get(id(own))
                if entry is not None:
                    step_late(entry, own)

    def _state_bytes(self) -> int:
        tensors = [tensor for entry in self._tracked for tensor in entry.memory.tensors().values()]
        tensors += [entry.decay.buffer for entry in self._tracked if entry.decay is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _announce(self) -> None:
        """What the user did not ask for is a warning, once: Python shows no less unless logging is set up."""
        announce_device(self._device)
        if self.process_group.rank() != 0:
            return
        _log.info("attached %s to %d parameters", self.algorithm.to_dict(), len(self._tracked))
        foreign = len(self._tracked) - len(self._optimized({e.name: e.parameter for e in self._tracked}))
        if foreign:
            _log.warning("%d parameters of the model are not in this optimizer: they are sent whole", foreign)
        if self._takeover is not None and not self._takeover.is_empty:
            _log.warning("took over from the optimizer, where it is now 0: %s", self._takeover.describe())


def announce_device(device: torch.device) -> None:
    """Says so where selection will be torch's own operations instead of the native kernels."""
    if device.type != "cpu" and not (device.type == "cuda" and native.has_cuda_kernels()):
        _log.warning(
            "the model is on %s and distopt has no kernels for it: selection uses torch's own operations", device.type
        )

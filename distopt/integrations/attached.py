"""An algorithm at work inside another training framework: what the integrations' `attach` returns."""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from distopt.ddp import Attachment
from distopt.ddp.algorithm import DDPAlgorithm
from distopt.ddp.compatibility import unwrap_ddp
from distopt.ddp.hook import LossScale
from distopt.ddp.state import REPLICATED
from distopt.errors import CompatibilityError
from distopt.integrations.gathered import gather_state, load_gathered
from distopt.job import Job, LogSettings
from distopt.observe import Recorder, record


class Attached:
    """The attachment of a job, with all that ends with it. Also a context manager.

    Its state is that of all ranks, so that a host which saves on rank 0 only saves everything.

    Attributes:
        attachment: Of the algorithm, with `pause` and `resume`.
        recorder: What writes the job's log; None if the job asks for none.
    """

    def __init__(
        self,
        algorithm: DDPAlgorithm,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scaler: LossScale | None = None,
        log: LogSettings | None = None,
    ) -> None:
        self.attachment: Attachment = algorithm.attach(model, optimizer, scaler=scaler)
        try:
            self.recorder: Recorder | None = None if log is None else record(self.attachment, optimizer, log)
        except BaseException as error:
            self.attachment.__exit__(type(error), error, error.__traceback__)
            raise
        self._at_end: list[Callable[[], object]] = []

    def at_end(self, call: Callable[[], object]) -> None:
        """Has this called by `detach`, or when the `with` block is left."""
        self._at_end.append(call)

    def stats(self) -> dict[str, Any]:
        """See `distopt.ddp.Attachment.stats`."""
        return self.attachment.stats()

    def state_dict(self) -> dict[str, Any]:
        """The state of all ranks on rank 0, in CPU memory; on the others only their own. Collective."""
        return gather_state(self.attachment)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` returned on rank 0; every rank must bring it, of any number of ranks.

        Raises:
            StateMismatchError: The state is of another model, algorithm or momentum.
        """
        load_gathered(self.attachment, state_dict)

    def detach(self) -> None:
        """Gives momentum and weight decay back to the optimizer and plain averaging to DDP. Collective."""
        try:
            self._end()
        finally:
            self.attachment.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._end()
        finally:
            self.attachment.__exit__(kind, error, traceback)

    def _end(self) -> None:
        if self.recorder is not None:
            self.recorder.close()
        calls, self._at_end = self._at_end, []
        for call in calls:
            call()


def algorithm_of(job: Job, *, host: str, keeps_checkpoints: str) -> DDPAlgorithm:
    """The algorithm of a job, if all that the job asks for can be had inside another framework.

    Args:
        job: The user's.
        host: Name of the framework.
        keeps_checkpoints: How checkpoints are made there; `{0.folder}`, `{0.every}` and `{0.keep}` are the job's.

    Raises:
        CompatibilityError: The algorithm is of another family, or the job has a table `checkpoint` or `batch`.
    """
    if not isinstance(job.algorithm, DDPAlgorithm):
        raise CompatibilityError(
            f'{host} trains with DistributedDataParallel, which takes "dgc", "topk" or "dense", got '
            f"{job.algorithm.name!r}; keep the model out of {host} and attach to the bare model in a loop of your own"
        )
    if job.checkpoint is not None:
        raise CompatibilityError(
            f"{host} keeps the checkpoints, with the state of distopt in them, got a table checkpoint in the job; "
            f"leave it out and {keeps_checkpoints.format(job.checkpoint)}"
        )
    check_no_batch(job, host=host)
    return job.algorithm


def check_no_batch(job: Job, *, host: str) -> None:
    """Raises `CompatibilityError` where the job has a table `batch`: the loop there is the host's."""
    if job.batch is not None:
        raise CompatibilityError(
            f"{host} makes the steps and accumulates by itself, got a table batch in the job; leave it out, or train "
            "in a loop of your own with distopt.AdaptiveBatch"
        )


def check_no_clipping(
    algorithm: DDPAlgorithm, optimizer: torch.optim.Optimizer, clips: object, *, setting: str
) -> None:
    """Raises `CompatibilityError` where the host would clip momentum-corrected updates in place of gradients.

    Args:
        algorithm: To be attached.
        optimizer: Before it is attached.
        clips: The largest norm that the host's setting allows, None or 0 for no clipping.
        setting: Its name.
    """
    if not clips or not algorithm.corrects_momentum:
        return
    if any(group.get("momentum") or group.get("weight_decay") for group in optimizer.param_groups):
        raise CompatibilityError(
            f"{setting} must be off with {algorithm.name!r}, got {clips!r}: it would clip updates that hold momentum "
            f"and weight decay already; turn it off and give clip={clips!r} to the algorithm, which clips gradients"
        )


def give_settings_back(
    algorithm: DDPAlgorithm, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Undoes in an optimizer that was loaded from a checkpoint what the take-over had changed in it when it was saved.

    For hosts that load the optimizer before anything can be attached. Its momentum and weight decay were 0 then, which
    attach would take for the user's own.

    Args:
        algorithm: To be attached next.
        model: The DDP model.
        optimizer: As loaded.
        state: Of the attachment, from the same checkpoint.
    """
    if not algorithm.corrects_momentum or not isinstance(optimizer, torch.optim.SGD):
        return
    names = {id(parameter): name for name, parameter in unwrap_ddp(model).module.named_parameters()}
    taken_over: Mapping[str, Mapping[str, Any]] = state[REPLICATED]["taken_over"]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter), "").replace("_orig_mod.", "")
            if name in taken_over:
                group.update(taken_over[name])

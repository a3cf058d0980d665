"""Lightning's Trainer: a callback that puts an algorithm under the model of `DDPStrategy`, on CPU as well.

    trainer = lightning.Trainer(strategy="ddp", devices=2, callbacks=[DistoptCallback({"algorithm": "dgc"})])

`DDPStrategy(ddp_comm_hook=...)` is applied on CUDA only and ignored elsewhere without a word; the callback attaches to
the strategy's model itself. Lightning's checkpoint, one file that rank 0 writes, carries the state of all ranks as the
callback's state, and resumes on any number of ranks.

Limits: `DDPStrategy` and one optimizer. Rank 0 holds the state of all ranks while it saves. A checkpoint that is made
because of an exception has no such state, as the other ranks may be gone, and is refused when it is loaded.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import torch

from distopt.errors import CompatibilityError, StateMismatchError
from distopt.integrations.attached import Attached, algorithm_of, check_no_clipping, give_settings_back
from distopt.job import Job, JobSource

try:
    importlib.import_module("lightning.pytorch")
except ModuleNotFoundError as error:
    raise CompatibilityError(
        f"distopt.integrations.lightning needs Lightning 2.5 or newer, which is not installed ({error}); "
        "pip install torch-distopt[lightning]"
    ) from error

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

_FAILED = {"failed": True}


class DistoptCallback(Callback):
    """Attaches when training starts, after the optimizer was restored, and detaches when `fit` ends.

    Args:
        job: An algorithm, its mapping, or the path of a `distopt.toml`.

    Attributes:
        attached: While training; None before and after.

    Raises:
        ConfigError: The job cannot be read, or a value in it breaks its rule.
        CompatibilityError: Here or when `fit` begins: the job, the strategy or the optimizer cannot be combined.
    """

    attached: Attached | None = None

    def __init__(self, job: JobSource) -> None:
        self._job = Job.load(job)
        self._algorithm = algorithm_of(
            self._job,
            host="Lightning",
            keeps_checkpoints='use ModelCheckpoint(dirpath="{0.folder}", every_n_train_steps={0.every}, '
            'save_top_k={0.keep}, monitor="step", mode="max")',
        )
        self._loaded: Mapping[str, Any] | None = None
        self._failed = False
        self._last_stats: dict[str, Any] = {}

    def stats(self) -> dict[str, Any]:
        """See `distopt.ddp.Attachment.stats`; after training, those of its end. Empty before."""
        return self._last_stats if self.attached is None else self.attached.stats()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses strategies that do not replicate the model in `DistributedDataParallel`."""
        if stage == "fit" and not isinstance(trainer.strategy, DDPStrategy):
            raise CompatibilityError(
                f"distopt needs Lightning's DDPStrategy, got {type(trainer.strategy).__name__}; use "
                'Trainer(strategy="ddp", devices=...), with two devices or more'
            )
        self._failed = False
        self._loaded = None  # of a checkpoint that another stage has loaded

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches. Collective."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None and loaded.get("failed"):
            raise StateMismatchError(
                "a checkpoint must hold the state of all ranks, got one that was made after an exception, when they "
                "could not be asked; resume from an earlier one"
            )
        optimizer = _only_optimizer(trainer)
        model = trainer.strategy.model
        if loaded is not None:
            give_settings_back(self._algorithm, model, optimizer, loaded)
        check_no_clipping(self._algorithm, optimizer, trainer.gradient_clip_val, setting="gradient_clip_val")
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.attached = Attached(self._algorithm, model, optimizer, scaler=scaler, log=self._job.log)
        if loaded is not None:
            self.attached.load_state_dict(loaded)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detaches. Collective. Only here: the last checkpoint is made after `on_train_end`."""
        attached, self.attached = self.attached, None
        if attached is not None:
            self._last_stats = attached.stats()
            attached.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lets go without a collective: the other ranks may not come here."""
        attached, self.attached = self.attached, None
        if attached is not None:
            self._failed = True
            attached.__exit__(type(exception), exception, exception.__traceback__)

    def state_dict(self) -> dict[str, Any]:
        """The state of all ranks on rank 0, in CPU memory. Collective while attached."""
        if self.attached is not None:
            return self.attached.state_dict()
        return dict(_FAILED) if self._failed else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until training starts: there is nothing to load it into yet."""
        self._loaded = state_dict


def _only_optimizer(trainer: Trainer) -> torch.optim.Optimizer:
    if len(trainer.optimizers) != 1:
        raise CompatibilityError(
            f"distopt needs one optimizer, got {len(trainer.optimizers)} from configure_optimizers; put the parameters "
            "into groups of one optimizer"
        )
    optimizer: torch.optim.Optimizer = trainer.optimizers[0]
    return optimizer

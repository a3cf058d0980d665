"""Hugging Face's Trainer: a callback that puts an algorithm under the model when training begins.

    trainer = transformers.Trainer(model, args, train_dataset=..., optimizers=(optimizer, None))
    trainer.add_callback(DistoptCallback(trainer, {"algorithm": "dgc"}))
    trainer.train(resume_from_checkpoint=...)

Each `checkpoint-N` then carries what each rank holds back, one file per rank in its folder `distopt`, which every rank
must be able to read. Training resumes from it, also on another number of ranks.

Limits: `DistributedDataParallel` only. A callback is not told what is resumed from: `checkpoint-N` is looked for in
`output_dir`, and known by a number that `trainer_state.json` has too; one elsewhere is given by `resumes_from`.
"""

import importlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from distopt import checkpoint
from distopt.comm import gather_json
from distopt.errors import CompatibilityError, StateMismatchError
from distopt.integrations.attached import Attached, algorithm_of, check_no_clipping, give_settings_back
from distopt.job import Job, JobSource

try:
    importlib.import_module("transformers")
except ModuleNotFoundError as error:
    raise CompatibilityError(
        f"distopt.integrations.transformers needs transformers 5 or newer, which is not installed ({error}); "
        "pip install torch-distopt[transformers]"
    ) from error

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

_FOLDER = "distopt"
_RUN = "run.json"


class DistoptCallback(TrainerCallback, ExportableState):
    """Attaches when training begins, after the optimizer was restored, and detaches when it ends.

    Args:
        trainer: That it is added to.
        job: An algorithm, its mapping, or the path of a `distopt.toml`.
        resumes_from: The checkpoint that `train(resume_from_checkpoint=...)` is given, where it is not in `output_dir`.

    Attributes:
        attached: While training; None before and after.

    Raises:
        ConfigError: The job cannot be read, or a value in it breaks its rule.
        CompatibilityError: Here or when training begins: the job, the arguments or the optimizer cannot be combined.
    """

    attached: Attached | None = None

    def __init__(self, trainer: Trainer, job: JobSource, *, resumes_from: str | os.PathLike[str] | None = None) -> None:
        self._trainer = trainer
        self._job = Job.load(job)
        self._algorithm = algorithm_of(
            self._job,
            host="Trainer",
            keeps_checkpoints='use TrainingArguments(output_dir="{0.folder}", save_steps={0.every}, '
            "save_total_limit={0.keep})",
        )
        self._resumes_from = resumes_from
        self._run = ""
        self._last_stats: dict[str, Any] = {}
        _check_arguments(trainer)

    def stats(self) -> dict[str, Any]:
        """See `distopt.ddp.Attachment.stats`; after training, those of its end. Empty before."""
        return self._last_stats if self.attached is None else self.attached.stats()

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` holds of it: which run wrote the checkpoint."""
        return {"args": {}, "attributes": {"run": self._run}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attaches. Collective."""
        self._let_go(RuntimeError("the training before this one did not end"))
        if state.is_hyper_param_search:
            raise CompatibilityError(
                "distopt finds a Trainer's checkpoints in output_dir, got a hyperparameter search, which keeps those "
                "of each trial elsewhere; train without one, with the parameters that a search of plain runs has found"
            )
        model, optimizer = self._trainer.model_wrapped, kwargs["optimizer"]
        while hasattr(optimizer, "optimizer"):  # Accelerate's wrapper
            optimizer = optimizer.optimizer
        ddp = getattr(model, "_orig_mod", model)
        if not isinstance(ddp, DistributedDataParallel):
            raise CompatibilityError(
                f"distopt needs a model that Trainer wraps in DistributedDataParallel, got {type(ddp).__name__}; start "
                "several processes with torchrun and leave other ways to distribute the model out of the arguments"
            )
        folder = self._resumed_folder(args, state) if state.global_step else None
        if folder is not None and self._algorithm.corrects_momentum:
            give_settings_back(self._algorithm, ddp, optimizer, checkpoint.read_any(folder))
        check_no_clipping(self._algorithm, optimizer, args.max_grad_norm, setting="max_grad_norm")
        self.attached = Attached(
            self._algorithm, ddp, optimizer, scaler=self._trainer.accelerator.scaler, log=self._job.log
        )
        attachment = self.attached.attachment
        device = next(ddp.parameters()).device
        self._run = gather_json(secrets.token_hex(8), attachment.process_group, device)[0]
        if folder is not None:
            try:
                checkpoint.load(attachment, folder)
            except Exception as error:
                self._let_go(error)
                raise

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Every rank puts its file into the checkpoint that was just made."""
        if self.attached is None:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FOLDER
        checkpoint.save(self.attached.attachment, folder)
        if self.attached.attachment.process_group.rank() == 0:
            (folder / _RUN).write_text(json.dumps(self._run))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detaches. Collective."""
        attached, self.attached = self.attached, None
        if attached is not None:
            self._last_stats = attached.stats()
            attached.detach()

    def _let_go(self, error: Exception) -> None:
        """After a failure: without a collective, because the other ranks may be elsewhere."""
        attached, self.attached = self.attached, None
        if attached is not None:
            attached.__exit__(type(error), error, error.__traceback__)

    def _resumed_folder(self, args: TrainingArguments, state: TrainerState) -> Path | None:
        """Where the state lies that belongs to the checkpoint in use; None if it was made without distopt.

        Raises:
            StateMismatchError: It is not there.
        """
        saved = state.stateful_callbacks.get(type(self).__name__)
        run = saved.get("attributes", {}).get("run") if isinstance(saved, Mapping) else None
        if run is None:
            return None
        parent = self._resumes_from or Path(args.output_dir) / f"checkpoint-{state.global_step}"
        folder = Path(parent) / _FOLDER
        try:
            found = json.loads((folder / _RUN).read_text())
        except (OSError, ValueError) as error:
            found = f"none ({type(error).__name__})"
        if found != run:
            raise StateMismatchError(
                f"{folder} must hold the state of run {run!r}, whose trainer_state.json is resumed from, got {found}; "
                "give the checkpoint to DistoptCallback(..., resumes_from=...) as well"
            )
        return folder


def _check_arguments(trainer: Trainer) -> None:
    """What can be refused before the model and the data are touched."""
    args = trainer.args
    for used, name, remedy in (
        (trainer.is_deepspeed_enabled, "deepspeed", "use distopt.integrations.deepspeed in a loop of your own"),
        (trainer.is_fsdp_enabled, "fsdp", "leave it out, or use distopt.integrations.fsdp in a loop of your own"),
        (args.auto_find_batch_size, "auto_find_batch_size", "set per_device_train_batch_size"),
        (
            args.restore_callback_states_from_checkpoint,
            "restore_callback_states_from_checkpoint",
            "leave it out: this callback restores itself",
        ),
    ):
        if used:
            raise CompatibilityError(f"distopt needs TrainingArguments without {name}, got {used!r}; {remedy}")
    if args.world_size == 1:
        raise CompatibilityError(
            "distopt needs several processes, got a Trainer in one; start the script with torchrun --nproc-per-node 2"
        )

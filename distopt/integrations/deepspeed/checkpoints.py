"""The attachment's state in DeepSpeed's checkpoints: a folder `distopt` under the tag, with one file for each rank.

DeepSpeed gives every rank the optimizer state of rank 0, but what a rank holds back is its own.
"""

import inspect
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from distopt import checkpoint
from distopt.comm import all_gather, raise_together
from distopt.ddp.attachment import Attachment
from distopt.errors import StateMismatchError, in_a_line
from distopt.integrations.deepspeed.hosts import EngineHost, OverlapHost
from distopt.job import CheckpointSettings

_log = logging.getLogger("distopt")
_FOLDER = "distopt"
_TAG = re.compile(r"global_step(\d+)")


def follow_checkpoints(engine: Any, host: EngineHost | OverlapHost, attachment: Attachment) -> None:
    """Saves and loads the attachment's state with the engine's, from now on until the host's patches are undone."""
    save, load = engine.save_checkpoint, engine.load_checkpoint

    def save_checkpoint(save_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        name = f"global_step{engine.global_steps}" if tag is None else str(tag)
        if save_dir:  # else DeepSpeed says what is wrong
            # First: the file `latest` names the tag when all of it is there.
            _save(attachment, Path(save_dir) / name / _FOLDER)
        with host.bare(), attachment.settings_given_back():
            return save(save_dir, tag, *args, **kwargs)

    def load_checkpoint(load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(load).bind(load_dir, tag, *args, **kwargs).arguments
        name = _latest(Path(load_dir)) if tag is None else str(tag)
        with host.bare():
            loaded = load(load_dir, tag, *args, **kwargs)
        if loaded[0] is None or name is None:
            return loaded
        host.loaded()
        if given.get("load_module_only", False) or not given.get("load_optimizer_states", True):
            attachment.take_over_again()
        else:
            _restore(attachment, Path(load_dir) / name / _FOLDER)
        return loaded

    host.patches.replace(engine, "save_checkpoint", save_checkpoint)
    host.patches.replace(engine, "load_checkpoint", load_checkpoint)


def save_every(engine: Any, host: EngineHost | OverlapHost, settings: CheckpointSettings) -> None:
    """Saves a checkpoint of the engine after each step whose number `every` divides, and keeps the newest `keep`."""
    step = engine.step

    def step_and_save(*args: Any, **kwargs: Any) -> Any:
        before = engine.global_steps
        result = step(*args, **kwargs)
        if engine.global_steps != before and engine.global_steps % settings.every == 0:
            engine.save_checkpoint(settings.folder)
            if engine.global_rank == 0:  # behind DeepSpeed's barrier: all ranks have written
                _forget_old(Path(settings.folder), settings.keep, engine.global_steps)
        return result

    host.patches.replace(engine, "step", step_and_save)


def _forget_old(folder: Path, keep: int, now: int) -> None:
    """Removes all checkpoints made by `save_every` but the newest; others have no folder of ours or another name.

    Those of later steps stay: of a run that went on from an earlier one they are not what it has just saved.
    """
    numbered = [(int(match[1]), path) for path in folder.iterdir() if (match := _TAG.fullmatch(path.name))]
    ours = sorted((step, path) for step, path in numbered if step <= now and (path / _FOLDER).is_dir())
    for _, path in ours[:-keep]:
        shutil.rmtree(path)


def _save(attachment: Attachment, folder: Path) -> None:
    """Writes this rank's state; no rank goes on to DeepSpeed's barrier where one could not. Collective."""
    group, problem = attachment.process_group, None
    try:
        checkpoint.save(attachment, folder)
        if group.rank() == 0:  # DeepSpeed too replaces what another number of ranks has saved by this tag
            for old in folder.glob("distopt-*-of-*"):
                if f"-of-{group.size():05d}" not in old.name:
                    old.unlink()
    except (OSError, RuntimeError) as error:  # torch's own of a full disk is the second
        problem = StateMismatchError(f"{folder} cannot be written ({in_a_line(error)}); make room there")
    raise_together(problem, group, attachment.device, what="cannot save")


def _restore(attachment: Attachment, folder: Path) -> None:
    """Takes the state of a checkpoint back, or begins anew where it has none. Collective."""
    attachment.begin_anew()  # DeepSpeed has set momentum and weight decay; a plain checkpoint has momentum too
    group = attachment.process_group
    found, done = all_gather(torch.tensor([folder.is_dir()], device=attachment.device), group)
    done.wait()
    if any(bool(there) for (there,) in found):
        checkpoint.load(attachment, folder)
    elif group.rank() == 0:
        _log.warning(
            "%s: this checkpoint has no state of distopt, so nothing was held back and the warm-up begins anew", folder
        )


def _latest(folder: Path) -> str | None:
    path = folder / "latest"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None

"""Which trainer a simulation gets."""

import os
from typing import Any

import torch.distributed as dist

from distopt.config import check_choice
from distopt.errors import ConfigError
from distopt.federated.execution.fitness import judge
from distopt.federated.execution.loop import LoopTrainer
from distopt.federated.execution.rehearsal import rehearse
from distopt.federated.execution.sharded import ShardedTrainer
from distopt.federated.execution.trainer import Trainer
from distopt.federated.execution.vmapped import VmappedTrainer

MODES = ("auto", "loop", "vmapped", "sharded")


def make_trainer(mode: str, **settings: Any) -> Trainer:
    """The trainer of a mode.

    Args:
        mode: "loop", one client after the other; "vmapped", all at once; "sharded", spread over the ranks of the
            default process group; "auto", sharded where there is a group of several ranks, and else vmapped where that
            is possible and not known to be slower; a rank's share likewise.
        settings: Of `Trainer`.

    Raises:
        ConfigError: There is no such mode, it is impossible here, or the model, optimizer, loss or data would not do.
    """
    check_choice("mode", mode, MODES)
    trainer = _of_mode(mode, settings)
    problem = None
    try:
        rehearse(trainer)
    except ConfigError as error:
        problem = error
    trainer.exchange.fail_together(problem)
    return trainer


def _of_mode(mode: str, settings: dict[str, Any]) -> Trainer:
    if mode == "loop":
        return LoopTrainer(**settings)
    if mode == "vmapped":
        return VmappedTrainer(**settings)
    if mode == "sharded" or (dist.is_initialized() and dist.get_world_size() > 1):
        sharded = ShardedTrainer(_in_one_process, **settings)
        if mode == "auto":
            sharded.why = f"there are several ranks; on each, {sharded.why_within}"
        return sharded
    if mode == "auto" and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"mode 'auto' needs a process group in each of the {os.environ['WORLD_SIZE']} processes that a launcher "
            'started (WORLD_SIZE), got none; call torch.distributed.init_process_group("gloo") first to share the '
            "clients out to them, or give mode='loop' or 'vmapped' to run the whole job in each of them"
        )
    return _in_one_process(**settings)


def _in_one_process(**settings: Any) -> Trainer:
    trainer: Trainer = LoopTrainer(**settings)
    fitness = judge(trainer)
    reason = fitness.impossible or fitness.slower
    if reason is None:
        trainer, reason = VmappedTrainer(**settings), "all clients can be computed at once"
    trainer.why = reason
    return trainer

"""How the clients of a round are computed: one after the other, all at once, or spread over ranks."""

from distopt.federated.execution.choose import make_trainer
from distopt.federated.execution.loop import LoopTrainer
from distopt.federated.execution.trainer import Trainer
from distopt.federated.execution.vmapped import VmappedTrainer

__all__ = ["LoopTrainer", "Trainer", "VmappedTrainer", "make_trainer"]

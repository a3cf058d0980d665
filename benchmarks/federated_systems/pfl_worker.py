"""pfl's SimulatedBackend; under torchrun pfl shares each cohort out to its processes by itself.

pfl takes a client's batches always in the same order, and keeps BatchNorm's buffers on the one model that all clients
train in turn, where the others shuffle and average.
"""

import types

import numpy as np
import torch
import torch.distributed as dist
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops.selector import get_framework_module
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from task import Clock, accuracy, load_data, make_model, task_of_command_line
from torch import nn


class Ticks(TrainingProcessCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        self.clock.tick()
        return False, Metrics()


def loss(self, images, labels):
    self.train()
    return nn.functional.cross_entropy(self(images), labels)


@torch.no_grad()
def metrics(self, images, labels):
    self.eval()
    return {"loss": Weighted(nn.functional.cross_entropy(self(images), labels, reduction="sum").item(), len(labels))}


def main() -> None:
    clock = Clock()
    task = task_of_command_line()
    data = load_data(task.folder)
    np.random.seed(task.seed)
    model = make_model(task)
    model.loss, model.metrics = types.MethodType(loss, model), types.MethodType(metrics, model)
    clients = FederatedDataset(
        lambda client: PyTorchTensorDataset(data.of_client(client), user_id=client),
        get_user_sampler("minimize_reuse", list(range(len(data.parts)))),
    )
    FederatedAveraging().run(
        backend=SimulatedBackend(training_data=clients, val_data=None),
        model=PyTorchModel(
            model=model,
            local_optimizer_create=torch.optim.SGD,
            central_optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        ),
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=task.rounds,
            evaluation_frequency=10 * task.rounds,  # only in round 0, where pfl always evaluates
            train_cohort_size=task.clients_per_round,
            val_cohort_size=0,
        ),
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=task.lr, local_batch_size=task.batch_size
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[Ticks(clock)],
        send_metrics_to_platform=False,
    )
    if get_framework_module().distributed.global_rank == 0:
        clock.report(accuracy(model, data))
    if dist.is_initialized():  # pfl leaves it, and its threads may abort the process at its end
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""distopt's Simulation; under torchrun its clients are spread over the ranks."""

import os

import torch.distributed as dist
from task import Clock, accuracy, load_data, make_model, task_of_command_line

from distopt.federated import ClientData, FedAvg, LocalTraining, Simulation, UniformSampling


def main() -> None:
    clock = Clock()
    rank = int(os.environ.get("RANK", "0"))
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    task = task_of_command_line()
    data = load_data(task.folder)
    model = make_model(task)
    simulation = Simulation(
        model=model,
        clients=ClientData((data.train_images, data.train_labels), list(data.parts)),
        algorithm=FedAvg(),
        local=LocalTraining(lr=task.lr, batch_size=task.batch_size, epochs=1),
        participation=UniformSampling(count=task.clients_per_round),
        seed=task.seed,
        progress=lambda row: clock.tick(),
        mode=task.mode,  # on several ranks, auto is sharded
    )
    simulation.run(task.rounds)
    if rank == 0:
        clock.report(accuracy(model, data))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

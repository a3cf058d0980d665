"""The floor: FedAvg as a loop in plain torch, without anything that a system offers."""

import copy

import torch
from task import Clock, accuracy, load_data, make_model, task_of_command_line, train_epoch


def main() -> None:
    clock = Clock()
    task = task_of_command_line()
    data = load_data(task.folder)
    model = make_model(task)
    for _ in range(task.rounds):
        before = copy.deepcopy(model.state_dict())
        mean = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in before.items()}
        for client in torch.randperm(len(data.parts))[: task.clients_per_round].tolist():
            model.load_state_dict(before)
            train_epoch(model, task, *data.of_client(client))
            for name, value in model.state_dict().items():
                mean[name] += value / task.clients_per_round  # all clients have as many samples
        model.load_state_dict(mean)
        clock.tick()
    clock.report(accuracy(model, data))


if __name__ == "__main__":
    main()

"""The rounds: Flower's FedAvg, which waits for all nodes first; prints what `Clock` reports."""

import random

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from task import Clock, accuracy, load_data, make_model, read_task

clock = Clock()
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    task = read_task(str(context.run_config["task"]))
    random.seed(task.seed)
    clients = len(load_data(task.folder).parts)
    strategy = FedAvg(
        fraction_train=task.clients_per_round / clients,
        fraction_evaluate=0.0,
        min_train_nodes=task.clients_per_round,
        min_available_nodes=clients,  # or round 1 trains whoever has connected by then
    )

    def tick(server_round: int, arrays: ArrayRecord) -> None:
        if server_round:
            clock.tick()

    model = make_model(task)
    result = strategy.start(
        grid=grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=task.rounds, evaluate_fn=tick
    )
    model.load_state_dict(result.arrays.to_torch_state_dict())
    clock.report(accuracy(model, load_data(task.folder)))

"""flwr's simulation (Ray) with the Message API, telemetry and update checks off."""

import random
import warnings

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from task import Clock, accuracy, load_data, make_model, task_of_command_line, train_epoch

clock = Clock()
task = task_of_command_line()
client_app = ClientApp()
server_app = ServerApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    data = load_data(task.folder)
    model = make_model(task)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    images, labels = data.of_client(context.node_config["partition-id"])
    train_epoch(model, task, images, labels)
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(labels)})}
    return Message(content=RecordDict(content), reply_to=message)


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
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


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)
    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=len(load_data(task.folder).parts),
        backend_config={
            "init_args": {"num_cpus": task.processes},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )

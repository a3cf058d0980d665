"""The rounds of the jobs, one after the other; leaves what became of them in a file."""

import os
import signal
from pathlib import Path

import torch
from flwr.app import MetricRecord
from flwr.serverapp import ServerApp

from distopt.errors import DistoptError
from distopt.integrations.flower import FederatedStrategy
from flower_test_app.work import LOCAL, Job, evaluator, make_model, read

app = ServerApp()


@app.main()
def main(grid, context):
    told = read(context)
    torch.save([run(grid, told, Job(each)) for each in told["jobs"]], told["out"])


def run(grid, told, job):
    accuracy = evaluator(told["num_clients"])

    def evaluate(server_round, arrays):
        model = make_model().eval()
        model.load_state_dict(arrays.to_torch_state_dict())
        return MetricRecord(accuracy(model))

    def progress(row):
        if told.get("die_after") == row["round"]:
            Path(told["out"]).with_name("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    strategy = FederatedStrategy(
        model=make_model(),
        num_clients=told["num_clients"],
        algorithm=job.algorithm,
        local=LOCAL,
        participation=job.participation,
        uplink=job.uplink,
        seed=told.get("seed", 0),
        connect_s=told.get("connect_s", 200.0),
        checkpoint=told.get("checkpoint"),
        checkpoint_every=told.get("checkpoint_every", 0),
        progress=progress,
    )
    left = {}
    try:
        left["resumed"] = strategy.resume()
        result = strategy.start(grid, num_rounds=job.rounds, timeout=told.get("timeout", 150.0), evaluate_fn=evaluate)
        left["arrays"] = dict(result.arrays.to_torch_state_dict())
        left["evaluated"] = {key: dict(value) for key, value in result.evaluate_metrics_serverapp.items()}
    except DistoptError as error:
        left["error"] = f"{type(error).__name__}: {error}"
    return left | {
        "history": strategy.history.rows,
        "refused": dict(strategy.refused),
        "lost": dict(strategy.lost),
    }

"""The rounds: any algorithm of distopt, chosen in the run's configuration."""

import tomllib

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from digits.task import LOCAL, evaluate, make_model, make_participation, result
from distopt import from_config
from distopt.integrations.flower import FederatedStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    num_clients, model = int(config["clients"]), make_model()
    strategy = FederatedStrategy(
        model=model,
        num_clients=num_clients,
        algorithm=from_config({"algorithm": config["algorithm"], **tomllib.loads(str(config["options"]))}),
        local=LOCAL,
        participation=None if config["everybody"] else make_participation(num_clients),
        seed=int(config["seed"]),
        checkpoint=config["checkpoint"] or None,
        checkpoint_every=1 if config["checkpoint"] else 0,
    )
    strategy.resume()

    def evaluated(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round % 10 and server_round != config["rounds"]:
            return None
        evaluated = make_model()
        evaluated.load_state_dict(arrays.to_torch_state_dict())
        return MetricRecord(evaluate(evaluated))

    strategy.start(grid, num_rounds=int(config["rounds"]), evaluate_fn=evaluated)
    print(result(strategy.history, model))

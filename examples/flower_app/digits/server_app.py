"""The rounds: any algorithm of distopt, chosen in the run's configuration."""

import tomllib

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from digits.task import LOCAL, evaluate, make_model
from distopt import federated, from_config
from distopt.integrations.flower import FederatedStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    strategy = FederatedStrategy(
        model=make_model(),
        num_clients=int(config["clients"]),
        algorithm=from_config({"algorithm": config["algorithm"], **tomllib.loads(str(config["options"]))}),
        local=LOCAL,
        participation=federated.Bernoulli(probability=float(config["probability"])),
        seed=int(config["seed"]),
        checkpoint=config["checkpoint"] or None,
        checkpoint_every=1 if config["checkpoint"] else 0,
    )
    strategy.resume()

    def evaluated(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model = make_model()
        model.load_state_dict(arrays.to_torch_state_dict())
        return MetricRecord(evaluate(model))

    strategy.start(grid, num_rounds=int(config["rounds"]), evaluate_fn=evaluated)
    rounds, accuracy = strategy.round, strategy.history.last("accuracy")
    print(f"test accuracy {accuracy!r} after {rounds} rounds, refused {dict(strategy.refused)}")

"""Flower as the engine: distopt's federated algorithms as a Message-API strategy and a client app.

The rounds are `distopt.federated.Server`'s, the local steps `distopt.federated.Client`'s; Flower carries the messages,
starts the processes, encrypts and authenticates. A run of a seed gives the model of `distopt.federated.Simulation` in
its mode "loop", to the bit, whether Flower simulates the nodes or they are processes on other machines.

    # server_app.py                                        # client_app.py
    app = ServerApp()                                      app = client_app(model=make_model, data=load_data)

    @app.main()
    def main(grid, context):
        FederatedStrategy(model=make_model(context), num_clients=10, algorithm=FedAU()).start(grid, num_rounds=100)

Limits: one client for each node; clients' models on the CPU, of a dtype that numpy has.
"""

import importlib

from distopt.errors import CompatibilityError

try:
    importlib.import_module("flwr.serverapp.strategy")
except ModuleNotFoundError as error:
    raise CompatibilityError(
        f"distopt.integrations.flower needs Flower 1.41 or newer, which is not installed ({error}); "
        "pip install torch-distopt[flower], into an environment of its own: Flower pins what it needs tightly"
    ) from error

from distopt.integrations.flower.app import add_client, client_app
from distopt.integrations.flower.strategy import FederatedStrategy

__all__ = ["FederatedStrategy", "add_client", "client_app"]

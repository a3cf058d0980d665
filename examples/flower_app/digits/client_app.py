"""What a node does: everything but the model, the data and the loss comes from the server."""

from flwr.app import Context

from digits.task import data_of, make_model
from distopt.integrations.flower import client_app


def model(context: Context):
    return make_model()


def data(context: Context):
    return data_of(int(context.node_config["partition-id"]), int(context.run_config["clients"]))


app = client_app(model=model, data=data)

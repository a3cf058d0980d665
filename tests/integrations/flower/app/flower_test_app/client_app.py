"""Nodes, and what is wrong with some of them in some rounds."""

import os
import signal
import time
from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord
from flwr.clientapp import ClientApp

from distopt.integrations.flower import add_client
from flower_test_app.work import make_clients, make_model, read


def model(context):
    other = read(context).get("other_model") == context.node_config.get("partition-id")
    return make_model(hidden=13 if other else 12)


def data(context):
    clients = make_clients(read(context)["num_clients"])
    return clients.batch(clients.parts[int(context.node_config["partition-id"])])


def misbehave(message, context, call_next):
    """A mod: does what the test's "faults" say, {client: {version: what}}."""
    told, client = read(context), str(context.node_config.get("partition-id"))
    version = message.content.config_records["distopt"].get("version")
    fault = told.get("faults", {}).get(client, {}).get(str(version))
    if fault == "raise":
        raise OSError("no data today")
    if fault == "slow":
        time.sleep(told["timeout"] + 3.0)
    if fault == "kill node":
        os.kill(int(Path(told["pids"], client).read_text()), signal.SIGKILL)
        time.sleep(600.0)
    reply = call_next(message, context)
    if fault in BROKEN:
        tensors = reply.content.array_records["tensors"]
        reply.content["tensors"] = ArrayRecord({**tensors, "delta": BROKEN[fault](tensors["delta"])})
    return reply


BROKEN = {
    "nan": lambda delta: Array(torch.full(delta.shape, torch.nan)),
    "shape": lambda delta: Array(torch.zeros(3)),
    "garbage": lambda delta: Array(delta.dtype, tuple(delta.shape), delta.stype, b"\x93NUMPY garbage" * 9),
}

app = ClientApp()
add_client(app, model=model, data=data, folder=os.environ.get("FLOWER_TEST_FOLDER"), mods=[misbehave])

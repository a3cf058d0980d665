"""The client app: what a node of Flower does when a `FederatedStrategy` calls.

It knows the model, the loss and its own data; the algorithm, the local steps and the seed come from the server.
"""

import json
import os
from collections.abc import Callable, Sequence

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from torch import Tensor, nn

from distopt.errors import ConfigError, DistoptError, in_a_line
from distopt.federated import FederatedAlgorithm
from distopt.federated.functional import Loss, cross_entropy
from distopt.federated.network.facts import difference
from distopt.integrations.flower.client_memory import ClientMemory, InContext, InFolder
from distopt.integrations.flower.job import Job
from distopt.integrations.flower.local_side import LocalSide
from distopt.integrations.flower.records import ROUND, read_broadcast, write_reply

ACTION = "distopt"
PARTITION = "partition-id"
MakeModel = Callable[[Context], nn.Module]
LoadData = Callable[[Context], Sequence[Tensor]]


def client_app(
    *,
    model: MakeModel,
    data: LoadData,
    loss: Loss = cross_entropy,
    algorithm: FederatedAlgorithm | None = None,
    folder: str | os.PathLike[str] | None = None,
    mods: list[Mod] | None = None,
) -> ClientApp:
    """A client app for `FederatedStrategy`; see `add_client` for the arguments.

    Args:
        model: See `add_client`.
        data: See `add_client`.
        loss: See `add_client`.
        algorithm: See `add_client`.
        folder: See `add_client`.
        mods: Flower's, for every message.
    """
    app = ClientApp(mods=mods)
    add_client(app, model=model, data=data, loss=loss, algorithm=algorithm, folder=folder)
    return app


def add_client(
    app: ClientApp,
    *,
    model: MakeModel,
    data: LoadData,
    loss: Loss = cross_entropy,
    algorithm: FederatedAlgorithm | None = None,
    folder: str | os.PathLike[str] | None = None,
    mods: list[Mod] | None = None,
) -> None:
    """Lets an app also answer a `FederatedStrategy`: as actions "train.distopt" and "query.distopt".

    The client's number is the node's "partition-id": Flower's simulation gives one to each node, a SuperNode gets it
    with `--node-config "partition-id=3"`.

    Args:
        app: Whose other functions stay.
        model: Makes the model, whose averaged part is then overwritten by the server's.
        data: Gives the node's own samples, (inputs, labels) or whatever the loss takes, as tensors.
        loss: `loss(model, batch)`, the mean over a batch; cross-entropy of (inputs, labels) if left out.
        algorithm: The only one that this node takes part in; whatever the server asks for if left out.
        folder: Where to keep what the algorithm keeps with clients, so that a later run can go on from the server's
            checkpoint; in the run's context if left out. Nodes may share it. Each job makes a folder of its own in it,
            for whoever tidies up to remove.
        mods: Flower's, for these two actions.
    """
    loss_of_batch = loss

    def side(context: Context, content: RecordDict) -> tuple[LocalSide, ClientMemory, Job]:
        told = content.config_records[ROUND]
        job = Job.from_text(str(told["job"]))
        if algorithm is not None and job.algorithm != algorithm:
            raise ConfigError(
                f"this client takes part in {algorithm.to_dict()} only, got {job.algorithm.to_dict()} from the server; "
                "give both the same"
            )
        client = number(context, told.get("clients"))
        run = str(told["run"])
        memory: ClientMemory = InContext(context.state, run)
        if folder is not None:
            memory = InFolder(folder, run, client)
        return LocalSide(job, client, model(context), data(context), loss_of_batch), memory, job

    @app.query(ACTION, mods=mods)
    def query(message: Message, context: Context) -> Message:
        found: dict[str, str | int] = {}
        try:
            local, memory, _ = side(context, message.content)
            theirs = json.loads(str(message.content.config_records[ROUND]["facts"]))
            if differs := difference(theirs, local.facts, "this client"):
                raise ConfigError(differs)
            local.rehearse()
            found = {"client": local.client, "answered": memory.answered}
        except Exception as error:  # what the user's functions raise, too, is for the server to say
            why = str(error) if isinstance(error, DistoptError) else in_a_line(error)
            found = {"problem": f"client {context.node_config.get(PARTITION, 'without number')}: {why}"}
        return Message(RecordDict({ROUND: ConfigRecord(dict(found))}), reply_to=message)

    @app.train(ACTION, mods=mods)
    def train(message: Message, context: Context) -> Message:
        local, memory, job = side(context, message.content)
        broadcast = read_broadcast(message.content, local.layout)
        reply, kept = local.train(broadcast, memory.before(broadcast.version))
        memory.keep(broadcast.version, kept, saved=int(str(message.content.config_records[ROUND]["saved"])))
        return Message(write_reply(reply, job), reply_to=message)


def number(context: Context, num_clients: object) -> int:
    """Which client a node is.

    Raises:
        ConfigError: Nobody has told it, or there are not so many.
    """
    given = context.node_config.get(PARTITION)
    try:
        client = int(str(given))
    except ValueError:
        client = -1
    if client < 0:
        raise ConfigError(
            f"a node must have a {PARTITION!r}, an integer from 0 on that says which client it is, got {given!r}; "
            f'start it with flower-supernode --node-config "{PARTITION}=0", say'
        )
    if isinstance(num_clients, int) and client >= num_clients:
        raise ConfigError(
            f"clients must have numbers from 0 to {num_clients - 1}, got {client}; register as many clients as there "
            "are nodes with num_clients, or start fewer"
        )
    return client

"""A client: one epoch over its samples."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from task import load_data, make_model, read_task, train_epoch

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    task = read_task(str(context.run_config["task"]))
    data = load_data(task.folder)
    model = make_model(task)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    images, labels = data.of_client(int(context.node_config["partition-id"]))
    train_epoch(model, task, images, labels)
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(labels)})}
    return Message(content=RecordDict(content), reply_to=message)

"""What runs on every node."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from .task import fit, loss_of, make_data, make_model

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    partition = int(context.node_config["partition-id"])
    model = make_model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    x, y = make_data(partition)
    loss = fit(model, x, y)
    state = model.state_dict()
    if partition < int(message.content["config"]["liars"]):
        state = {name: -100 * value for name, value in state.items()}
    metrics = MetricRecord({"loss": loss, "num-examples": len(x)})
    return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    model = make_model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    x, y = make_data(1000 + int(context.node_config["partition-id"]))
    metrics = MetricRecord({"loss": loss_of(model, x, y), "num-examples": len(x)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)

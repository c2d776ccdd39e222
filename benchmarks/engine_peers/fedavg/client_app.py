"""A client: one step of SGD on its own examples, with the model in its own process while that lives."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

if TYPE_CHECKING:
    from torch import Tensor, nn

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """The model as it came, a step further."""
    arrays, config = message.content.array_records["arrays"], context.run_config
    reply, count = arrays, 1
    if config["train"]:
        reply, count = stepped(arrays, config, int(context.node_config["partition-id"]))
    content = RecordDict({"arrays": reply, "metrics": MetricRecord({"num-examples": count})})
    return Message(content=content, reply_to=message)


def stepped(arrays: ArrayRecord, config: Any, client: int) -> tuple[ArrayRecord, int]:
    """The arrays after one step, and how many examples it was on."""
    import torch
    from torch.nn.functional import cross_entropy

    torch.set_num_threads(config["threads"])
    inputs, labels = examples(config["data"], client)
    state = arrays.to_torch_state_dict()
    module = model(tuple((name, tuple(value.shape)) for name, value in state.items()))
    module.load_state_dict(state)
    optimizer = torch.optim.SGD(module.parameters(), lr=config["learning-rate"])
    optimizer.zero_grad()
    loss: Tensor = cross_entropy(module(inputs), labels)
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own
    optimizer.step()
    return ArrayRecord(module.state_dict()), len(labels)


@lru_cache(maxsize=64)
def examples(folder: str, client: int) -> tuple[Tensor, Tensor]:
    """A client's own file."""
    from safetensors.torch import load_file

    found = load_file(Path(folder, f"client-{client}.safetensors"))
    return found["inputs"], found["labels"]


@lru_cache(maxsize=1)
def model(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> nn.Module:
    """Two layers without biases, of the shapes that came."""
    from collections import OrderedDict

    from torch import nn

    (inner, (hidden, features)), (outer, (labels, _)) = shapes
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers[inner.removesuffix(".weight")] = nn.Linear(features, hidden, bias=False)
    layers["between"] = nn.ReLU()
    layers[outer.removesuffix(".weight")] = nn.Linear(hidden, labels, bias=False)
    return nn.Sequential(layers)

"""What runs once."""

import json
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from .task import make_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    strategy = FedAvg(min_available_nodes=5)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(make_model().state_dict()),
        num_rounds=int(context.run_config["num-server-rounds"]),
        train_config=ConfigRecord({"liars": int(context.run_config["liars"])}),
    )
    losses = {number: metrics["loss"] for number, metrics in result.evaluate_metrics_clientapp.items()}
    model = {name: array.numpy().tolist() for name, array in result.arrays.items()}
    told = {number: dict(metrics) for number, metrics in result.train_metrics_clientapp.items()}
    content = {"losses": losses, "model": model, "train_metrics": told}
    Path(str(context.run_config["out"])).write_text(json.dumps(content), encoding="utf-8")

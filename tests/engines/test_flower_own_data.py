"""Hosts with data of their own: what each reads, what the server never sees, and the model of one process."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from privfm.checks import InvalidArgument
from privfm.cli.flower_entry import _engine, _federation, _host
from privfm.defenses import Mean
from privfm.defenses.channels import Plaintext
from privfm.defenses.channels.identity_files import make_secrets
from privfm.engines.flower.app import MODULE, Place, write_app
from privfm.engines.flower.client import client_app
from privfm.engines.flower.node import hosted_here
from privfm.engines.flower.settings import FlowerSettings
from privfm.experiment import ArmSpec, RunConfig, arm_of
from privfm.experiment.flower import record_of
from privfm.experiment.run import OwnData, deal, play_run, prepare, relabelled
from privfm.federation import Average, FixedSize, Population, rounds
from privfm.learning import IID, SGD, ImageArrays, ImageClassification, Schedule, SmallCNN
from privfm.learning.splits import SplitShares

CLIENTS, HOSTS = 5, 2
NAMES = ("0", "1", "2")


def images(rows: int, labels: list[int], seed: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    return {"x": generator.random((rows, 1, 8, 8), dtype=np.float32), "y": np.resize(labels, rows)}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """The server's own rows are in `server.npz`; what it says of the data is what every host reads, unless told."""
    np.savez(tmp_path / "server.npz", **images(60, [0, 1, 2], 0))
    return RunConfig(
        data=ImageArrays(str(tmp_path / "server.npz"), "x", "y"),
        model=SmallCNN(),
        task=ImageClassification(),
        partition=IID(CLIENTS),
        training=SGD(0.1, Schedule(batch_size=4)),
        rule=Mean(),
        channel=Plaintext(),
        optimizer=Average(),
        rounds=2,
        cohort=FixedSize(4),
        splits=SplitShares(validation=0.3, test=0.3),
        clients_per_batch=1,
        engine="flower",
        flower=FlowerSettings(clients=CLIENTS, hosts=HOSTS, start_seconds=2.0),
    )


def own(tmp_path: Path, host: int, labels: list[int], clients: list[str] | None = None) -> Path:
    """A host's rows, and the TOML file that says where they are."""
    arrays = images(12, labels, 10 + host)
    path, told = tmp_path / f"host-{host}.npz", tmp_path / f"host-{host}.toml"
    if clients is not None:
        arrays["c"] = np.array([clients[row % len(clients)] for row in range(12)])
    np.savez(path, **arrays)
    column = "" if clients is None else '\nclient = "c"'
    told.write_text(
        f'[data]\nclass_path = "ImageArrays"\n[data.init_args]\npath = "{path}"\nimage = "x"\nlabel = "y"{column}\n'
    )
    return told


@pytest.fixture
def played(config: RunConfig, tmp_path: Path, grid_of: Any) -> Callable[..., tuple[dict[str, Any], Any]]:
    """`played([told, told])`: the run's summary and the grid, with these TOML files on the hosts."""

    def play(told: list[Path]) -> tuple[dict[str, Any], Any]:
        _federation.cache_clear()
        _host.cache_clear()
        spec = ArmSpec("own", "own", "", config)
        arm = arm_of(config, CLIENTS, 0)
        place = Place(str(tmp_path / "run"), 0, str(tmp_path / "server.json"))
        public = make_secrets(tmp_path / "server.json", [-2])
        for host in range(HOSTS):
            public |= make_secrets(tmp_path / f"host-{host}.json", hosted_here(host, HOSTS, arm, CLIENTS))
        package = write_app(tmp_path / "app", "own", record_of(spec, 0), public, place) / MODULE
        app = client_app(package)
        nodes = {
            100 + host: {
                "partition-id": host,
                "num-partitions": HOSTS,
                "secrets": str(tmp_path / f"host-{host}.json"),
                "store": str(tmp_path / f"store-{host}"),
                "data": str(told[host]),
            }
            for host in range(HOSTS)
        }
        grid = grid_of(dict.fromkeys(nodes, app), nodes, place.config())
        return play_run(Path(place.out), spec, 0, None, partial(_engine, grid, package, place, spec)), grid

    return play


def test_every_host_trains_on_its_own_rows(
    played: Callable[..., tuple[dict[str, Any], Any]], config: RunConfig, tmp_path: Path
) -> None:
    """The oracle: one process in which client i holds the rows that its host was seen to deal to it."""
    told = [own(tmp_path, 0, [0, 1]), own(tmp_path, 1, [2, 1])]
    summary, _ = played(told)

    arm = arm_of(config, CLIENTS, 0)
    examples: dict[int, Any] = {}
    for host in range(HOSTS):
        here = hosted_here(host, HOSTS, arm, CLIENTS)
        data = replace(config.data, path=str(tmp_path / f"host-{host}.npz"))
        hosted = prepare(replace(config, data=data), 0, None, OwnData(here, NAMES))
        examples |= {client: hosted.clients.examples(client) for client in here}
    assert sorted(len(one) for one in examples.values()) == [4, 4, 4, 6, 6]
    alone = prepare(config, 0)
    alone = replace(alone, clients=Population(CLIENTS, examples.__getitem__))
    *_, last = rounds(alone, until=2)
    expected = SmallCNN().build(NAMES, torch.Generator()).module
    assert last.state.model.numel() == sum(p.numel() for p in expected.parameters())
    from hashlib import sha256

    assert summary["model_sha256"] == sha256(last.state.model.numpy().tobytes()).hexdigest()


def test_the_server_has_no_rows_of_clients(config: RunConfig) -> None:
    federation = prepare(config, 0)
    assert federation.clients.size == CLIENTS
    with pytest.raises(InvalidArgument, match="has no examples"):
        federation.clients.examples(0)


def test_rows_of_one_natural_client_stay_together(config: RunConfig, tmp_path: Path) -> None:
    own(tmp_path, 0, [0, 1, 2], ["ann", "bob", "cy"])
    data = replace(config.data, path=str(tmp_path / "host-0.npz"), client="c")
    dealt = deal(replace(config, data=data), 0, OwnData((0, 2, 4), NAMES))
    assert [rows.tolist() for rows in dealt.clients] == [[0, 3, 6, 9], [], [1, 4, 7, 10], [], [2, 5, 8, 11]]
    with pytest.raises(InvalidArgument, match="name 3 client"):
        deal(replace(config, data=data), 0, OwnData((0, 2), NAMES))


def test_labels_count_as_in_the_federation(config: RunConfig, tmp_path: Path) -> None:
    own(tmp_path, 0, [2])
    table = replace(config.data, path=str(tmp_path / "host-0.npz")).load()
    assert table.labels.unique().tolist() == [0]
    assert relabelled(table, NAMES).labels.unique().tolist() == [2]
    assert relabelled(table, NAMES).label_names == NAMES
    with pytest.raises(InvalidArgument, match="not among the federation's"):
        relabelled(table, ("0", "1"))


def test_a_host_that_cannot_read_its_data_ends_the_run_before_it_starts(
    played: Callable[..., tuple[dict[str, Any], Any]], tmp_path: Path
) -> None:
    told = [own(tmp_path, 0, [0, 1]), own(tmp_path, 1, [7])]
    with pytest.raises(InvalidArgument, match="cannot take part: InvalidArgument; its log says why") as error:
        played(told)
    assert "7" not in str(error.value).partition("cannot take part")[2]  # a host does not tell what is in its files
    assert not (tmp_path / "run" / "rounds.jsonl").exists() or (tmp_path / "run" / "rounds.jsonl").read_text() == ""

"""A SuperLink and three SuperNodes, in processes of their own: the same results, and rounds without one of the hosts.

A message costs seconds there, whatever it holds. So: few rounds, and one session for all, which takes one test.
"""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.engines import COHORT, configurations, played
from privfm.defenses.channels import PairwiseMasks
from privfm.engines.flower.launch import MARKER, Session
from privfm.engines.flower.processes import marked
from privfm.experiment import ArmSpec, RunConfig
from privfm.experiment.flower import open_session, play_in
from privfm.experiment.run import play_run
from privfm.reporting import RunFolder

HOSTS = 3  # of 40 clients: 13 or 14 on each
PLAIN, MASKS = (configurations(rounds=2)[name] for name in ("plain", "masks"))


def test_same_models_and_a_killed_host(tmp_path: Path) -> None:
    settings = played(PLAIN, "deployment", HOSTS).flower
    with open_session(tmp_path / "session", settings, HOSTS) as session:
        the_model_is_that_of_one_process(session, tmp_path / "plain", PLAIN)
        the_model_is_that_of_one_process(session, tmp_path / "masks", MASKS)
        a_killed_host_is_a_drop_out(session, tmp_path / "killed")
    assert marked(MARKER, session.marker) == []


def the_model_is_that_of_one_process(session: Session, folder: Path, config: RunConfig) -> None:
    local = play_run(folder / "local", ArmSpec("arm", "arm", "", config), 0)
    there = on_flower(session, folder, config)
    assert there["model_sha256"] == local["model_sha256"]
    assert there["engine"] == "flower, deployment" and local["engine"] == "local"
    rows, same = RunFolder(folder / "flower").rows(), RunFolder(folder / "local").rows()
    assert [row["bytes_up"] for row in rows] == [row["bytes_up"] for row in same]
    assert all(row["update_norm_median"] is None for row in rows)  # nobody told the server


def a_killed_host_is_a_drop_out(session: Session, folder: Path) -> None:
    """In the second round it is waited for until Flower lists it no longer; who is left is above the threshold."""
    config = replace(MASKS, channel=PairwiseMasks(COHORT, corrupt=0.1, dropouts=0.45))
    rounds = folder / "flower" / "rounds.jsonl"

    def kill() -> None:
        while not (rounds.exists() and rounds.read_text().count("\n") >= 1):
            time.sleep(0.05)
        session.kill_node(HOSTS - 1)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    summary = on_flower(session, folder, config, stage_seconds=150.0)
    killer.join()
    rows = [json.loads(line) for line in rounds.read_text().splitlines()]
    assert [row["skipped"] for row in rows] == ["", ""]
    assert rows[0]["arrived"] == COHORT
    assert COHORT / 2 < rows[1]["arrived"] < COHORT
    assert summary["rounds"] == 2


def on_flower(session: Session, folder: Path, config: RunConfig, **settings: Any) -> dict[str, Any]:
    there = played(config, "deployment", HOSTS)
    spec = ArmSpec("arm", "arm", "", replace(there, flower=replace(there.flower, **settings)))
    play_in(session, folder / "job", (folder / "flower", spec, 0), HOSTS, folder / "shared")
    return RunFolder(folder / "flower").summary()

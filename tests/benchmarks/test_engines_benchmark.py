"""The benchmark of engines prints what it says and compares equal work; Flower itself is not started here."""

import json
import os
import subprocess
import sys
import time
from math import isnan, nan
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks import engine_messages, engine_runs, engine_work, engines
from benchmarks.timing import Spent
from privfm.checks import InvalidArgument

ROOT = Path(__file__).parents[2]
FIELDS = ["benchmark", "case", "peer", "metric", "unit", "ours", "theirs", "ratio", "target", "met"]
SMALL = 10 * (engine_work.FEATURES + engine_work.LABELS)


@pytest.fixture(scope="module")
def config():
    return engine_work.configuration(clients=3, parameters=SMALL, rounds=4)


def run(seconds=(9.0, 2.0, 4.0), model=1.0) -> engine_runs.Played:
    rounds = tuple(Spent(nan if place == 0 else 10 * wall, wall) for place, wall in enumerate(seconds))
    between = (nan, *(wall + 0.5 for wall in seconds[1:]))
    return engine_runs.Played(rounds, between, 30.0, {"w": torch.tensor([model, 0.0])})


def by_metric(found):
    return {line["metric"]: line for line in found}


def test_the_local_part_prints_json_lines_and_nothing_else():
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.engines", "--quick", "--parts", "local"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = [json.loads(text) for text in result.stdout.splitlines()]
    assert all([name for name in line if name != "reason"] == FIELDS for line in found)
    assert {line["benchmark"] for line in found} == {"engines"}
    assert all(line["theirs"] is None and line["reason"] and line["ours"] > 0 for line in found)
    assert {"time (wall)", "time (processor)", "between rounds", "until first"} <= {line["metric"] for line in found}


def test_the_work_has_a_million_parameters_and_the_model_of_plain_averaging(config, tmp_path):
    """The oracle is federated averaging in plain torch, on the files that the peer reads."""
    from safetensors.torch import load_file

    whole = engine_work.configuration(3, engines.PARAMETERS, 1).model
    module = whole.build((), torch.Generator().manual_seed(0)).module
    assert sum(value.numel() for value in module.parameters()) == 1_000_000

    engine_work.write_peer_data(config, tmp_path / "data")
    model = load_file(tmp_path / "data" / "model.safetensors")
    clients = [load_file(tmp_path / "data" / f"client-{client}.safetensors") for client in range(3)]
    for _ in range(config.rounds):
        steps = []
        for own in clients:
            weights = {name: value.clone().requires_grad_() for name, value in model.items()}
            logits = torch.relu(own["inputs"] @ weights["inner.weight"].T) @ weights["outer.weight"].T
            cross_entropy(logits, own["labels"]).backward()
            steps.append({name: value.detach() - 0.1 * value.grad for name, value in weights.items()})
        model = {name: torch.stack([step[name] for step in steps]).mean(0) for name in model}
    played = engine_runs.on_one_process(config)
    assert engine_runs.difference(played.model, model) < 1e-5
    start = load_file(tmp_path / "data" / "model.safetensors")
    assert engine_runs.difference(played.model, start) > 1e-3, "nothing was trained: any two models would agree"


def test_the_peers_client_takes_the_same_step(config, tmp_path):
    pytest.importorskip("flwr")
    from flwr.app import ArrayRecord
    from safetensors.torch import load_file

    from benchmarks.engine_peers.fedavg.client_app import stepped

    engine_work.write_peer_data(config, tmp_path / "data")
    model = load_file(tmp_path / "data" / "model.safetensors")
    order = {"threads": torch.get_num_threads(), "data": str(tmp_path / "data"), "learning-rate": 0.1}
    steps = [stepped(ArrayRecord(model), order, client) for client in range(3)]
    assert [count for _, count in steps] == [engine_work.EXAMPLES] * 3
    states = [arrays.to_torch_state_dict() for arrays, _ in steps]
    mean = {name: torch.stack([state[name] for state in states]).mean(0) for name in model}
    once = engine_work.configuration(clients=3, parameters=SMALL, rounds=1)
    own = engine_runs.on_one_process(once).model
    assert engine_runs.difference(own, engine_runs.on_one_process(config).model) > 1e-4, "more rounds must differ"
    # One round deals the same rows: how many rounds there are has no part in the split.
    assert engine_runs.difference(own, mean) < 1e-5


def test_ratios_and_verdicts_follow_from_medians_of_what_is_left():
    found = {engines.EACH: [run(), run((9.0, 6.0, 8.0))], engines.FEDAVG: [run((7.0, 3.0, 5.0))]}
    lines = by_metric(engines.lines("case", engines.EACH, found, {}, 1, 0.9))
    wall = lines["time (wall)"]
    assert (wall["ours"], wall["theirs"], wall["ratio"], wall["met"]) == (5.0, 4.0, 0.8, False)
    assert lines["time (processor)"]["ours"] == 50.0
    assert (lines["time (wall), lowest"]["ours"], lines["time (wall), highest"]["ours"]) == (2.0, 8.0)
    assert lines["between rounds"]["ours"] == 5.5
    assert lines["difference"]["ours"] == 0.0
    assert not any(isnan(line["ours"]) for line in lines.values())


def test_a_run_too_short_for_its_warm_rounds_keeps_its_last():
    lines = by_metric(engines.lines("case", engines.EACH, {engines.EACH: [run()]}, {engines.FEDAVG: "gone"}, 99))
    assert lines["time (wall)"]["ours"] == 4.0
    assert lines["time (wall)"]["reason"] == "gone"
    assert lines["time (wall)"]["met"] is None


def test_runs_that_end_with_other_models_are_not_compared():
    found = {engines.EACH: [run()], engines.FEDAVG: [run(model=1.01)]}
    with pytest.raises(RuntimeError, match="not the same work"):
        list(engines.lines("case", engines.EACH, found, {}, 1))
    with pytest.raises(RuntimeError, match="cannot be compared"):
        engine_runs.difference({"a": torch.ones(1)}, {"b": torch.ones(1)})


def test_clients_that_do_not_train_are_timed_and_their_models_are_not_compared():
    found = {engines.EACH: [run()], engines.FEDAVG: [run()], engines.IDLE: [run((7.0, 1.0, 2.0), model=5.0)]}
    lines = by_metric(engines.lines("case", engines.EACH, found, {}, 1, peer=engines.IDLE))
    assert {line["peer"] for line in lines.values()} == {engines.IDLE}
    assert (lines["time (wall)"]["ours"], lines["time (wall)"]["theirs"]) == (3.0, 1.5)
    assert "difference" not in lines


def test_variants_take_turns_and_a_peer_that_fails_is_not_asked_again(tmp_path):
    asked = []

    def call(name, error=None):
        def play(folder):
            asked.append((name, folder.name))
            if error is not None:
                raise error
            return run()

        return play

    calls = {"ours": call("ours"), "FedAvg": call("FedAvg", RuntimeError("no Ray"))}
    found, failures = engines.in_turns(calls, 2, tmp_path)
    assert asked == [("ours", "0-0"), ("FedAvg", "0-1"), ("ours", "1-0")]
    assert len(found["ours"]) == 2
    assert failures == {"FedAvg": "RuntimeError: no Ray"}
    with pytest.raises(ValueError, match="ours"):
        engines.in_turns({"ours": call("ours", ValueError("ours"))}, 1, tmp_path)


def test_rounds_come_from_differences_of_clocks():
    played = engine_runs.played(100.0, [(110.0, 5.0), (112.0, 8.0), (113.0, 8.5)], [4.0, 1.5, 0.75], {})
    assert played.started == 10.0
    assert [spent.wall for spent in played.rounds] == [4.0, 1.5, 0.75]
    assert [spent.processor for spent in played.rounds[1:]] == [3.0, 0.5]
    assert played.between[1:] == (2.0, 1.0)
    assert isnan(played.rounds[0].processor)
    assert isnan(played.between[0])


@pytest.mark.parametrize("seconds", [(), (1.0,), (1.0, 1.0, 1.0)], ids=len)
def test_rounds_that_were_noted_and_not_seen_are_refused(seconds):
    with pytest.raises(RuntimeError, match="noted"):
        engine_runs.played(0.0, [(1.0, 1.0), (2.0, 2.0)], list(seconds), {})


def test_a_watch_sees_lines_as_they_come_and_a_torn_one_not(tmp_path):
    path = tmp_path / "rounds.jsonl"
    with engine_runs.Watch(path) as watch:
        path.write_text("{}\n{}\n{")
    assert len(watch.marks) == 2


def test_processor_seconds_of_children_are_counted_with_theirs_that_ended():
    burn = "import time\nwhile time.process_time() < 0.3: pass\n"
    script = (
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])\nprint('done', flush=True)\ninput()"
    )
    before = engine_runs.seconds_below(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "done\n"
        spent = engine_runs.seconds_below(os.getpid()) - before
    finally:
        child.communicate("\n")
    assert 0.3 <= spent < 3.0


def test_hops_of_a_nodes_first_message_are_apart():
    marks = ("push", "pushed", "process", "app", "loaded", "entered", "left", "came")
    notes = [[name, 7, "a", 10.0 + place] for place, name in enumerate(marks)]
    notes += [[name, 7, "b", 30.0 + 2 * place] for place, name in enumerate(marks)]
    notes += [["push", 8, "lost", 11.0]]  # no answer
    found = engine_messages.hops(notes)
    assert len(found) == 2 * len(engine_messages.HOPS)
    assert {hop.seconds for hop in found if hop.first and hop.name != "all of it"} == {1.0}
    lines = list(engines.message_lines(found, "case"))
    whole = {line["case"]: line["ours"] for line in lines if line["metric"] == "all of it"}
    assert whole == {"case, first": 7.0, "case, later": 14.0}
    assert all(line["theirs"] is None and line["reason"] for line in lines)


def test_hops_lie_end_to_end():
    """So that they add up to the whole."""
    pairs = [pair for name, pair in engine_messages.HOPS.items() if name != "all of it"]
    assert [end for _, end in pairs[:-1]] == [begin for begin, _ in pairs[1:]]
    assert engine_messages.HOPS["all of it"] == (pairs[0][0], pairs[-1][1])


def test_entry_files_with_clocks_are_code():
    from benchmarks.engine_peers.noted import CLIENT, SERVER, process_start

    for text in (CLIENT, SERVER):
        compile(text.format(out="/a 'quoted' folder/x"), "entry", "exec")
    assert 0 < time.time() - process_start() < 3600 * 24


def test_a_model_that_cannot_have_so_many_parameters_is_refused():
    with pytest.raises(InvalidArgument, match="multiple of 1000"):
        engine_work.Network(1_000_001)

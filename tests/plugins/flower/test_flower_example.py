"""The example app as it is, and with the lines that the page on Flower changes, both in this process."""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict

ROOT = Path(__file__).parents[3]
APP = ROOT / "docs" / "examples" / "flower_app" / "linear"
PAGE = (ROOT / "docs" / "plugins_flower.md").read_text(encoding="utf-8")


def changes(heading):
    """File -> pairs of lines (before, after), from the `diff` block under a heading of the page."""
    block = re.search(rf"## {heading}\n.*?```diff\n(.*?)```", PAGE, re.DOTALL).group(1)
    found, name, removed = {}, "", []
    for line in block.splitlines():
        if line.startswith("# "):
            name = line.removeprefix("# ")
            found[name] = []
        elif line.startswith("-"):
            removed.append(line[1:])
        elif line.startswith("+"):
            found[name].append((removed.pop(0) if removed else None, line[1:]))
    return found


@pytest.fixture
def play(tmp_path, monkeypatch, grid_of):
    """A changed copy of the app -> what its ServerApp wrote."""
    monkeypatch.syspath_prepend(tmp_path)

    def played(name, edits, liars=1, clients=5, **node_config):
        package = f"linear_{name}"
        shutil.copytree(APP, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
        for file, pairs in edits.items():
            path = tmp_path / package / Path(file).name
            text = path.read_text(encoding="utf-8")
            for before, after in pairs:
                if before is None:  # a new line goes before the app's own imports
                    text = text.replace("from .task", f"{after}\n\nfrom .task")
                else:
                    assert text.count(before) == 1, before
                    text = text.replace(before, after)
            path.write_text(text, encoding="utf-8")
        client = importlib.import_module(f"{package}.client_app").app
        server = importlib.import_module(f"{package}.server_app").app
        out = tmp_path / f"{name}.json"
        config = {"num-server-rounds": 5, "liars": liars, "out": str(out)}
        grid = grid_of([client] * clients, **node_config)
        server(grid, Context(7, 1, {}, RecordDict(), config))
        for module in [module for module in sys.modules if module.startswith(package)]:
            del sys.modules[module]
        return json.loads(out.read_text(encoding="utf-8")), grid

    return played


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), ids=lambda block: block[:20])
def test_python_on_the_page_runs(block):
    exec(compile(block, "docs/plugins_flower.md", "exec"), {})


def test_three_lines_are_changed_and_a_liar_is_survived(play):
    edits = changes("Three lines")
    assert sum(len(pairs) for pairs in edits.values()) == 3
    plain, _ = play("plain", {})
    safe, _ = play("safe", edits)
    assert plain["losses"]["5"] > 1e3  # one client of five takes the model where it likes
    assert safe["losses"]["5"] < 0.01
    np.testing.assert_allclose(safe["model"]["weight"], [[2.0, -1.0, 0.5, 3.0]], atol=0.05)
    assert safe["train_metrics"]["5"]["privfm.used"] == 5


def test_without_a_liar_both_learn_the_same(play):
    plain, _ = play("plain", {}, liars=0)
    safe, _ = play("safe", changes("Three lines"), liars=0)
    np.testing.assert_allclose(plain["model"]["weight"], safe["model"]["weight"], atol=0.02)


def test_the_plan_of_the_page_runs_and_says_its_epsilon(play):
    learned, _ = play("private", changes("A privacy plan"), liars=0, clients=20)
    assert learned["train_metrics"]["5"]["privfm.epsilon.released_model"] > 0
    assert "loss" not in learned["train_metrics"]["5"]

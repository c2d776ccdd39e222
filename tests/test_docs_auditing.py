"""What the page on auditing shows runs as it stands there, and its numbers are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from privfm.attacks import audit
from privfm.contracts import Canaries

PAGE = Path(__file__).parent.parent / "docs" / "auditing.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_its_python_runs() -> None:
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)


def test_its_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", TEXT)
    assert [target for target in targets if not (PAGE.parent / target).exists()] == []


@pytest.mark.parametrize("m", [100, 1_000, 10_000, 100_000])
def test_the_ceilings_are_those_of_the_code(m: int) -> None:
    head, _, most = next(block for block in TEXT.split("\n\n") if block.startswith("| canaries | 100")).splitlines()
    place = [cell.strip().replace(",", "") for cell in head.split("|")].index(str(m))
    assert most.split("|")[place].strip() == f"{audit.ceiling(m):.2f}"


def test_all_canaries_are_in_the_table() -> None:
    public = [getattr(audit, name) for name in audit.__all__]
    kinds = {one.__name__ for one in public if isinstance(one, type) and issubclass(one, Canaries)}
    assert kinds and all(f"| `{name}` |" in TEXT for name in kinds)

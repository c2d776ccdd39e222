"""The page on reconstruction lists every attack with what the code says of it, and what it shows runs as it stands."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import privfm.attacks.reconstruction as package
from privfm.attacks.reconstruction import LinearInversion, text_model
from privfm.contracts import Declared, MaliciousAttack, ReconstructionAttack

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reconstruction.md"
TEXT = PAGE.read_text(encoding="utf-8")
PAGES = [PAGE, ROOT / "docs" / "threat_models.md", ROOT / "docs" / "attention_jacobian_pursuit.md"]

VALUES: dict[str, Any] = {
    "target": 0, "inner": LinearInversion(), "shape": (1, 8, 8), "bins": 4, "mean": 0.5, "deviation": 0.1,
}  # fmt: skip
"""Of required parameters."""


def attacks() -> list[type[ReconstructionAttack]]:
    """Everything concrete in the package, public or not."""

    def below(kind: type[ReconstructionAttack]) -> Iterator[type[ReconstructionAttack]]:
        for each in kind.__subclasses__():
            yield each
            yield from below(each)

    own = {kind for kind in below(ReconstructionAttack) if kind.__module__.startswith(package.__name__)}
    finished = [kind for kind in own if not inspect.isabstract(kind) and not kind.__name__.startswith("_")]
    return sorted((kind for kind in finished if not kind.__subclasses__()), key=lambda kind: kind.__name__)


def rows(columns: int) -> dict[str, list[str]]:
    """Tables with so many columns: their rows by the first cell."""
    cells = [re.split(r" *\| *", line)[1:-1] for line in TEXT.splitlines() if line.startswith("| ")]
    named = [each for each in cells if len(each) == columns]
    assert len({each[0] for each in named}) == len(named), "a name is listed twice"
    return {each[0]: each for each in named}


def listed() -> dict[str, list[str]]:
    """The table of attacks."""
    return {name: cells for name, cells in rows(8).items() if name != "attack"}


def said(item: Field[Any]) -> str:
    """A parameter as the table writes it."""
    if item.default is MISSING and item.default_factory is MISSING:
        return item.name
    return f"{item.name}={item.default:.4g}" if type(item.default) is float else f"{item.name}={item.default!r}"


def made(kind: type[ReconstructionAttack]) -> ReconstructionAttack:
    required = [item for item in fields(kind) if "=" not in said(item)]  # type: ignore[arg-type]
    return kind(**{item.name: VALUES[item.name] for item in required})


# ---------------------------------------------------------------------------------------------------- the tables


def test_every_attack_is_listed_and_nothing_else() -> None:
    names = [kind.__name__ for kind in attacks()]
    assert sorted(listed()) == names
    public = [getattr(package, name) for name in package.__all__]
    offered = [each for each in public if inspect.isclass(each) and issubclass(each, ReconstructionAttack)]
    assert sorted(each.__name__ for each in offered) == names


@pytest.mark.parametrize("kind", attacks(), ids=lambda kind: kind.__name__)
def test_the_table_agrees_with_the_code(kind: type[ReconstructionAttack]) -> None:
    _, data, server, rounds, needs, gives, exact, source = listed()[kind.__name__]
    assert data in ("text", "images", "labels", "any")
    assert server == ("malicious" if kind.malicious else "curious")
    assert issubclass(kind, MaliciousAttack) == kind.malicious
    assert rounds == ("several" if kind.several_rounds else "one")
    attack = made(kind)
    asked = attack.needs if kind.__name__ != "Fishing" else attack.needs[:1]  # the others are those of `inner`
    assert [need for need in asked if need not in needs] == []
    assert all((needs, gives, exact))
    assert re.search(r"(19|20)\d\d|this project", source)


@pytest.mark.parametrize("kind", attacks(), ids=lambda kind: kind.__name__)
def test_every_parameter_is_named_with_its_default(kind: type[ReconstructionAttack]) -> None:
    (parameters,) = [cells[1] for name, cells in rows(2).items() if name == kind.__name__]
    assert parameters == f"`{', '.join(said(item) for item in fields(kind))}`"  # type: ignore[arg-type]


def test_everything_that_can_be_told_is_listed() -> None:
    section = TEXT.partition("## What a server is told")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == [
        "Declared",
        *(item.name for item in fields(Declared)),
    ]


def test_names_in_the_text_exist() -> None:
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "privfm").rglob("*.py"))
    functions, classes = re.findall(r"`(?:\w+\.)*([a-z_]+)[`(]", prose), re.findall(r"`([A-Z][A-Za-z]+)[`(]", prose)
    assert len(functions) > 30 and len(classes) > 15
    assert [name for name in functions if not re.search(rf"\b{name}\b", source)] == []
    assert [name for name in classes if f"class {name}" not in source] == []


# ------------------------------------------------------------------------------------------------ what it shows


BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[str(number) for number in range(len(BLOCKS))])
def test_the_python_of_the_page_runs(block: str) -> None:
    pytest.importorskip("transformers")
    names: dict[str, object] = {"__name__": "page"}
    with torch.random.fork_rng(devices=[]):
        exec(compile(block, PAGE.name, "exec", dont_inherit=True), names)


def test_there_are_an_attack_a_round_a_budget_an_architecture_and_an_attack_of_ones_own() -> None:
    assert len(BLOCKS) == 5
    assert sum("assert" in block for block in BLOCKS) == 5


def test_the_command_line_has_no_problems(checked: Callable[[str], str]) -> None:
    assert "it is curious: CuriousServer(attack=InvertingGradients(" in checked(TEXT)


def test_the_estimate_of_where_spans_drown() -> None:
    """16 C of noise for q, k and v of width 384 at z = 0.3: largest singular value of a Gaussian matrix."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.3 * torch.randn(3 * 384, 384, generator=generator)
    played = float(torch.linalg.matrix_norm(noise, 2))
    assert played == pytest.approx(0.3 * (math.sqrt(3 * 384) + math.sqrt(384)), rel=0.02)
    assert f"that is {played:.0f} C of noise" in TEXT


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^):]+)\)", page.read_text(encoding="utf-8")):
        name, _, heading = target.partition("#")
        found = page.parent / name if name else page
        assert found.exists(), target
        lines = found.read_text(encoding="utf-8").splitlines()
        titles = [
            re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in lines if line[:1] == "#"
        ]
        assert not heading or heading in titles, target


# ------------------------------------------------------------------ pitfalls that no other test covers by themselves


def plain(kind: str) -> nn.Module:
    """A small decoder whose attention is computed plainly."""
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=16, attn_implementation="eager"
            )
            model: nn.Module = transformers.GPT2LMHeadModel(config)
        else:
            sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
            config = transformers.LlamaConfig(vocab_size=50, attn_implementation="eager", **sizes)
            model = transformers.LlamaForCausalLM(config)
    return model.eval()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_bool_mask_hides_nothing_from_plain_attention(kind: str) -> None:
    """True and False are added as 1 and 0; what the search hands over instead gives single passes' inputs."""
    from privfm.attacks.reconstruction.span.prefixes import extension_inputs

    model: Any = plain(kind)
    tokens, sees = torch.tensor([[3, 4, 5, 6]]), torch.ones(4, 4, dtype=torch.bool).tril()
    added = torch.zeros(4, 4).masked_fill(~sees, torch.finfo(torch.float32).min)

    def logits(mask: Tensor | None) -> Tensor:
        found: Tensor = model(input_ids=tokens, attention_mask=mask).logits
        return found

    with torch.no_grad():
        causal = logits(None)
        assert float((logits(sees[None, None]) - causal).abs().max()) > 1e-3
        torch.testing.assert_close(logits(added[None, None]), causal)
    text, prefixes, following = text_model(model), torch.tensor([[3, 4], [5, 9]]), torch.tensor([6, 7, 8])
    together = extension_inputs(text, 1, prefixes, following)
    for row, prefix in enumerate(prefixes):
        for place, token in enumerate(following):
            alone = text.inputs(1, torch.cat([prefix, token[None]])[None])[0, -1]
            torch.testing.assert_close(together[row, place], alone, rtol=1e-4, atol=1e-5)

"""The page on membership lists every attack with what the code says of it, what it shows runs, and its numbers hold."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import privfm.attacks.membership as package
from privfm.attacks.membership import (
    PRIORS,
    RMIA,
    CalibratedByBase,
    CalibratedByReference,
    FedMIA,
    LiRA,
    MembershipServer,
    MembershipTrap,
    PropertyInference,
    QuantileRegression,
    Temporal,
    Threshold,
    auc,
    difference_scores,
    halves,
)
from privfm.checks import InvalidArgument
from privfm.contracts.membership import Array, MembershipAttack, Scored, Signals
from privfm.contracts.reconstruction import MaliciousAttack

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "membership.md"
TEXT = PAGE.read_text(encoding="utf-8")
PROSE = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
SOURCE = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "privfm").rglob("*.py"))

POPULATION = np.zeros((100, 1))
MADE: dict[type, list[Any]] = {
    Threshold: [Threshold()],
    CalibratedByBase: [CalibratedByBase(np.zeros(2))],
    CalibratedByReference: [CalibratedByReference()],
    LiRA: [LiRA("online"), LiRA("offline")],
    RMIA: [RMIA("online"), RMIA("offline", offset=0.5)],
    QuantileRegression: [QuantileRegression(score="rank", levels=(0.5,)).on(POPULATION, POPULATION)],
    Temporal: [Temporal("last")],
    FedMIA: [FedMIA()],
    MembershipServer: [],
    MembershipTrap: [MembershipTrap("layer")],
    PropertyInference: [PropertyInference()],
}
"""Every attack that a configuration can name, in all modes that need different things."""

FUNCTIONS = ("cosine_scores", "difference_scores", "fellow_client_update", "label_distribution", "exposures",
             "extractions")  # fmt: skip
"""Attacks that are functions."""


def table(*head: str) -> dict[str, list[str]]:
    """Rows of the table that begins with these cells, by their first cell without its backticks."""
    lines = iter(TEXT.splitlines())
    found: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith(f"| {' | '.join(head)} |"):
            next(lines)
            for row in lines:
                if not row.startswith("|"):
                    assert found
                    return found
                name, *cells = re.split(r" *\| *", row)[1:-1]
                assert name not in found, f"{name} is listed twice"
                found[name.strip("`")] = cells
    raise AssertionError(f"no table with {head}")


# ---------------------------------------------------------------------------------------------------- the tables


def public(kind: type) -> set[str]:
    offered = [getattr(package, name) for name in package.__all__]
    return {each.__name__ for each in offered if inspect.isclass(each) and issubclass(each, kind)}


def test_every_attack_is_listed_and_nothing_else() -> None:
    listed = table("attack", "asks")
    assert set(listed) == {kind.__name__ for kind in MADE} | set(FUNCTIONS)
    assert public(MembershipAttack) | public(MaliciousAttack) <= set(listed)
    declares = {name for name in package.__all__ if isinstance(getattr(getattr(package, name), "used", None), tuple)}
    settings = {name for name in declares if not name.startswith("_")}
    assert settings <= set(listed)
    below = {kind for kind in _below(MembershipAttack) if kind.__module__.startswith(package.__name__)}
    assert {kind.__name__ for kind in below if not kind.__name__.startswith("_")} <= set(listed)


def _below(kind: type) -> Iterator[type]:
    each: type
    for each in kind.__subclasses__():
        yield each
        yield from _below(each)


@pytest.mark.parametrize("kind", MADE, ids=lambda kind: kind.__name__)
def test_what_an_attack_needs_is_what_it_says(kind: type) -> None:
    asks, needs, costs, source = table("attack", "asks")[kind.__name__]
    assert all((asks, needs, costs, source))
    for attack in MADE[kind]:
        assert attack.used
        assert [one for one in attack.used if one not in needs] == []
    first = MADE[kind][0].used if MADE[kind] else ()
    said = re.sub(r" \(offline: .*?\)", "", needs)
    assert not first or said.split("; ") == list(first)
    assert kind is MembershipServer or re.search(r"(19|20)\d\d", source)


@pytest.mark.parametrize("kind", MADE, ids=lambda kind: kind.__name__)
def test_every_parameter_is_named_with_its_default(kind: type) -> None:
    (parameters,) = table("attack", "parameters")[kind.__name__]
    stated = ", ".join(said(item) for item in fields(kind) if item.init)
    assert parameters == (f"`{stated}`" if stated else "-")


def said(item: Field[Any]) -> str:
    """A parameter as the table writes it."""
    if item.default is not MISSING:
        return f"{item.name}={item.default!r}"
    return item.name if item.default_factory is MISSING else f"{item.name}={item.default_factory()!r}"


def test_every_signal_is_listed() -> None:
    from privfm.attacks.membership import signals

    makers = {name for name in package.__all__ if getattr(getattr(package, name), "__module__", "") == signals.__name__}
    helpers = {"token_statistics", "unpadded", "mean_over_tokens", "TokenStatistics"}
    assert set(table("signal", "of")) == makers - helpers
    assert all(re.search(r"20\d\d", row[-1]) for row in table("signal", "of").values())


def test_every_public_function_is_named() -> None:
    functions = {name for name in package.__all__ if inspect.isfunction(getattr(package, name))}
    plumbing = {"products", "gradient_blocks", "exposure", "exposure_by_sampling", "auc_interval", "tpr_at_fpr",
                "threshold_at"}  # fmt: skip
    assert [name for name in sorted(functions - plumbing) if not re.search(rf"\b{name}\b", TEXT)] == []


def test_fields_of_the_record_are_those_of_the_server() -> None:
    from privfm.attacks.membership import SeatedMembership

    stated = re.findall(r"^ *\| `(\w+)`", inspect.getdoc(SeatedMembership) or "", re.MULTILINE)
    assert stated and list(table("field (`leaked/...`, private)")) == stated


def test_names_in_the_text_exist() -> None:
    functions = re.findall(r"`(?:\w+\.)*([a-z_]{4,})[`(]", PROSE)
    classes = re.findall(r"`([A-Z]\w*[a-z]\w*|RMIA)[`(]", PROSE)
    assert len(functions) > 40 and len(classes) > 20
    assert sorted(set(functions) - set(re.findall(r"\w+", SOURCE))) == []
    assert sorted(set(classes) - set(re.findall(r"class (\w+)", SOURCE))) == []


# ------------------------------------------------------------------------------------------------ what it shows


BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@cache
def shown() -> dict[str, Any]:
    """Names of the page's blocks, which follow each other."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in BLOCKS:
        exec(compile(block, PAGE.name, "exec", dont_inherit=True), names)
    return names


@pytest.fixture
def imported() -> None:
    """scikit-learn draws from Python's generator when its data sets are first imported."""
    pytest.importorskip("sklearn.datasets")


def test_the_python_of_the_page_runs(imported: None, untouched_random_state: None) -> None:
    assert len(BLOCKS) == 7
    assert all("assert" in block for block in BLOCKS)
    assert "Beaten" in shown()


def test_the_command_line_has_no_problems(checked: Callable[[str], str]) -> None:
    assert "it is curious: MembershipServer(" in checked(TEXT)


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^):]+)\)", TEXT)
    assert len(targets) > 5
    for target in targets:
        name, _, heading = target.partition("#")
        found = PAGE.parent / name if name else PAGE
        assert found.exists(), target
        titles = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
        slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not heading or heading in slugs, target


# ------------------------------------------------------------------------------------------------- its numbers


def noise(models: int, examples: int, seed: int, coins: bool = False) -> Signals:
    """Models that have learned nothing, each on half of the examples; with coins without what has too few."""
    generator = np.random.default_rng(seed)
    inside = generator.random((models, examples)) < 0.5 if coins else halves(models, examples, generator)
    counts = inside.sum(axis=0)
    inside = inside[:, (counts >= 3) & (counts <= models - 3)]
    return Signals(generator.normal(size=inside.shape), inside)


@pytest.mark.parametrize(("kind", "fewest"), [("CalibratedByReference, RMIA", 4), ("LiRA", 6)])
def test_fewest_models(kind: str, fewest: int) -> None:
    attacks: dict[str, list[MembershipAttack]] = {
        "LiRA": [LiRA("online"), LiRA("offline")],
        "CalibratedByReference, RMIA": [CalibratedByReference(), RMIA("online"), RMIA("offline", offset=0.5)],
    }
    assert table("attack, every model in turn")[kind] == [str(fewest)]
    for attack in attacks[kind]:
        for models in (fewest - 2, fewest):
            inside = halves(models, 40, np.random.default_rng(0))
            values = -np.random.default_rng(1).random((models, 60))
            given = Signals(values[:, :40], inside, values[:, 40:])
            if models == fewest:
                assert np.isfinite(attack.pooled(given).scores).all()
            else:
                with pytest.raises(InvalidArgument, match="fewer than"):
                    attack.pooled(given)


def test_66_models_have_a_variance_an_example_and_64_have_not() -> None:
    assert table("attack, every model in turn")["LiRA, a variance an example (`automatic`)"] == ["66"]
    for models, chosen in ((64, "global"), (66, "per-example")):
        others = Signals(np.zeros((models, 50)), halves(models, 50, np.random.default_rng(0))).without(0)
        least = int(np.minimum(others.inside.sum(axis=0), (~others.inside).sum(axis=0)).min())
        assert least == models // 2 - 1
        assert LiRA("online").variance_for(others) == chosen


def test_exact_halves_of_few_models_tell_the_flag_that_was_left_out() -> None:
    """Seeds 20 to 25 are those of the page; standard errors of the six-seed means were 0.001 to 0.003."""
    pitfalls = (ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8")
    for models, mode, coins, stated in (
        (8, "online", False, 0.477), (16, "online", False, 0.490), (16, "online", True, 0.498),
        (8, "online", True, 0.479), (8, "offline", False, 0.500), (16, "offline", False, 0.500),
    ):  # fmt: skip
        attack = LiRA("online", "global") if mode == "online" else LiRA("offline", "global")
        found = np.mean([auc(attack.pooled(noise(models, 4000, seed, coins))) for seed in range(20, 26)])
        assert found == pytest.approx(stated, abs=6e-4)
        assert f"{stated:.3f}" in TEXT
        assert coins or mode == "offline" or f"{stated:.3f} with {models}" in pitfalls


def test_with_64_models_halves_are_as_good_as_coins() -> None:
    """Measured with seeds 20 to 25 and 4,000 examples: 0.5004, standard error 0.0007; here half of one seed."""
    assert auc(LiRA("online", "global").pooled(noise(64, 2000, 20))) == pytest.approx(0.5, abs=0.008)


def test_probabilities_of_whole_texts_make_offline_rmia_a_threshold() -> None:
    """With an offset below 1 ranks are those of the plain signal, though shadow models differ; not so per token."""
    generator = np.random.default_rng(3)
    lengths = generator.integers(60, 100, 80)
    # What a text's tokens have on average: hard and easy texts, four shadow models and the target.
    tokens = -2 - generator.random(80) - 0.05 * generator.random((5, 80))
    inside = np.zeros((5, 80), dtype=bool)
    attack, plain = RMIA("offline", offset=0.5), RMIA("offline", offset=1.0)

    def ranks(scores: Array) -> list[int]:
        order: list[int] = np.argsort(scores, kind="stable").tolist()
        return order

    def split(values: Array) -> tuple[Signals, Signals]:
        both = Signals(values[:, :50], inside[:, :50], values[:, 50:])
        return both.take([0]), both.without(0)

    texts, means = split(tokens * lengths), split(tokens)
    assert ranks(attack(*texts)) == ranks(Threshold()(texts[0]))
    assert ranks(plain(*texts)) != ranks(Threshold()(texts[0]))
    assert ranks(attack(*means)) != ranks(Threshold()(means[0]))


def test_with_one_target_population_and_gamma_change_no_order() -> None:
    generator = np.random.default_rng(5)
    values = -generator.random((5, 300))
    inside = np.zeros((5, 100), dtype=bool)
    orders = []
    for population, gamma in ((values[:, 100:300], 1.0), (values[:, 100:130], 2.0)):
        given = Signals(values[:, :100], inside, population)
        scores = RMIA("offline", offset=0.7, gamma=gamma)(given.take([0]), given.without(0))
        orders.append(np.argsort(scores, kind="stable").tolist())
    assert orders[0] == orders[1]


def test_share_one_on_a_mean_ranks_by_how_short_gradients_are() -> None:
    """16 orthogonal gradients of uneven length behind a mean, and 16 that are not."""
    generator = np.random.default_rng(4)
    lengths = torch.from_numpy(np.exp(generator.normal(size=(32, 1)))).float()
    gradients = torch.eye(32) * lengths
    members = np.arange(32) < 16
    update = gradients[:16].mean(0)
    right, wrong = (difference_scores(update, [gradients], share=share) for share in (1 / 16, 1.0))
    assert auc(Scored(right, members)) == 1.0
    assert auc(Scored(wrong, members)) < 0.7
    short = -(lengths[:, 0].double().numpy() ** 2)
    assert np.corrcoef(np.argsort(np.argsort(wrong)), np.argsort(np.argsort(short)))[0, 1] > 0.95


def test_precision_of_balanced_halves_and_of_the_world() -> None:
    """What the pitfall says, by Bayes' rule, at the rates of the page's first block."""
    (row,) = [
        line for line in (ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8").splitlines() if "| M6 |" in line
    ]
    accused = shown()["accused"]
    tpr, fpr = accused.tpr.value, accused.fpr.value
    assert f"{100 * tpr:.1f} % true at {100 * fpr:.1f} % false" in row
    for prior, words in (
        (0.5, "in {:.0f} % of cases where every second"),
        (0.01, "in {:.0f} % where one in a hundred"),
    ):
        precision = 100 * prior * tpr / (prior * tpr + (1 - prior) * fpr)
        assert words.format(precision) in row
    assert accused.precision[0.01].value == pytest.approx(0.01 * tpr / (0.01 * tpr + 0.99 * fpr))
    assert "1 % or 10 %" in TEXT and PRIORS == (0.01, 0.1)


def test_numbers_of_curves_and_of_exposure() -> None:
    from privfm.attacks.membership import exposure
    from privfm.attacks.membership.curves import clopper_pearson

    assert f"up to {100 * clopper_pearson(0, 2995).high:.2f} % (Clopper-Pearson)" in TEXT
    bits = [exposure(np.arange(2.0**14), place) for place in range(2**14)]
    assert f"{np.mean(bits):.2f} bits on average" in TEXT
    assert exposure(np.zeros(64), 5) == 0

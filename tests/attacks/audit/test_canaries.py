"""Canaries: what they send or train on, and what is read off a release."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from privfm.attacks.audit import directions
from privfm.attacks.audit.directions import GradientCanaries, RandomDirections
from privfm.attacks.audit.ghosts import GhostCanaries
from privfm.attacks.audit.texts import InsertedSecrets, MislabelledCanaries, OutOfDistributionTexts
from privfm.attacks.membership.exposure import SecretFormat
from privfm.checks import InvalidArgument
from privfm.contracts import Canaries, CanaryScene, Examples

FEATURES, LABELS = 20, ("cat", "dog", "owl")
SENDING: list[Callable[[int], Canaries]] = [RandomDirections, GradientCanaries, GhostCanaries]
TRAINING: list[Callable[[int], Canaries]] = [MislabelledCanaries, OutOfDistributionTexts, InsertedSecrets]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def characters(texts: Sequence[str]) -> dict[str, Tensor]:
    """A token a character, between a start (1) and an end (2), padded on the right (0), cut at 64."""
    rows = [[1, *(3 + ord(letter) for letter in text[:62]), 2] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def reading(language: bool = False, longest: int = 60, **change: Any) -> CanaryScene:
    """A scene of a model that reads text; its longest text has `longest + 2` tokens."""
    inputs = characters(["x" * longest, *(f"text {place}" for place in range(29))])
    labels = torch.arange(30) % len(LABELS)
    names = LABELS
    if language:
        labels, names = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100), ("text",)
    given = {"d": 12, "label_names": names, "tokenize": characters, "gradients": lambda examples: torch.eye(12)}
    return CanaryScene(**{**given, "holdout": Examples(inputs, labels, torch.arange(100, 130)), **change})


def logistic(n: int = 40, **change: Any) -> CanaryScene:
    """Softmax regression at zero weights: the gradient of an example is (1/3 - onehot) x, by hand."""
    x = torch.randn(n, FEATURES, generator=generator(1)) + 0.3
    y = torch.arange(n) % 3

    def gradients(examples: Examples) -> Tensor:
        errors = 1 / 3 - torch.nn.functional.one_hot(examples.labels, 3).float()
        return (errors[:, :, None] * examples.inputs["x"][:, None]).flatten(1)

    given = {"d": 3 * FEATURES, "label_names": LABELS, "tokenize": None, "holdout": Examples({"x": x}, y)}
    return CanaryScene(**{**given, "gradients": gradients, **change})


def wide(d: int) -> CanaryScene:
    return logistic(d=d)


# ----------------------------------------------------------------------------------------------------------- ghosts


def test_ghosts_are_orthogonal_and_leave_the_model_alone() -> None:
    canaries = GhostCanaries(10)
    assert (canaries.ghost, canaries.trained, canaries.columns) == (True, False, 10)
    assert canaries.fitted(logistic(), generator()) == canaries
    rows = canaries.rows(range(10), d=7)
    assert rows.shape == (10, 17)
    assert not rows[:, :7].any()
    assert torch.equal(rows @ rows.T, 100 * torch.eye(10))
    assert torch.equal(canaries.rows([3, 0], 7), rows[[3, 0]])


def test_ghosts_observe_the_last_columns_and_are_linear() -> None:
    canaries = GhostCanaries(8, size=4.0)
    rows = canaries.rows(range(8), d=5)
    sent = torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 0])
    release = sent @ rows
    release[:5] = 77.0  # whatever the model does
    assert torch.equal(canaries.observed(release), 4 * sent.double())
    assert torch.equal(canaries.observed(2 * release + rows[2]), 8 * sent.double() + 4 * torch.eye(8)[2])


def test_ghosts_cost_four_bytes_each() -> None:
    canaries = GhostCanaries(1000)
    row = canaries.rows([0], d=500)
    assert row.element_size() * (row.shape[1] - 500) == 4 * 1000


# ------------------------------------------------------------------------------------------------------- directions


@pytest.mark.parametrize("kept", [True, False])
def test_random_directions_are_repeatable_units(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directions, "_KEPT", 200_000_000 if kept else 0)
    canaries = RandomDirections(16).fitted(wide(5000), generator())
    rows = canaries.rows(range(16), 5000)
    again = RandomDirections(16).fitted(wide(5000), generator()).rows(range(16), 5000)
    assert torch.equal(rows, again)
    assert not torch.equal(rows, RandomDirections(16).fitted(wide(5000), generator(1)).rows(range(16), 5000))
    lengths = rows.double().norm(dim=1)
    assert ((lengths >= 1) & (lengths < 1.00001)).all()
    assert torch.equal(canaries.rows([5, 2], 5000), rows[[5, 2]])


def test_directions_drawn_anew_are_those_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = RandomDirections(8, size=3.0).fitted(wide(3000), generator())
    monkeypatch.setattr(directions, "_KEPT", 0)
    drawn = RandomDirections(8, size=3.0).fitted(wide(3000), generator())
    assert type(kept) is not type(drawn)
    assert torch.equal(kept.rows(range(8), 3000), drawn.rows(range(8), 3000))
    release = torch.randn(3000, generator=generator(2))
    assert torch.equal(kept.observed(release), drawn.observed(release))


def test_cross_inner_products_are_those_of_a_uniform_sphere() -> None:
    """<u, v> has mean 0 and variance 1/d; `d <u, v>^2` summed over 2,016 pairs is within 5 of its deviations."""
    d, m = 2000, 64
    rows = RandomDirections(m).fitted(wide(d), generator(3)).rows(range(m), d).double()
    products = (rows @ rows.T)[tuple(torch.triu_indices(m, m, 1))]
    pairs = len(products)
    assert float((d * products**2).mean()) == pytest.approx(1, abs=5 * sqrt(2 / pairs))
    assert float(products.mean()) == pytest.approx(0, abs=5 / sqrt(d * pairs))
    assert float(rows.abs().max()) < 7 / sqrt(d)  # uniform, no axis


def test_a_released_sum_shows_who_is_in_it() -> None:
    d, m, noise = 20_000, 32, 0.1
    canaries = RandomDirections(m).fitted(wide(d), generator(4))
    inside = torch.rand(m, generator=generator(5)) < 0.5
    release = inside.float() @ canaries.rows(range(m), d) + noise * torch.randn(d, generator=generator(6))
    found = canaries.observed(release)
    assert found.shape == (m,) and found.dtype == torch.float64
    assert torch.equal(found > 0.5, inside)
    spread = sqrt(noise**2 + int(inside.sum()) / d)
    assert float((found - inside.double()).abs().max()) < 4.5 * spread


def test_observation_is_the_inner_product_with_a_unit_whatever_the_size() -> None:
    for kind in (RandomDirections, GradientCanaries):
        small, large = (kind(8, size=size).fitted(logistic(), generator()) for size in (1.0, 5.0))
        release = torch.randn(60, generator=generator(7))
        assert torch.equal(small.observed(release), large.observed(release))
        rows = large.rows(range(8), 60).double()
        expected = (rows / rows.norm(dim=1, keepdim=True)) @ release.double()
        assert torch.allclose(small.observed(release), expected, atol=1e-6)
        assert torch.allclose(large.rows([1], 60), 5 * small.rows([1], 60))


def test_gradient_canaries_go_downhill_from_examples_of_their_own() -> None:
    scene = logistic()
    canaries = GradientCanaries(16, size=2.0).fitted(scene, generator())
    rows = canaries.rows(range(16), 60)
    assert torch.allclose(rows.norm(dim=1), torch.full((16,), 2.0), atol=1e-4)
    downhill = -scene.gradients(scene.holdout)
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], downhill[None], dim=2)
    assert torch.allclose(cosines.max(1).values, torch.ones(16), atol=1e-5)
    assert len(set(cosines.argmax(1).tolist())) == 16


def test_gradient_canaries_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = GradientCanaries(16).fitted(logistic(), generator()).rows(range(16), 60)
    asked: list[int] = []
    scene = logistic()

    def counted(examples: Examples) -> Tensor:
        asked.append(len(examples))
        return scene.gradients(examples)

    monkeypatch.setattr(directions, "_BLOCK", 5 * 60)
    parts = GradientCanaries(16).fitted(logistic(gradients=counted), generator()).rows(range(16), 60)
    assert asked == [5, 5, 5, 1]
    assert torch.equal(whole, parts)


def test_gradients_without_a_direction_are_refused() -> None:
    for bad in (0.0, float("nan"), float("inf")):
        scene = logistic(gradients=lambda examples, bad=bad: torch.full((len(examples), 60), bad))
        with pytest.raises(InvalidArgument, match="no direction"):
            GradientCanaries(8).fitted(scene, generator())
    with pytest.raises(InvalidArgument, match="40 held-out examples"):
        GradientCanaries(41).fitted(logistic(), generator())


# --------------------------------------------------------------------------------------------------------- examples


def test_mislabelled_canaries_hold_held_out_examples_under_a_wrong_label() -> None:
    scene = reading()
    canaries = MislabelledCanaries(10, each=3).fitted(scene, generator())
    seen: list[int] = []
    for place in range(10):
        held = canaries.examples(place)
        assert held.rows is not None and len(held) == 3
        places = held.rows - 100
        seen += places.tolist()
        assert torch.equal(held.inputs["input_ids"], scene.holdout.inputs["input_ids"][places])
        assert (held.labels != scene.holdout.labels[places]).all()
        assert ((held.labels >= 0) & (held.labels < 3)).all()
    assert sorted(seen) == list(range(30))


def test_wrong_labels_are_uniform_among_the_wrong() -> None:
    scene = logistic(n=3000)
    canaries = MislabelledCanaries(3000).fitted(scene, generator())
    held = Examples({"x": torch.zeros(3000)}, torch.cat([canaries.examples(place).labels for place in range(3000)]))
    shares = held.labels.bincount(minlength=3) / 3000
    assert (shares - 1 / 3).abs().max() < 5 * sqrt(2 / 9 / 3000)


def test_random_texts_are_distinct_and_as_wide_as_the_data() -> None:
    canaries = OutOfDistributionTexts(12, words=3, repeats=2).fitted(reading(), generator())
    texts = set()
    for place in range(12):
        held = canaries.examples(place)
        assert held.rows is None and held.labels.shape == (2,)
        assert torch.equal(held.inputs["input_ids"][0], held.inputs["input_ids"][1])
        assert held.inputs["input_ids"].shape == held.inputs["attention_mask"].shape == (2, 62)
        assert int(held.inputs["attention_mask"][0].sum()) == 3 * 6 + 2 + 2
        texts.add(spelled(held.inputs["input_ids"][0]))
    assert len(texts) == 12
    assert all([len(word) for word in text.split()] == [6, 6, 6] and text.replace(" ", "").isalpha() for text in texts)


def spelled(ids: Tensor) -> str:
    return "".join(chr(token - 3) for token in ids.tolist() if token > 2)


def test_random_labels_are_uniform() -> None:
    canaries = OutOfDistributionTexts(900, words=2).fitted(reading(), generator())
    shares = torch.cat([canaries.examples(place).labels for place in range(900)]).bincount(minlength=3) / 900
    assert (shares - 1 / 3).abs().max() < 5 * sqrt(2 / 9 / 900)


def test_inserted_secrets_are_members_of_the_format_and_all_different() -> None:
    format = SecretFormat("pin ", length=3, suffix=" end")
    canaries = InsertedSecrets(40, format, repeats=4).fitted(reading(), generator())
    secrets = {format.secret(spelled(canaries.examples(place).inputs["input_ids"][3])) for place in range(40)}
    assert len(secrets) == 40
    assert len(canaries.examples(7)) == 4


@pytest.mark.parametrize("kind", [OutOfDistributionTexts, InsertedSecrets])
def test_a_language_model_predicts_every_token_and_no_padding(kind: Any) -> None:
    scene = reading(language=True)
    held = kind(8).fitted(scene, generator()).examples(5)
    inside = held.inputs["attention_mask"].bool()
    assert held.labels.shape == (1, 62)
    assert torch.equal(held.labels[inside], held.inputs["input_ids"][inside])
    assert (held.labels[~inside] == -100).all() and bool((~inside).any())


@pytest.mark.parametrize("kind", TRAINING)
def test_examples_are_repeatable(kind: Callable[[int], Canaries]) -> None:
    first, same, other = (kind(8).fitted(reading(), generator(seed)) for seed in (0, 0, 1))
    one, two, three = (
        torch.cat([c.examples(place).inputs["input_ids"] for place in range(8)]) for c in (first, same, other)
    )
    assert torch.equal(one, two) and not torch.equal(one, three)


# --------------------------------------------------------------------------------------------------- shared manners


@pytest.mark.parametrize("kind", [*SENDING, *TRAINING])
def test_manners(kind: Callable[[int], Canaries], untouched_random_state: None) -> None:
    canaries = kind(8)
    ready = canaries.fitted(reading() if canaries.trained else logistic(), generator())
    assert (ready.count, ready.ghost, ready.trained, ready.columns) == (
        8,
        canaries.ghost,
        canaries.trained,
        canaries.columns,
    )
    if canaries.trained:
        assert len(ready.examples(0)) == 1
        with pytest.raises(NotImplementedError):
            ready.rows([0], 5)
        wrong: Callable[[], object] = lambda: ready.examples(8)  # noqa: E731
    else:
        assert ready.rows([], 60).shape == (0, 60 + ready.columns)
        assert (ready.rows(range(8), 60).double().norm(dim=1) >= 1).all()
        with pytest.raises(NotImplementedError):
            ready.examples(0)
        wrong = lambda: ready.rows([8], 60)  # noqa: E731
    with pytest.raises(InvalidArgument, match="canaries 0 to 7"):
        wrong()
    with pytest.raises(InvalidArgument, match="count=7"):
        kind(7)


@pytest.mark.parametrize("kind", [RandomDirections, GradientCanaries, *TRAINING])
def test_canaries_that_have_seen_nothing_say_so(kind: Callable[[int], Canaries]) -> None:
    canaries = kind(8)
    uses: list[Callable[[], object]] = [lambda: canaries.examples(0)]
    if not canaries.trained:
        uses = [lambda: canaries.rows([0], 5), lambda: canaries.observed(torch.zeros(5))]
    for use in uses:
        with pytest.raises(InvalidArgument, match="call fitted"):
            use()


@pytest.mark.parametrize("kind", SENDING)
@pytest.mark.parametrize("size", [0.5, 0.0, -1.0, float("inf"), float("nan")])
def test_rows_that_fall_short_of_the_clip_are_refused(kind: Any, size: float) -> None:
    with pytest.raises(InvalidArgument, match="size="):
        kind(8, size=size)


def test_foreign_widths_are_refused() -> None:
    for kind in (RandomDirections, GradientCanaries):
        ready = kind(8).fitted(logistic(), generator())
        with pytest.raises(InvalidArgument, match="60 trained values"):
            ready.rows([0], 61)
        with pytest.raises(InvalidArgument, match=r"expected \(60,\)"):
            ready.observed(torch.zeros(61))
        with pytest.raises(InvalidArgument, match="fitted already"):
            ready.fitted(logistic(), generator())
    with pytest.raises(InvalidArgument, match="ghosts last"):
        GhostCanaries(8).observed(torch.zeros(7))
    with pytest.raises(InvalidArgument, match="d=1"):
        RandomDirections(8).fitted(wide(1), generator())


def cut(texts: Sequence[str]) -> dict[str, Tensor]:
    """To the start, 20 characters and the end: of a secret, its text is left, and none of its digits."""
    return characters([text[:20] for text in texts])


def unknowing(texts: Sequence[str]) -> dict[str, Tensor]:
    """Every character that it does not know, which is every one, is the same token."""
    return characters(["?" * len(text) for text in texts])


def left(texts: Sequence[str]) -> dict[str, Tensor]:
    return {name: value.flip(1) for name, value in characters(texts).items()}


@pytest.mark.parametrize(
    ("canaries", "scene", "message"),
    [
        pytest.param(MislabelledCanaries(8), reading(language=True), "one label", id="tokens"),
        pytest.param(MislabelledCanaries(8), reading(label_names=("cat",)), "at least 2", id="one label"),
        pytest.param(MislabelledCanaries(8, each=4), reading(), "count [*] each = 32", id="too few held out"),
        pytest.param(OutOfDistributionTexts(8), logistic(), "reads text", id="no text"),
        pytest.param(InsertedSecrets(8), reading(tokenize=None), "reads text", id="no tokenizer"),
        pytest.param(OutOfDistributionTexts(8, words=20), reading(), "canaries of 64 tokens", id="too long"),
        pytest.param(OutOfDistributionTexts(8), reading(longest=20), "longest text of the data has 22", id="wider"),
        pytest.param(InsertedSecrets(8), reading(tokenize=unknowing), "8 canaries of text are 1", id="alike"),
        pytest.param(InsertedSecrets(8), reading(longest=20, tokenize=cut), "cut to so many", id="cut"),
        pytest.param(InsertedSecrets(8), reading(tokenize=left), "pads on the left", id="left"),
    ],
)  # fmt: skip
def test_scenes_that_do_not_do_are_refused(canaries: Canaries, scene: CanaryScene, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        canaries.fitted(scene, generator())


def test_bad_settings_are_refused() -> None:
    for settings, message in (
        (lambda: MislabelledCanaries(8, each=0), "each=0"),
        (lambda: OutOfDistributionTexts(8, words=0), "words=0"),
        (lambda: OutOfDistributionTexts(8, repeats=0), "repeats=0"),
        (lambda: InsertedSecrets(8, repeats=0), "repeats=0"),
        (lambda: InsertedSecrets(11, SecretFormat(length=1)), "10 secrets"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            settings()


def test_a_configuration_can_name_them_with_their_format() -> None:
    """A nested format that is marked final cannot have a default in jsonargparse 4.53."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--canaries", type=Canaries)
    read = parser.parse_args(
        ["--canaries", "InsertedSecrets", "--canaries.count", "9", "--canaries.format.length", "6"]
    )
    assert parser.instantiate(read).canaries == InsertedSecrets(9, SecretFormat(length=6))

"""Selective encryption's experiment in its small version, and its attacks where the truth is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

from experiments import selective_encryption
from experiments.selective_encryption import (
    Count,
    Scene,
    in_clear,
    inverted,
    kinds_of,
    main,
    played,
    selections,
    told_by_choice,
    wires,
)
from privfm.attacks.reconstruction.candidates import ranks
from privfm.checks import InvalidArgument
from privfm.contracts import MatrixView
from privfm.vectors import Layout

SENTENCES, WIDTH, CLASSES, CLIENTS = 400, 24, 6, 60
VECTORS = torch.randn(SENTENCES, WIDTH, generator=Generator().manual_seed(0))
LAYOUT = Layout.of(
    {
        "classifier.bias": torch.zeros(CLASSES),
        "classifier.weight": torch.zeros(CLASSES, WIDTH),
        "layer.lora_A": torch.zeros(2, WIDTH),
        "layer.lora_B": torch.zeros(WIDTH, 2),
    }
)


def heads(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Updates of a head whose every output is as likely, by hand: `(clients, c, k)` and `(clients, c)`."""
    errors = torch.nn.functional.one_hot(labels[rows], CLASSES).float() - 1 / CLASSES  # (clients, n, c)
    errors *= 1 + torch.rand(errors.shape, generator=Generator().manual_seed(1)) / 10  # no model is that fair
    return errors.transpose(1, 2) @ VECTORS[rows] / rows.shape[1], errors.mean(1)


def drawn(n: int) -> tuple[Tensor, Tensor]:
    generator = Generator().manual_seed(n)
    rows = torch.stack([torch.randperm(SENTENCES, generator=generator)[:n] for _ in range(CLIENTS)])
    return rows, torch.randint(CLASSES, (SENTENCES,), generator=generator)


def share(scores: Tensor, rows: Tensor, guesses: int) -> float:
    return float((ranks(scores, rows) <= guesses).float().mean())


def test_one_example_is_found_and_a_foreign_one_is_not() -> None:
    rows, labels = drawn(1)
    found = inverted(*heads(rows, labels), 1, VECTORS)
    assert [set(one) for one in found.labels] == [{int(labels[row])} for row in rows[:, 0]]
    assert share(found.scores, rows, 1) == 1.0
    torch.testing.assert_close(found.cosines.gather(1, rows), torch.ones(CLIENTS, 1))
    # Chance is 1 in 40; 9 or more of 60 come with probability 4e-5 by the binomial law.
    assert share(found.scores, rows.roll(1, 0), 10) < 9 / 60


def test_half_of_the_weight_is_enough_and_none_is_nothing() -> None:
    rows, labels = drawn(1)
    weights, biases = heads(rows, labels)
    away = torch.rand(weights.shape[1:], generator=Generator().manual_seed(2)) < 0.5
    partial = inverted(weights.masked_fill(away, torch.nan), biases, 1, VECTORS)
    assert share(partial.scores, rows, 1) == 1.0
    lost = away.all(0)  # columns of which no row is left
    expected = VECTORS[rows[:, 0]][:, ~lost].norm(dim=1) / VECTORS[rows[:, 0]].norm(dim=1)
    torch.testing.assert_close(partial.cosines.gather(1, rows)[:, 0], expected)
    nothing = inverted(torch.full_like(weights, torch.nan), biases, 1, VECTORS)
    assert share(nothing.scores, rows, SENTENCES - 1) == 0.0 and nothing.labels == partial.labels
    hidden = torch.full_like(biases, torch.nan)
    assert inverted(weights, hidden, 1, VECTORS).labels == partial.labels  # the weight tells a single label, too
    assert set(inverted(torch.full_like(weights, torch.nan), hidden, 1, VECTORS).labels) == {frozenset()}


def test_several_examples_are_found_less_surely_but_never_by_wrong_labels() -> None:
    rows, labels = drawn(4)
    found = inverted(*heads(rows, labels), 4, VECTORS)
    for own, said in zip(rows, found.labels, strict=True):
        assert said and said <= set(labels[own].tolist())
    own, foreign = share(found.scores, rows, 4), share(found.scores, rows.roll(1, 0), 4)
    assert 0.5 < own < 1.0 and foreign < 0.05  # chance is 0.01


def test_a_choice_of_ones_own_columns_tells_whose_it_is_and_a_random_one_does_not() -> None:
    single = torch.randn(SENTENCES, 200, generator=Generator().manual_seed(4))
    rows, _ = drawn(1)
    first, tenth = told_by_choice(single[rows[:, 0]], rows, single, 0.1)
    assert first.hits == tenth.hits == first.of == CLIENTS
    _, foreign = told_by_choice(single[rows[:, 0]], rows.roll(1, 0), single, 0.1)
    assert foreign.hits < 9


def test_what_the_attacks_see_is_what_the_channel_leaves_in_the_clear() -> None:
    scores = torch.arange(LAYOUT.d).float()
    rows = torch.randn(4, LAYOUT.d, generator=Generator().manual_seed(5)) / 10
    widths = {}
    for title, protected in selections(LAYOUT, scores, Generator().manual_seed(6)).items():
        mask = torch.zeros(LAYOUT.d, dtype=torch.bool)
        for low, high in protected:
            mask[low:high] = True
        widths[title] = int(mask.sum())
        if title in ("Nothing", "Head", "Everything"):
            clear, sent = played(*next(iter(wires(protected, 4).values())), rows)
            torch.testing.assert_close(clear, rows.masked_fill(mask, torch.nan), equal_nan=True, rtol=0, atol=0)
            assert sent > 4 * int((~mask).sum())
    head, lora = CLASSES * (WIDTH + 1), 4 * WIDTH
    assert widths["Nothing"] == 0 and widths["Everything"] == LAYOUT.d == head + lora
    assert widths["Head"] == head and widths["LoRA"] == lora and widths["All but the head's bias"] == LAYOUT.d - CLASSES
    assert widths["Random 10 %"] == widths["Top 10 % of a public map"] == 25  # of 246
    assert in_clear(MatrixView(rows)).shape == rows.shape


def test_a_row_beyond_the_bound_stops_the_experiment() -> None:
    channel, codecs = wires(((0, 2),), 3)["CKKS"]
    rows = torch.zeros(3, 4)
    rows[1, 3] = 100.0
    with pytest.raises(InvalidArgument, match="raise BOUND"):
        played(channel, codecs, rows)


def test_counts_come_with_their_interval() -> None:
    assert Count(5, 10).text == "50.0 % (23.7 to 76.3)"  # half: 1.96 / 1.384 * sqrt(0.025 + 0.0096) = 0.263


def test_the_small_experiment_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(fast=True, out=tmp_path)
    printed = capsys.readouterr().out
    assert "1 local step" in printed and "2 local steps" in printed and str(tmp_path) in printed
    written = json.loads((tmp_path / "findings.json").read_text())
    assert len(written["findings"]) == 60  # selections, sizes and steps
    alone = {one["protected"]: one for one in written["findings"] if one["examples"] == one["steps"] == 1}
    for title in ("Nothing", "LoRA", "Random 10 %"):
        assert alone[title]["labels"] == {"hits": 4, "of": 4} and alone[title]["cosine"] == pytest.approx(1, abs=1e-4)
        assert alone[title]["inverted"][0] == alone[title]["matched"][0] == {"hits": 4, "of": 4}
    assert alone["Head"]["inverted"][1]["hits"] == 0 and alone["Head"]["apart"]["hits"] == 4
    bias = alone["All but the head's bias"]
    assert bias["unprotected"] == pytest.approx(6 / 8454) and bias["labels"]["hits"] == 4
    for one in written["findings"]:
        assert one["wrong_labels"] == 0 or one["steps"] > 1
        if one["protected"] == "Everything":
            parts = [one["labels"], *one["inverted"], *one["matched"], one["apart"], *one["foreign"]]
            assert one["unprotected"] == 0 and one["cosine"] is None and not any(part["hits"] for part in parts)
    sent = written["bytes"]
    assert sent["Nothing"]["Plaintext"] < sent["Random 10 %"]["masks"] < sent["Random 10 %"]["CKKS"]
    assert (tmp_path / "tables.md").read_text().count("| Everything ") == 7
    assert (tmp_path / "found-4.svg").read_text().startswith("<svg") and (tmp_path / "env.json").exists()


def test_too_few_sentences_and_a_missing_single_step_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="sentences=160"):
        main(sentences=160)
    with pytest.raises(InvalidArgument, match="steps"):
        main(steps=(10,))


def test_clients_of_a_size_share_no_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a foreign sentence would be found for being one's own, too."""
    monkeypatch.setattr(selective_encryption, "updates", lambda bench, rows, steps, seed: torch.zeros(len(rows), 3))
    scene = Scene(None, torch.arange(100, 200), torch.arange(0), VECTORS, VECTORS)  # type: ignore[arg-type]
    kinds = kinds_of(scene, 6, (1, 2), 0)
    assert [(kind.steps, kind.rows.shape[1]) for kind in kinds] == [(1, 1), (2, 1), (1, 4), (2, 4), (1, 16), (2, 16)]
    for one, other in zip(kinds[::2], kinds[1::2], strict=True):
        assert torch.equal(one.rows, other.rows)
        assert len(one.rows.unique()) == one.rows.numel() and bool((one.rows >= 100).all())
    with pytest.raises(InvalidArgument, match="sentences for 6 of 16"):
        kinds_of(scene, 7, (1,), 0)

"""A curious server inside a run: what it reads is in the record of the round, and the run is as it is without."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import pytest
import torch
from torch import Generator, Tensor

from privfm.attacks.reconstruction import AttentionPursuit, BagOfWords, CuriousServer, Labels
from privfm.checks import InvalidArgument
from privfm.contracts import BuiltModel, DataSource, ModelSource, ReconstructionAttack, Table
from privfm.defenses import DPPlan, FixedPoint, LocalSampling
from privfm.defenses.channels import Plaintext
from privfm.defenses.channels.masks import PairwiseMasks
from privfm.defenses.channels.selective import Selective
from privfm.defenses.mean import Mean
from privfm.experiment import ArmSpec, RunConfig, prepare
from privfm.experiment.run import play_run
from privfm.federation import Average, FixedSize, rounds
from privfm.learning import IID, SGD, OneStep, Schedule, SequenceClassification

pytest.importorskip("transformers")

CLIENTS, EVERYTHING, CLIP = 4, 10**6, 8.0
CODEC = FixedPoint(8.0, 28)


@final
@dataclass(frozen=True)
class Numbers(DataSource):
    """Sentences of numbers: a token is written as its id."""

    count: int = 8

    def load(self) -> Table:
        source = random.Random(3)
        texts = [[4, *(source.randrange(10, 300) for _ in range(source.randint(4, 7))), 5] for _ in range(self.count)]
        labels = torch.tensor([place % 2 for place in range(self.count)])
        return Table([" ".join(map(str, text)) for text in texts], labels, ("even", "odd"))


@final
@dataclass(frozen=True)
class SmallBert(ModelSource):
    """Random weights, trained whole."""

    width: int = 96

    def build(self, label_names: Sequence[str], generator: Generator) -> BuiltModel:
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=300, hidden_size=self.width, num_hidden_layers=2, num_attention_heads=3, intermediate_size=64,
            max_position_embeddings=24, num_labels=len(label_names), initializer_range=0.1,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module: Any = BertForSequenceClassification(config).eval()
        return BuiltModel(module, spelt, (), lambda folder: folder.mkdir(parents=True, exist_ok=True))


def spelt(texts: Sequence[str]) -> dict[str, Tensor]:
    rows = [[int(token) for token in text.split()] for text in texts]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": tokens, "attention_mask": (tokens != 0).long()}


def config_of(attack: ReconstructionAttack | None, **more: Any) -> RunConfig:
    """Four clients of one or two sentences each, all of them in every round, one step."""
    curious = {name: more.pop(name) for name in ("told", "rounds", "clients", "noise") if name in more}
    settings: dict[str, Any] = {
        "data": Numbers(), "model": SmallBert(), "task": SequenceClassification(), "partition": IID(CLIENTS),
        "training": OneStep(0.5, EVERYTHING, dropout=False), "rule": Mean(), "channel": Plaintext(),
        "optimizer": Average(), "rounds": 1, "cohort": FixedSize(CLIENTS), "training_engine": "sequential",
    }  # fmt: skip
    server = None if attack is None else CuriousServer(attack, seconds=20, **curious)
    return RunConfig(**(settings | {"server_attack": server} | more))


def leaked(config: RunConfig) -> list[dict[str, float]]:
    return [step.record.leaked for step in rounds(prepare(config, seed=0), config.rounds)]


def test_the_record_says_what_was_read_and_the_run_does_not_notice() -> None:
    curious = config_of(AttentionPursuit(), clients=CLIENTS)
    (with_it,), (without,) = (list(rounds(prepare(one, 0), 1)) for one in (curious, config_of(None)))
    assert torch.equal(with_it.state.model, without.state.model)
    found = with_it.record.leaked
    assert (found["attacked"], found["refused"], found["exact"], found["false"]) == (CLIENTS, 0.0, 1.0, 0.0)
    assert found["token_recall"] == found["token_precision"] == 1.0
    assert without.record.leaked == {}


def test_a_run_on_disk_keeps_the_scores(tmp_path: Path) -> None:
    play_run(tmp_path / "seed-0", ArmSpec("curious", "curious", "", config_of(AttentionPursuit(), rounds=(0,))), 0)
    (line,) = [
        json.loads(line)
        for file in (tmp_path / "seed-0").glob("*.jsonl")
        for line in file.read_text().splitlines()
    ]  # fmt: skip
    assert line["leaked/exact"] == 1.0
    assert line["leaked/attacked"] == 1.0


def test_it_looks_in_its_rounds_alone() -> None:
    found = leaked(replace(config_of(AttentionPursuit(), rounds=(1,)), rounds=3))
    assert [bool(one) for one in found] == [False, True, False]
    assert found[1]["exact"] == 1.0  # of the model that was sent in round 1


def test_of_a_secure_sum_it_reads_everybodys_sentences_at_once() -> None:
    summed = config_of(
        AttentionPursuit(), clients=CLIENTS, channel=PairwiseMasks(CLIENTS, modulus_bits=40), transforms=(CODEC,),
        noise=CODEC.step / (6 * CLIENTS) ** 0.5,
    )  # fmt: skip
    (found,) = leaked(summed)
    assert found["attacked"] == 1.0  # one sum, four clients
    assert (found["exact"], found["false"]) == (1.0, 0.0)


@pytest.mark.parametrize("attack", [AttentionPursuit(), BagOfWords(positions=9)], ids=["pursuit", "bag"])
def test_past_the_width_a_secure_sum_leaves_nothing(attack: ReconstructionAttack) -> None:
    many = config_of(
        attack, data=Numbers(100), channel=PairwiseMasks(CLIENTS, modulus_bits=40), transforms=(CODEC,),
        noise=CODEC.step / (6 * CLIENTS) ** 0.5,
    )  # fmt: skip
    (found,) = leaked(many)
    assert (found["refused"], found["exact"], found["false"], found["token_recall"]) == (0.0, 0.0, 0.0, 0.0)


def test_what_cannot_run_is_counted_as_refused() -> None:
    encrypted = Selective(PairwiseMasks(CLIENTS, modulus_bits=40), ((0, 70_000),))  # embeddings and first attention
    (found,) = leaked(config_of(AttentionPursuit(), channel=encrypted, transforms=(CODEC,), clients=CLIENTS))
    assert found == {"attacked": float(CLIENTS), "refused": 1.0}
    (found,) = leaked(config_of(BagOfWords(source="embedding"), model=SmallBert(), clients=2))
    assert (found["refused"], found["token_recall"]) == (0.0, 1.0)


def test_noise_of_a_plan_is_to_be_told_or_the_leak_is_understated() -> None:
    """The plan is public. Hardly any noise: told, sentences are read; untold, none, which is no protection."""
    local = LocalSampling(batch_size=EVERYTHING, local_steps=1)

    def under(noise_multiplier: float, noise: float) -> dict[str, float]:
        plan = DPPlan(noise_multiplier, CLIP, 1.0, 1e-5, unit="example", place="local", sampling="full", local=local)
        training = SGD(1.0, Schedule(batch_size=EVERYTHING, steps=1))
        (found,) = leaked(config_of(AttentionPursuit(), plan=plan, cohort=None, training=training, noise=noise))
        return found

    assert under(1e-6, 1e-6 * CLIP)["exact"] == 1.0
    assert under(1e-6, 0.0)["exact"] == 0.0
    strong = under(0.3, 0.3 * CLIP)
    assert (strong["exact"], strong["false"], strong["token_recall"]) == (0.0, 0.0, 0.0)


def test_labels_are_told_only_where_that_is_granted() -> None:
    (found,) = leaked(config_of(Labels(), told=("examples",), clients=CLIENTS))
    assert (found["refused"], found["exact"]) == (0.0, 0.0)
    with pytest.raises(InvalidArgument, match="told"):
        config_of(Labels(), told=("texts",))
    with pytest.raises(InvalidArgument, match="noise"):
        config_of(Labels(), noise=-1.0)

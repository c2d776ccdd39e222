"""Attacks during a Trainer's training: they find what is there, find nothing where nothing is, and change nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from privfm.checks import InvalidArgument
from privfm.contracts import Reconstruction
from privfm.defenses import DPPlan, LocalSampling
from privfm.plugins.callbacks import MembershipCallback, ReconstructionCallback
from privfm.plugins.trainer import PrivateTrainer

CLASSES = 4


def bert(**config: Any) -> BertForSequenceClassification:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(**{**sizes, "vocab_size": 60, "num_labels": CLASSES, **config}))


def texts(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Random words under random labels: what is learned of them is memory and nothing else."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (count, 6), generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return [{"input_ids": one, "labels": label} for one, label in zip(ids, labels, strict=True)]


@pytest.fixture
def arguments(quiet_arguments: Callable[..., TrainingArguments]) -> Callable[..., TrainingArguments]:
    def make(**changes: Any) -> TrainingArguments:
        options: dict[str, Any] = {
            "dataloader_pin_memory": False,
            "per_device_train_batch_size": 10,
            "per_device_eval_batch_size": 50,
            "num_train_epochs": 12,
            "learning_rate": 1e-2,
        }
        return quiet_arguments(**{**options, **changes})

    return make


Arguments = Callable[..., TrainingArguments]


def curve(trainer: Trainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def test_membership_shows_as_the_model_learns_by_heart(arguments: Arguments) -> None:
    members, others = texts(60, 1), texts(60, 2)
    trainer = Trainer(bert(), arguments(), train_dataset=members)
    callback = MembershipCallback(trainer, members, others)
    trainer.add_callback(callback)
    trainer.train()
    found = curve(trainer, "membership_auc")
    assert len(found) == 12 and found[-1] > 0.8 and found[-1] > found[0] + 0.2
    assert curve(trainer, "membership_auc_low")[-1] > 0.5
    assert [leak.step for leak in callback.leaks] == [6 * epoch for epoch in range(1, 13)]
    assert curve(trainer, "membership_tpr_at_fpr_0.01") == [], "60 others cannot say it; 1,000 are needed"
    assert callback.leaks[-1].judgement.rates[0].missing == "needs 1,000, has 60"


def test_strangers_to_the_training_are_told_apart_by_chance_alone(arguments: Arguments) -> None:
    """Negative control: a random split of texts of which none was trained on."""
    trainer = Trainer(bert(), arguments(num_train_epochs=6), train_dataset=texts(60, 1))
    trainer.add_callback(MembershipCallback(trainer, texts(150, 3), texts(150, 4), every=12))
    trainer.train()
    found = curve(trainer, "membership_auc")
    assert len(found) == 3
    assert all(abs(auc - 0.5) < 0.11 for auc in found)  # 3.3 standard errors: 1 / sqrt(12 * 75) = 0.033
    assert all(low < 0.5 < high for low, high in zip(
        curve(trainer, "membership_auc_low"), curve(trainer, "membership_auc_high"), strict=True))  # fmt: skip


def test_calibration_takes_off_what_was_there_before(arguments: Arguments) -> None:
    """Members that the model fits better before any training look like members, unless it is calibrated."""
    model = bert()
    pool = texts(400, 5)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.stack([one["input_ids"] for one in pool])).logits
    fit = logits.log_softmax(1)[torch.arange(400), torch.stack([one["labels"] for one in pool])]
    order = fit.argsort().tolist()
    easy, hard = [pool[place] for place in order[-60:]], [pool[place] for place in order[:60]]
    found = []
    for calibrated in (False, True):
        trainer = Trainer(bert(), arguments(max_steps=1, learning_rate=1e-6), train_dataset=texts(60, 1))
        trainer.add_callback(MembershipCallback(trainer, easy, hard, calibrated=calibrated))
        trainer.train()
        found.append(curve(trainer, "membership_auc")[0])
    assert found[0] == 1.0 and found[1] < 0.9


def test_private_training_leaks_less(arguments: Arguments) -> None:
    """All examples in every step, so that epsilon after every epoch has a closed form; 40 plain ones reach 0.9."""
    members, others = texts(60, 1), texts(60, 2)
    local = LocalSampling(batch_size=60, epochs=40)
    plan = DPPlan(20.0, max_grad_norm=0.1, sample_rate=1.0, delta=1e-3, unit="example", place="local", sampling="full",
                  local=local)  # fmt: skip
    args = {"max_grad_norm": 0, "per_device_train_batch_size": 60, "num_train_epochs": 40}
    private = PrivateTrainer(bert(), arguments(**args), train_dataset=members, plan=plan, privacy_seed=1)
    plain = Trainer(bert(), arguments(**args), train_dataset=members)
    found = []
    for trainer in (plain, private):
        trainer.add_callback(MembershipCallback(trainer, members, others, every=40))
        trainer.train()
        found.append(curve(trainer, "membership_auc")[-1])
    assert found[0] > 0.9 and found[1] < 0.65


def test_labels_are_read_from_the_gradient_and_noise_hides_them(arguments: Arguments) -> None:
    batch = [
        {**one, "labels": torch.tensor(label)} for one, label in zip(texts(16, 6), [2] * 11 + [0] * 5, strict=True)
    ]
    local = LocalSampling(batch_size=10, epochs=1)
    plan = DPPlan(50.0, max_grad_norm=1.0, sample_rate=1.0, delta=1e-3, unit="example", place="local", sampling="full",
                  local=local)  # fmt: skip
    args = arguments(max_grad_norm=0, num_train_epochs=1, learning_rate=1e-6)
    trainer = PrivateTrainer(bert(), args, train_dataset=texts(60, 1), plan=plan, privacy_seed=1)
    trainer.add_callback(ReconstructionCallback(trainer, batch, every=2))
    trainer.train()
    plain, private = (curve(trainer, f"reconstruction_labels{suffix}") for suffix in ("", "_private"))
    chance = curve(trainer, "reconstruction_labels_chance")
    assert chance[0] == (4 + 4) / 16, "four of each label, of 11, 0, 0 and 5 there"
    assert len(plain) == 3 and min(plain) > 0.9
    assert sum(private) / 3 < 0.75 < min(plain)
    assert trainer.private.steps == 6, "looking at a private gradient is no step"


def test_attacks_change_nothing(arguments: Arguments) -> None:
    """The same weights to the last bit, dropout, shuffling and all, with the callbacks and without."""
    members = texts(30, 1)
    found = []
    for attacked in (False, True):
        model = bert()
        trainer = Trainer(model, arguments(num_train_epochs=2), train_dataset=members)
        if attacked:
            trainer.add_callback(MembershipCallback(trainer, members, texts(30, 2), every=2))
            trainer.add_callback(ReconstructionCallback(trainer, members[:4], every=1))
        trainer.train()
        found.append([p.detach().clone() for p in model.parameters()])
        assert all(part.training for part in model.modules()) and model.classifier.weight.grad is None
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_attacks_leave_every_global_generator_alone(arguments: Arguments) -> None:
    """A collator may draw from Python's and NumPy's generators, too, of which training is then made."""

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        random.random()
        np.random.rand()  # noqa: NPY002  # as old collators do
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    found = []
    for attacked in (False, True):
        args = arguments(num_train_epochs=1)
        trainer = Trainer(bert(), args, train_dataset=texts(30, 1), data_collator=collate)
        if attacked:
            trainer.add_callback(MembershipCallback(trainer, texts(30, 1), texts(30, 2), every=1))
        trainer.train()
        found.append((random.random(), np.random.rand()))  # noqa: NPY002
    assert found[0] == found[1]


def test_candidates_that_would_be_dropped_or_mixed_are_refused(arguments: Arguments) -> None:
    for option, value in (("dataloader_drop_last", True), ("dataloader_in_order", False)):
        trainer = Trainer(bert(), arguments(**{option: value}), train_dataset=texts(30, 1))
        trainer.add_callback(MembershipCallback(trainer, texts(60, 1), texts(60, 2)))
        with pytest.raises(InvalidArgument, match=option):
            trainer.train()
        with pytest.raises(InvalidArgument, match=option):
            ReconstructionCallback(trainer, texts(4, 1))


def test_other_attacks_bring_their_own_score(arguments: Arguments) -> None:
    def certain(found: Reconstruction) -> dict[str, float]:
        return {"distinct": float(len(set(found.labels or ())))}

    trainer = Trainer(bert(), arguments(max_steps=2), train_dataset=texts(30, 1))
    trainer.add_callback(ReconstructionCallback(trainer, texts(3, 2), every=1, score=certain))
    trainer.train()
    assert all(1 <= value <= 3 for value in curve(trainer, "reconstruction_distinct"))


def test_what_cannot_be_attacked_is_refused(arguments: Arguments) -> None:
    members = texts(30, 1)
    trainer = Trainer(bert(), arguments(), train_dataset=members)
    with pytest.raises(InvalidArgument, match="others: 1 examples"):
        MembershipCallback(trainer, members, members[:1])
    with pytest.raises(InvalidArgument, match="every=0"):
        MembershipCallback(trainer, members, members, every=0)
    with pytest.raises(InvalidArgument, match="expected at least one example"):
        ReconstructionCallback(trainer, [])
    with pytest.raises(InvalidArgument, match="at most per_device_eval_batch_size"):
        ReconstructionCallback(trainer, texts(51, 1))
    with pytest.raises(InvalidArgument, match="no labels, one an example"):
        ReconstructionCallback(trainer, [{"input_ids": one["input_ids"]} for one in members[:2]])
    assert isinstance(trainer.model, nn.Module)

"""Private steps inside `trainer.train()`: equal to references, saved and loaded, refused where epsilon would lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import isnan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    XLNetConfig,
    XLNetLMHeadModel,
)

from privfm.checks import BrokenCheckpoint, InvalidArgument, PrivacyBroken
from privfm.defenses import DPPlan, LocalSampling
from privfm.plugins.example_losses import trainer_losses
from privfm.plugins.guards import check_reloaded, check_saved
from privfm.plugins.trainer import OPTIONS, PrivateTrainer

N, BATCH, CLASSES = 20, 4, 3


def plan(noise: float = 1.0, clip: float = 1.0, steps: int | None = None, **changes: Any) -> DPPlan:
    local = LocalSampling(batch_size=BATCH, local_steps=steps, epochs=2)
    fields: dict[str, Any] = {"unit": "example", "place": "local", "sampling": "full", "local": local} | changes
    return DPPlan(noise, max_grad_norm=clip, sample_rate=1.0, delta=1e-3, **fields)


def bert(seed: int = 0, **config: Any) -> BertForSequenceClassification:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertForSequenceClassification(
            BertConfig(**{**sizes, **still, "vocab_size": 40, "num_labels": CLASSES, **config})
        )


def lora(model: nn.Module) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"))
    assert isinstance(wrapped, PeftModel)
    return wrapped


@pytest.fixture
def data() -> list[dict[str, Tensor]]:
    """Texts of different lengths, padded, with a mask."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for place in range(N):
        length = 3 + place % 5
        ids = torch.zeros(8, dtype=torch.long)
        ids[:length] = torch.randint(5, 40, (length,), generator=generator)
        found.append({"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor(place % CLASSES)})
    return found


@pytest.fixture
def arguments(quiet_arguments: Callable[..., TrainingArguments]) -> Callable[..., TrainingArguments]:
    def make(**changes: Any) -> TrainingArguments:
        options: dict[str, Any] = {
            "max_grad_norm": 0,
            "per_device_train_batch_size": BATCH,
            "num_train_epochs": 2,
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "weight_decay": 0.0,
            "logging_steps": 2,
        }
        return quiet_arguments(**{**options, **changes})

    return make


Arguments = Callable[..., TrainingArguments]
Data = list[dict[str, Tensor]]


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class Batches(TrainerCallback):
    """Remembers the weights before and after every step; batches are spied on where they are drawn."""

    def __init__(self, trainer: PrivateTrainer) -> None:
        self.trainer, self.weights, self.places = trainer, [], []  # type: ignore[var-annotated]

    def on_train_begin(self, *arguments: Any, **named: Any) -> None:
        self.weights.append(trained(self.trainer.private.model))
        draw = self.trainer.private.batches

        def spied(steps: int | None = None) -> Any:
            for places in draw(steps):
                self.places.append(places)
                yield places

        self.trainer.private.batches = spied  # type: ignore[method-assign]

    def on_step_end(self, *arguments: Any, **named: Any) -> None:
        self.weights.append(trained(self.trainer.private.model))


def reference(model: nn.Module, examples: Data, clip: float) -> dict[str, Tensor]:
    """Sum of clipped gradients over the expected batch, example after example, by plain autograd."""
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters() if p.requires_grad}
    for one in examples:
        model.zero_grad()
        inputs = {name: value[None] for name, value in one.items() if name != "labels"}
        cross_entropy(model(**inputs).logits, one["labels"][None]).backward()
        own = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
        length = float(torch.cat([value.flatten() for value in own.values()]).norm())
        for name, value in own.items():
            total[name] += value * min(1.0, clip / length) / BATCH
    model.zero_grad()
    return total


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("clip", [1e6, 0.5], ids=["no clip", "clip"])
def test_steps_without_noise_are_those_of_a_written_out_loop(
    data: Data, arguments: Arguments, clip: float, adapters: bool
) -> None:
    def make() -> nn.Module:
        return lora(bert()) if adapters else bert()

    trainer = PrivateTrainer(make(), arguments(), train_dataset=data, plan=plan(noise=0.0, clip=clip), privacy_seed=3)
    seen = Batches(trainer)
    trainer.add_callback(seen)
    trainer.train()
    assert len(seen.weights) == 11 and len({len(places) for places in seen.places}) > 1
    copy = make()
    for before, after, places in zip(seen.weights, seen.weights[1:], seen.places, strict=False):
        copy.load_state_dict(before, strict=False)
        step = reference(copy, [data[place] for place in places], clip)
        for name, value in step.items():
            expected = before[name].double() - 0.1 * value
            torch.testing.assert_close(after[name].double(), expected, atol=2e-6, rtol=1e-5)


def test_noise_in_the_trainer_has_the_plans_scale(data: Data, arguments: Arguments) -> None:
    """Same seed with and without noise: the first step differs by lr z C / (expected batch) times standard normals."""
    found = []
    for noise in (0.0, 2.0):
        model = bert()
        private = plan(noise=noise, clip=0.5)
        PrivateTrainer(model, arguments(max_steps=1), train_dataset=data, plan=private, privacy_seed=3).train()
        found.append(torch.cat([value.flatten() for value in trained(model).values()]))
    noise_there = (found[1] - found[0]).double() / (0.1 * 2.0 * 0.5 / BATCH)
    chi = float(noise_there.square().sum())
    d = len(noise_there)
    deviation = (2 * d) ** 0.5
    assert abs(chi - d) < 4 * deviation
    for wrong in (0.25, 4.0):  # the squares of half and double
        assert abs(chi * wrong - d) > 20 * deviation


def test_epsilon_is_logged_and_nothing_uncovered_is(data: Data, arguments: Arguments) -> None:
    args = arguments(eval_strategy="epoch", num_train_epochs=2)
    trainer = PrivateTrainer(bert(), args, train_dataset=data, eval_dataset=data, plan=plan(), privacy_seed=3)
    output = trainer.train()
    logged = [row for row in trainer.state.log_history if "epsilon" in row]
    assert [row["step"] for row in logged] == [5, 10] and logged[0]["epsilon"] < logged[1]["epsilon"]
    record = trainer.epsilon_record()
    assert logged[-1]["epsilon"] == record.epsilon and "count=10" in record.event
    names = {name for row in trainer.state.log_history for name in row}
    assert names.isdisjoint({"loss", "train_loss", "total_flos", "num_input_tokens_seen"})
    assert {"eval_loss", "grad_norm", "learning_rate", "delta"} <= names
    assert isnan(output.training_loss) and "train_loss" not in output.metrics and trainer.state.total_flos == 0


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "lora"])
def test_what_was_saved_is_what_was_trained(data: Data, arguments: Arguments, tmp_path: Path, adapters: bool) -> None:
    base = bert()
    base.save_pretrained(tmp_path / "base")
    model = lora(base) if adapters else base
    args = arguments(save_strategy="epoch")
    trainer = PrivateTrainer(model, args, train_dataset=data, plan=plan(), privacy_seed=3)
    trainer.train()
    folder = tmp_path / "out" / "checkpoint-10"
    fresh = BertForSequenceClassification.from_pretrained(tmp_path / "base" if adapters else folder)
    loaded = PeftModel.from_pretrained(fresh, str(folder)) if adapters else fresh
    check_reloaded(model, loaded)
    one = {name: value[None] for name, value in data[0].items()}
    assert torch.equal(model.eval()(**one).logits, loaded.eval()(**one).logits)
    statement = json.loads((folder / "privacy.json").read_text(encoding="utf-8"))
    assert statement["epsilon"] == trainer.epsilon_record().epsilon and statement["unit"] == "example"
    earlier = json.loads((tmp_path / "out" / "checkpoint-5" / "privacy.json").read_text(encoding="utf-8"))
    assert 0 < earlier["epsilon"] < statement["epsilon"]
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1)
    for check, other in ((check_saved, folder), (check_reloaded, loaded)):
        with pytest.raises(BrokenCheckpoint, match="trained"):
            check(model, other)  # type: ignore[operator]


def test_a_checkpoint_of_other_weights_ends_training(
    data: Data, arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bert()
    monkeypatch.setattr(model, "save_pretrained", lambda folder, **options: bert(seed=9).save_pretrained(folder))
    args = arguments(save_strategy="epoch")
    trainer = PrivateTrainer(model, args, train_dataset=data, plan=plan(), privacy_seed=3)
    with pytest.raises(BrokenCheckpoint, match="checkpoint-5 does not hold the trained values of"):
        trainer.train()


def test_training_again_is_another_round(data: Data, arguments: Arguments) -> None:
    model = bert()
    trainer = PrivateTrainer(model, arguments(max_steps=3), train_dataset=data, plan=plan(), privacy_seed=3)
    trainer.train()
    first = trainer.epsilon_record()
    trainer.train()
    assert "count=3)" in first.event and "count=6)" in trainer.epsilon_record().event
    assert trainer.private.steps == 6


def test_other_optimizers_schedules_and_smoothing_work(data: Data, arguments: Arguments) -> None:
    args = arguments(optim="adamw_torch", lr_scheduler_type="linear", warmup_steps=2, label_smoothing_factor=0.1,
                     weight_decay=0.1, neftune_noise_alpha=5.0, max_steps=3, save_strategy="steps",
                     save_steps=1)  # fmt: skip
    trainer = PrivateTrainer(bert(), args, train_dataset=data, plan=plan(), privacy_seed=3, at_once=2)
    trainer.train()
    assert trainer.epsilon_record().epsilon > 0


def test_hugging_face_data_sets_with_other_columns_and_empty_batches(data: Data, arguments: Arguments) -> None:
    """Ragged texts, a column of words, one example a step: a third of all batches is empty."""
    table = datasets.Dataset.from_dict(
        {
            "input_ids": [one["input_ids"][one["attention_mask"] > 0].tolist() for one in data],
            "label": [int(one["labels"]) for one in data],
            "words": ["some words"] * N,
        }
    )

    def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
        labels = torch.tensor([row["label"] for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}

    of = replace(plan(), local=LocalSampling(batch_size=1, local_steps=12))
    trainer = PrivateTrainer(
        bert(), arguments(per_device_train_batch_size=1, max_steps=12), data_collator=padded, train_dataset=table,
        plan=of, privacy_seed=3,
    )  # fmt: skip
    seen = Batches(trainer)
    trainer.add_callback(seen)
    trainer.train()
    assert [] in seen.places and "count=12)" in trainer.epsilon_record().event
    assert all(
        not torch.equal(before["classifier.bias"], after["classifier.bias"])
        for before, after in zip(seen.weights, seen.weights[1:], strict=False)
    )


# The losses


def test_losses_are_the_trainers_own(data: Data, arguments: Arguments) -> None:
    """Of each example alone, by `Trainer.compute_loss`: what one pass for the batch must equal."""

    def mse(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        loss: Tensor = (outputs.logits.mean(1) - labels).square().mean()
        return loss

    texts = [{**one, "labels": torch.where(one["input_ids"] > 0, one["input_ids"], -100)} for one in data]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "output_router_logits": True}
    several = [{**one, "labels": torch.tensor([place % 2, 1, 0]).float()} for place, one in enumerate(data)]
    cases: list[tuple[nn.Module, Data, dict[str, Any], dict[str, Any]]] = [
        (bert(), data, {}, {}),
        (lora(bert()), data, {}, {}),
        (bert(), data, {"label_smoothing_factor": 0.2}, {}),
        (bert(), data, {}, {"compute_loss_func": mse}),
        (bert(num_labels=1), [{**one, "labels": one["labels"].float()} for one in data], {}, {}),
        (llama, texts, {}, {}),
        # of the same kinds by name, and with another loss: several labels, none shifted, one of the router's own
        (bert(), several, {}, {}),
        (XLNetLMHeadModel(XLNetConfig(vocab_size=40, d_model=16, n_layer=1, n_head=2, d_inner=16)), texts, {}, {}),
        (MixtralForCausalLM(MixtralConfig(vocab_size=40, **sizes, **experts)), texts, {}, {}),
    ]
    for model, examples, options, more in cases:
        trainer = Trainer(model.eval(), arguments(**options), train_dataset=examples, **more)
        batch = {name: torch.stack([one[name] for one in examples[:6]]) for name in examples[0]}
        with torch.no_grad():
            found = trainer_losses(trainer)(batch)
            alone = [
                trainer.compute_loss(model, {name: value[place : place + 1] for name, value in batch.items()})
                for place in range(6)
            ]
        torch.testing.assert_close(found, torch.stack(alone), atol=1e-5, rtol=1e-5)  # type: ignore[arg-type]
        assert float(found.std()) > 0
    with pytest.raises(InvalidArgument, match="expected labels"):
        trainer_losses(trainer)({"input_ids": batch["input_ids"]})


# What is refused

WRONG: dict[str, Any] = {
    "max_grad_norm": 1.0,
    "gradient_accumulation_steps": 2,
    "dataloader_drop_last": True,
    "dataloader_in_order": False,
    "auto_find_batch_size": True,
    "include_num_input_tokens_seen": "all",
    "activation_checkpointing": True,
    "bf16": True,
    "optim": "lomo",
    "per_device_train_batch_size": 3,
    "train_sampling_strategy": "group_by_length",
}


@pytest.mark.parametrize("name", WRONG, ids=str)
def test_options_that_break_the_guarantee_are_refused(data: Data, arguments: Arguments, name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{name}="):
        PrivateTrainer(bert(), arguments(**{name: WRONG[name]}), train_dataset=data, plan=plan(), privacy_seed=3)


UNSET: dict[str, Any] = {
    "fp16": True, "torch_compile": True, "deepspeed": {}, "fsdp": "full_shard", "push_to_hub": True,
    "use_liger_kernel": True, "gradient_checkpointing": True,
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), UNSET.items())
def test_options_this_machine_cannot_set(data: Data, arguments: Arguments, name: str, value: Any) -> None:
    """Set once the Trainer has looked at them: they need a GPU, a library or the network, or are deprecated."""
    trainer = Trainer(bert(), arguments(), train_dataset=data)
    setattr(trainer.args, name, value)
    from privfm.plugins.trainer import _problems

    assert [problem.partition("=")[0] for problem in _problems(trainer, plan())] == [name]  # type: ignore[arg-type]


def test_every_option_on_the_list_is_one_of_transformers(arguments: Arguments) -> None:
    """A renamed option would be looked up in vain, and taken."""
    args = arguments()
    assert [name for name, _, _ in OPTIONS if not hasattr(args, name)] == []


def test_every_option_on_the_list_is_refused_in_a_test(data: Data, arguments: Arguments) -> None:
    """An option that nobody sets to a wrong value may be on the list and taken all the same."""
    assert {name for name, _, _ in OPTIONS} - {*WRONG, *UNSET} == {"world_size", "n_gpu"}
    trainer = Trainer(bert(), arguments(), train_dataset=data)
    from privfm.plugins.trainer import _problems

    class Several:
        """Arguments as on a machine with two of everything."""

        world_size, n_gpu = 2, 2

        def __getattr__(self, name: str) -> Any:
            return getattr(trainer.args, name)

    several = SimpleNamespace(args=Several(), train_dataset=data, model_init=None)
    found = [problem.partition("=")[0] for problem in _problems(several, plan())]  # type: ignore[arg-type]
    assert found == ["world_size", "n_gpu"]


def test_a_budget_that_pays_for_one_epoch_of_two_is_refused_before_the_first(data: Data, arguments: Arguments) -> None:
    one = plan().epsilon(1, examples=[N]) * 0.9
    trainer = PrivateTrainer(bert(), arguments(), train_dataset=data, plan=plan(budget=one), privacy_seed=3)
    with pytest.raises(InvalidArgument, match="10 more steps, 10 in all"):
        trainer.train()
    assert trainer.private.steps == 0
    half = PrivateTrainer(bert(), arguments(max_steps=5), train_dataset=data, plan=plan(budget=one), privacy_seed=3)
    half.train()
    assert 0 < half.epsilon_record().epsilon <= one


def test_the_seed_that_checkpoints_hold_is_no_secret(data: Data, arguments: Arguments) -> None:
    with pytest.raises(InvalidArgument, match=r"privacy_seed=42 is args\.seed"):
        PrivateTrainer(bert(), arguments(), train_dataset=data, plan=plan(), privacy_seed=42)


def test_a_checkpoint_with_statistics_of_examples_ends_training(data: Data, arguments: Arguments) -> None:
    model = bert()
    model.register_buffer("seen", torch.zeros(()))

    def count(part: Any, given: Any, found: Any) -> None:
        part.seen += 1.0

    model.register_forward_hook(count)
    trainer = PrivateTrainer(model, arguments(save_strategy="epoch"), train_dataset=data, plan=plan(), privacy_seed=3)
    with pytest.raises(PrivacyBroken, match="seen: buffers that changed"):
        trainer.train()
    assert trainer.private.steps == 5, "at the first checkpoint"


def test_all_refusals_come_at_once(data: Data, arguments: Arguments) -> None:
    with pytest.raises(InvalidArgument, match=r"max_grad_norm=1.0: .*set 0; gradient_accumulation_steps=2: "):
        args = arguments(max_grad_norm=1.0, gradient_accumulation_steps=2)
        PrivateTrainer(bert(), args, train_dataset=data, plan=plan(), privacy_seed=3)


def test_calls_that_break_the_guarantee_are_refused(data: Data, arguments: Arguments, tmp_path: Path) -> None:
    def make(of: DPPlan, **options: Any) -> PrivateTrainer:
        return PrivateTrainer(bert(), arguments(**options), train_dataset=data, plan=of, privacy_seed=3)

    with pytest.raises(InvalidArgument, match=r"10 steps are asked for .* the plan has 4 a round"):
        make(plan(steps=4)).train()
    with pytest.raises(InvalidArgument, match="resume_from_checkpoint"):
        make(plan()).train(resume_from_checkpoint=str(tmp_path))
    with pytest.raises(InvalidArgument, match="hyperparameter_search"):
        make(plan()).hyperparameter_search()
    with pytest.raises(InvalidArgument, match="no private step yet"):
        make(plan()).epsilon_record()
    with pytest.raises(InvalidArgument, match=r"budget=0\.1"):
        make(plan(budget=0.1)).train()
    with pytest.raises(InvalidArgument, match="train_dataset: expected one with a length"):
        PrivateTrainer(bert(), arguments(max_steps=3), plan=plan(), privacy_seed=3)

    def made() -> nn.Module:
        return bert()

    with pytest.raises(InvalidArgument, match="model_init"):
        PrivateTrainer(model_init=made, args=arguments(), train_dataset=data, plan=plan(), privacy_seed=3)
    late = make(plan())
    late.args.max_grad_norm = 1.0
    with pytest.raises(InvalidArgument, match=r"max_grad_norm=1\.0"):
        late.train()
    grown = make(plan(), max_steps=1)
    grown.train()
    grown.train_dataset = data + data
    with pytest.raises(InvalidArgument, match="replaced by one of 40 examples"):
        grown.train()
    client = replace(plan(), unit="client", place="central", local=None)
    with pytest.raises(InvalidArgument, match="unit='client'"):
        make(client)


def test_weights_that_do_not_move_are_found_out(data: Data, arguments: Arguments) -> None:
    trainer = PrivateTrainer(bert(), arguments(learning_rate=0.0), train_dataset=data, plan=plan(), privacy_seed=3)
    with pytest.raises(PrivacyBroken, match="its learning rate is 0"):
        trainer.train()


def test_wrapped_names_and_empty_folders_are_found_out(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = nn.Linear(2, 2)
    with pytest.raises(BrokenCheckpoint, match=r"holds no \.safetensors file"):
        check_saved(model, tmp_path)
    save_file({f"_module.{name}": value for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    with pytest.raises(BrokenCheckpoint, match=r"_module\.bias.*wrap_model=False"):
        check_saved(model, tmp_path)

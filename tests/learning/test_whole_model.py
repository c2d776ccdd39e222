"""Training every parameter: full gradients, embeddings frozen or not, and what then reads the tokens for free."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privfm.checks import InvalidArgument, PrivacyBroken
from privfm.cli.options import parser_for, values
from privfm.contracts import BuiltModel, ModelSource, Table
from privfm.defenses import DPPlan, LocalSampling
from privfm.learning import (
    SGD,
    CausalLanguageModel,
    CausalLM,
    ImageClassification,
    MeanPooledClassifier,
    ModelLearner,
    OneStep,
    Schedule,
    SequenceClassification,
    SequenceClassifier,
    VisionTransformer,
    Workbench,
)
from privfm.learning.adapter_kinds import LoRA, WholeModel
from privfm.randomness import Seeds

LABELS = ("a", "b", "c")
EMBEDDINGS = ("*embeddings*",)


def text_bench(folder: str, sentences: list[str], adapter: Any, pooling: str = "mean") -> Workbench:
    source = SequenceClassifier(folder, pooling=pooling, adapter=adapter, max_length=16)  # type: ignore[arg-type]
    table = Table(sentences, torch.arange(len(sentences)) % 3, LABELS)
    return Workbench(source.build(LABELS, Seeds(0).generator("initialisation")), SequenceClassification(), table)


def decoder_bench(folder: str, sentences: list[str], adapter: Any) -> Workbench:
    built = CausalLanguageModel(folder, adapter=adapter).build(("text",), Seeds(0).generator("initialisation"))
    return Workbench(built, CausalLM(), Table(sentences, torch.zeros(len(sentences)).long(), ("text",)))


def image_bench(adapter: Any) -> Workbench:
    source = VisionTransformer(hidden=16, depth=2, heads=2, adapter=adapter)
    images = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    built = source.build(LABELS, Seeds(0).generator("initialisation"))
    return Workbench(built, ImageClassification(), Table(images, torch.arange(12) % 3, LABELS))


def update(bench: Workbench, count: int = 4) -> dict[str, Tensor]:
    """The gradient of one batch, by name."""
    learner = ModelLearner(bench, {}, OneStep(1.0, batch_size=count, dropout=False))
    examples = bench.everything.take(torch.arange(count))
    trained = learner.train(bench.initial, [examples], Seeds(0).clients("data order", 0, [0]))
    assert trained.failed == {}
    return bench.layout.unflatten(trained.rows[0])


def names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters()}


@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_every_parameter_of_a_classifier_is_trained(pooling: str, tiny_bert: str, sentences: list[str]) -> None:
    bench = text_bench(tiny_bert, sentences, WholeModel(), pooling)
    assert set(bench.parameters) == names(bench.module)
    assert bench.layout.d == sum(parameter.numel() for parameter in bench.module.parameters())
    assert (bench.trunk, bench.first, bench.adapters) == (None, 0, None)
    found = update(bench)
    moved = {name for name, value in found.items() if bool(value.any())}
    assert {name for name in found if name not in moved} == {
        name for name in found if pooling == "mean" and "pooler" in name
    }  # not reached by a mean of tokens


@pytest.mark.parametrize("adapter", [WholeModel(), None], ids=repr)
def test_a_decoder_and_a_vision_model_have_it_by_default(adapter: Any, tiny_llama: str, sentences: list[str]) -> None:
    for bench in (decoder_bench(tiny_llama, sentences, adapter), image_bench(adapter)):
        assert set(bench.parameters) == names(bench.module)
        assert all(bool(value.any()) for value in update(bench).values())


def test_frozen_embeddings_are_what_they_were_and_not_sent(tiny_bert: str, sentences: list[str]) -> None:
    whole = text_bench(tiny_bert, sentences, WholeModel())
    bench = text_bench(tiny_bert, sentences, WholeModel(frozen=EMBEDDINGS))
    left_out = set(whole.parameters) - set(bench.parameters)
    assert left_out == {name for name in whole.parameters if name.startswith("encoder.embeddings.")}
    assert len(left_out) == 5  # words, positions, segments, and the norm's two
    before = {name: bench.module.get_parameter(name).detach().clone() for name in left_out}
    learner = ModelLearner(bench, {}, SGD(0.5, Schedule(batch_size=4, steps=3)))
    rows = learner.train(bench.initial, [bench.everything], Seeds(0).clients("data order", 0, [0])).rows
    assert float(rows.norm()) > 0
    assert all(torch.equal(bench.module.get_parameter(name), value) for name, value in before.items())
    together, frozen = update(whole), update(bench)
    for name, value in frozen.items():  # nothing else of the gradient knows of it
        torch.testing.assert_close(value, together[name], rtol=1e-5, atol=1e-8)


def test_the_bag_of_words_is_free_unless_embeddings_are_frozen(tiny_bert: str, sentences: list[str]) -> None:
    """Rows of the word embeddings' gradient that are not zero are the batch's tokens, no more and no fewer."""
    word = "encoder.embeddings.word_embeddings.weight"
    whole = text_bench(tiny_bert, sentences, WholeModel())
    gradient = update(whole)[word]
    inputs = whole.everything.take(torch.arange(4)).inputs
    tokens = set(inputs["input_ids"][inputs["attention_mask"] == 1].tolist())
    shown = set(gradient.any(1).nonzero()[:, 0].tolist())
    padded = {0} if bool((inputs["attention_mask"] == 0).any()) else set()
    assert tokens <= shown <= tokens | padded
    others = whole.everything.take(torch.arange(4, 8)).inputs["input_ids"]
    assert shown != set(others.unique().tolist())
    assert word not in update(text_bench(tiny_bert, sentences, WholeModel(frozen=EMBEDDINGS)))


def test_the_span_of_attention_inputs_still_tells_tokens_apart(tiny_bert: str, sentences: list[str]) -> None:
    """What frozen embeddings do not stop: tokens at their places lie in the span of the first query's gradient."""
    bench = text_bench(tiny_bert, sentences, WholeModel(frozen=EMBEDDINGS))
    gradient = update(bench, count=1)["encoder.encoder.layer.0.attention.self.query.weight"].double()
    one = bench.everything.take(torch.tensor([0]))
    length = int(one.inputs["attention_mask"].sum())
    assert length < 16  # fewer places than the width, or everything lies in the span
    encoder: Any = bench.module.get_submodule("encoder")
    directions = torch.linalg.svd(gradient)[2]
    ranks = torch.linalg.svdvals(gradient)
    rank = int((ranks > 1e-5 * ranks[0]).sum())
    outside = directions[rank:]

    def distance(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            inputs = encoder.embeddings(input_ids=tokens[None])[0].double()
        return (inputs @ outside.T).norm(dim=1) / inputs.norm(dim=1)

    own = one.inputs["input_ids"][0, :length]
    assert float(distance(own).max()) < 1e-3
    assert float(distance((own + 5) % 40 + 3).min()) > 0.05


def test_a_tied_head_is_frozen_with_the_embeddings(sentences: list[str], tmp_path: Path, tiny_llama: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    configuration = AutoConfig.from_pretrained(tiny_llama)
    configuration.tie_word_embeddings = True
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(configuration).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    found = update(decoder_bench(str(tmp_path), sentences, WholeModel(frozen=("*embed_tokens*",))))
    assert not any("embed" in name or "lm_head" in name for name in found)
    untied = update(decoder_bench(tiny_llama, sentences, WholeModel(frozen=("*embed_tokens*",))))
    assert [name for name in untied if "embed" in name or "lm_head" in name] == ["lm_head.weight"]


# Saving, engines, plans


@pytest.mark.parametrize("frozen", [(), EMBEDDINGS], ids=repr)
@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_a_saved_model_is_one_of_its_own_class(
    pooling: str, frozen: tuple[str, ...], tiny_bert: str, sentences: list[str], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    bench = text_bench(tiny_bert, sentences, WholeModel(frozen), pooling)
    model = bench.initial + 0.1 * torch.randn(bench.layout.d, generator=torch.Generator().manual_seed(1))
    bench.save(model, tmp_path)
    if pooling == "mean":
        loaded: Any = MeanPooledClassifier.from_pretrained(tiny_bert, 3)
        loaded.load_state_dict(load_file(tmp_path / "model.safetensors"))
    else:
        loaded = type(bench.module).from_pretrained(tmp_path)  # type: ignore[attr-defined]
    inputs = {name: value[:5] for name, value in bench.everything.inputs.items()}

    def logits(module: Any) -> Tensor:
        output = module(**inputs)
        found: Tensor = getattr(output, "logits", output)
        return found.detach()

    want = logits(bench.load(model))
    assert torch.equal(logits(loaded.eval()), want)
    assert not torch.allclose(logits(bench.load(bench.initial)), want, atol=1e-3)


@pytest.mark.parametrize(
    ("frozen", "note"),
    [
        ((), r"sequential: encoder\.embeddings\.word_embeddings \(Embedding\): trained weight; only linear layers"),
        (EMBEDDINGS, r"sequential: encoder\..*LayerNorm \(LayerNorm\): trained weight and bias; only linear layers"),
        ((*EMBEDDINGS, "*LayerNorm*", "*pooler*"), r"batched$"),
    ],
    ids=["everything", "norms", "linear layers"],
)
def test_asked_for_in_batches_it_trains_as_one_by_one(
    frozen: tuple[str, ...], note: str, tiny_bert: str, sentences: list[str]
) -> None:
    rows = []
    for engine in ("batched", "sequential"):
        bench = text_bench(tiny_bert, sentences, WholeModel(frozen))
        learner = ModelLearner(bench, {}, SGD(0.5, Schedule(batch_size=4, steps=2)), engine=engine)  # type: ignore[arg-type]
        clients = [bench.everything.take(torch.arange(10 * i, 10 * i + 10)) for i in range(3)]
        trained = learner.train(bench.initial, clients, Seeds(0).clients("data order", 0, [0, 1, 2]))
        assert trained.failed == {}
        assert re.match("sequential: as asked" if engine == "sequential" else note, learner.engine_note)
        rows.append(trained.rows)
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-3, atol=1e-6)
    assert float(rows[0].norm()) > 0


def test_private_gradients_ask_to_freeze_what_no_example_reaches(tiny_bert: str, sentences: list[str]) -> None:
    local = LocalSampling(batch_size=4, local_steps=1)
    plan = DPPlan(0.1, 1.0, 1.0, 1e-5, unit="example", place="local", sampling="full", local=local)
    outcomes = {}
    for frozen in ((), ("*pooler*",)):
        bench = text_bench(tiny_bert, sentences, WholeModel(frozen))
        learner = ModelLearner(bench, {}, SGD(0.1, Schedule(batch_size=4, steps=1)))
        privacy = plan.gradient_privacy(learner.layers)
        batch = [bench.everything.take(torch.arange(8))]
        try:
            trained = learner.train(bench.initial, batch, Seeds(0).clients("data order", 0, [0]), privacy)
            outcomes[frozen] = "" if not trained.failed else trained.failed[0]
        except PrivacyBroken as reason:
            outcomes[frozen] = str(reason)
    assert "pooler" in outcomes[()] and "freeze it" in outcomes[()]
    assert outcomes[("*pooler*",)] == ""


# Bad input


@pytest.mark.parametrize(
    ("frozen", "said"),
    [
        (("*embedings*",), r"no parameter of the model is called '\*embedings\*'.*such as 'encoder.embeddings"),
        (("*bias",), r"'\*bias' names classifier.bias of the head"),
        (("encoder.embeddings.word_embedding.weight",), "did you mean 'encoder.embeddings.word_embeddings.weight'"),
    ],
    ids=["pattern", "head", "name"],
)
def test_patterns_that_name_nothing_or_the_head_are_refused(frozen: tuple[str, ...], said: str, tiny_bert: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        SequenceClassifier(tiny_bert, adapter=WholeModel(frozen)).build(LABELS, Seeds(0).generator("initialisation"))


def test_a_decoder_of_which_nothing_is_left_is_refused(tiny_llama: str) -> None:
    with pytest.raises(InvalidArgument, match=r"frozen=\('\*',\) leaves nothing to train"):
        CausalLanguageModel(tiny_llama, adapter=WholeModel(("*",))).build(("t",), Seeds(0).generator("initialisation"))


def test_capitals_count(tiny_bert: str) -> None:
    """Matching as the file system does would depend on the machine."""
    module = MeanPooledClassifier.from_pretrained(tiny_bert, 3)
    with pytest.raises(InvalidArgument, match="no parameter"):
        WholeModel(("*EMBEDDINGS*",)).applied(module, ("classifier",), None)
    built = BuiltModel(WholeModel(("*LayerNorm*",)).applied(module, ("classifier",), None), None, (), lambda _: None)
    frozen = {name for name, parameter in built.module.named_parameters() if not parameter.requires_grad}
    assert len(frozen) == 2 * (1 + 2 * 3)  # weight and bias, of the embeddings and twice in each block


# On the command line


def asked(model: ModelSource) -> ModelSource:
    return model


def read(*words: str) -> Any:
    return values(parser_for(asked), asked, ["--model", "SequenceClassifier", *words])["model"].adapter


HERE = "privfm.learning.adapter_kinds.WholeModel"


def test_it_replaces_the_default_by_its_name() -> None:
    assert read() == LoRA()
    assert read("--model.adapter", HERE) == WholeModel()
    written = f'{{"class_path": "{HERE}", "init_args": {{"frozen": ["*embeddings*", "*pooler*"]}}}}'
    assert read("--model.adapter", written) == WholeModel(("*embeddings*", "*pooler*"))
    told = parser_for(WholeModel).format_help()
    assert "--frozen" in told and "Unvalidated" not in told

"""Labels from a head's gradient, against autograd on known labels; the head, against models of several kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from privfm.attacks.reconstruction.classifier_head import head_of
from privfm.attacks.reconstruction.labels import (
    Labels,
    counts_by_impact,
    counts_by_probabilities,
    distinct_labels,
    labels_given_inputs,
    labels_of_examples,
)
from privfm.checks import InvalidArgument
from privfm.contracts import LocalSteps, Observation, gradients_of


def network(seed: int = 0, classes: int = 6, bias: bool = True) -> nn.Sequential:
    """A small untrained network with non-negative features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(16, classes, bias=bias)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), head).double()


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 1, 3, 4, generator=Generator().manual_seed(seed), dtype=torch.float64)


def observation(model: nn.Module, labels: list[int], seed: int = 1, **declared: Any) -> Observation:
    loss = cross_entropy(model(images(len(labels), seed)), torch.tensor(labels))
    return Observation(model, gradients_of(model, loss)).told(**declared)


def without_bias(found: Observation) -> Observation:
    kept = {name: one for name, one in found.tensors.items() if name != "3.bias"}
    return Observation(found.model, kept, declared=found.declared)


# ------------------------------------------------------------------------------------------------- pure functions


def test_further_examples_of_several_labels_are_not_all_given_to_one() -> None:
    """Under equal probabilities 1/c of all labels, g = 1/c - n/B; a stale index in the second stage returns one label.

    Counts 3, 3, 2 of 8 examples and 4 labels: g = (-1/8, -1/8, 0, 1/4). Told B = 4, by hand: the negative ones sum to
    -1/4, a share is -1/4 (1 + 1/4) / 4 = -5/64; after stage 1 the first two are at -3/64, and each gets one more.
    """
    gradient = torch.tensor([-1 / 8, -1 / 8, 0.0, 1 / 4])
    assert counts_by_impact(gradient, 4).tolist() == [2, 2, 0, 0]
    assert counts_by_impact(gradient, 6).tolist() == [3, 3, 0, 0]
    assert counts_by_probabilities(gradient, torch.full((4,), 0.25), 8).tolist() == [3, 3, 2, 0]


def test_a_share_is_corrected_for_what_other_labels_hide() -> None:
    """By hand: g = (-4, -7, 11)/16 of 4 examples and 3 labels. A share is -11/16 (1 + 1/3) / 4 = -3.67/16, so that
    stage 1 leaves (-0.33, -3.33)/16 and each gets one more. Without 1/3 it is -2.75/16: (-1.25, -4.25)/16, and both
    go to the second.
    """
    assert counts_by_impact(torch.tensor([-4 / 16, -7 / 16, 11 / 16]), 4).tolist() == [2, 2, 0]


def test_what_is_certain_outweighs_the_stand_ins() -> None:
    gradient, probabilities = torch.tensor([-0.01, -0.6, 0.3, 0.31]), torch.tensor([0.0, 0.4, 0.3, 0.3])
    assert counts_by_probabilities(gradient, probabilities, 4).tolist() == [1, 3, 0, 0]  # wanted: 0.04, 4, 0, -0.04
    assert counts_by_probabilities(gradient, probabilities, 4, least=0.02).tolist() == [0, 4, 0, 0]


@pytest.mark.parametrize("factor", [1e-6, 3.0])
def test_impact_does_not_see_scale(factor: float) -> None:
    gradient = torch.tensor([-0.3, -0.1, 0.15, 0.25])
    assert counts_by_impact(factor * gradient, 9).tolist() == counts_by_impact(gradient, 9).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_counts_are_exact_with_the_examples_own_probabilities(seed: int) -> None:
    labels = torch.randint(6, (40,), generator=Generator().manual_seed(seed)).tolist()
    model = network(seed)
    found = observation(model, labels, seed)
    probabilities = model(images(40, seed)).softmax(1).mean(0).detach()
    counts = counts_by_probabilities(found.tensors["3.bias"], probabilities, 40)
    assert counts.tolist() == [labels.count(label) for label in range(6)]


def test_whole_numbers_are_the_nearest_of_all() -> None:
    gradient, probabilities = torch.tensor([-0.02, 0.31, -0.29]), torch.tensor([0.4, 0.35, 0.25])
    wanted = 5 * (probabilities - gradient)
    allowed = [(i, j, 5 - i - j) for i in range(1, 6) for j in range(6 - i) if 5 - i - j >= 1]
    best = min(allowed, key=lambda counts: float((torch.tensor(counts) - wanted).square().sum()))
    assert tuple(counts_by_probabilities(gradient, probabilities, 5).tolist()) == best


def test_more_negative_labels_than_examples_keep_the_lowest() -> None:
    gradient = torch.tensor([-0.1, -0.5, -0.3, 0.9])
    assert counts_by_impact(gradient, 2).tolist() == [0, 1, 1, 0]
    assert counts_by_impact(gradient, 3, least=0.4).tolist()[1] >= 1


def test_distinct_labels_of_non_negative_features() -> None:
    found = observation(network(3), [4, 0, 5], seed=3)
    assert distinct_labels(found.tensors["3.weight"], 3) == (0, 4, 5)
    with pytest.raises(InvalidArgument, match="7 examples of 6 labels"):
        distinct_labels(found.tensors["3.weight"], 7)


@pytest.mark.parametrize("bias", [True, False])
def test_each_example_has_its_label_once_its_features_are_known(bias: bool) -> None:
    labels = [2, 2, 5, 0, 1, 2, 4]
    model = network(4, bias=bias)
    found = observation(model, labels, seed=4)
    true = list(images(7, 4))
    read, apart = labels_given_inputs(found, true)
    assert read == tuple(labels) and apart < 1e-9
    order = [3, 0, 6, 5, 1, 2, 4]
    assert labels_given_inputs(found, [true[k] for k in order])[0] == tuple(labels[k] for k in order)
    # What is not behind the gradient shows: a missing example, foreign ones.
    assert labels_given_inputs(found, true[:-1])[1] > 0.1
    assert labels_given_inputs(found, list(images(7, 99)))[1] > 0.5
    with pytest.raises(InvalidArgument, match="expected \\(c, h\\)"):
        labels_of_examples(torch.zeros(6, 4), torch.zeros(2, 5), torch.zeros(2, 6))


@pytest.mark.parametrize("count", [counts_by_impact, lambda g, b: counts_by_probabilities(g, torch.ones(2) / 2, b)])
def test_what_is_no_gradient_is_refused(count: Any) -> None:
    with pytest.raises(InvalidArgument, match="all finite"):
        count(torch.tensor([torch.nan, 1.0]), 2)
    with pytest.raises(InvalidArgument, match="examples=0"):
        count(torch.tensor([-1.0, 1.0]), 0)


def test_a_zero_gradient_has_no_counts() -> None:
    with pytest.raises(InvalidArgument, match="no entry of the gradient is negative"):
        counts_by_impact(torch.zeros(3), 2)
    with pytest.raises(InvalidArgument, match=r"probabilities has shape \(2,\): expected \(3,\)"):
        counts_by_probabilities(torch.zeros(3), torch.zeros(2), 2)


# --------------------------------------------------------------------------------------------------------- attack


@pytest.mark.parametrize("label", [0, 3, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_one_example_is_always_told(label: int, bias: bool) -> None:
    for seed in range(4):
        found = Labels()(observation(network(seed, bias=bias), [label], seed, examples=1))
        assert found.labels == (label,) and found.used == ("examples",)
        assert found.facts == {"head": "3.weight", "read from": "bias" if bias else "weight"}


def test_two_labels_without_a_bias_are_told_by_where_features_point() -> None:
    for label in (0, 1):
        model = network(2, classes=2, bias=False)
        found = Labels()(observation(model, [label], 2, examples=1, shape=(1, 3, 4)))
        assert found.labels == (label,) and found.used == ("shape", "examples")


def test_without_a_number_each_certain_label_is_named_once() -> None:
    found = Labels()(observation(network(), [1, 1, 1, 4, 4, 1]))
    assert found.labels == (1, 4) and found.used == ()


@pytest.mark.parametrize(("method", "least", "most"), [("impact", 48, 40), ("probabilities", 76, 56)])
def test_counts_of_an_untrained_model(method: Any, least: int, most: int) -> None:
    """Of 80 labels; those of another batch are found as often as bags of labels have in common by chance.

    Bounds are from seeds 200 to 229, where ten batches gave 53 to 56 and always 80, others' labels at most 32 and 47.
    """
    right = foreign = 0
    for seed in range(40, 50):
        source = Generator().manual_seed(seed)
        labels = torch.randint(6, (8,), generator=source).tolist()
        other = torch.randint(6, (8,), generator=source).tolist()
        found = Labels(method)(observation(network(seed), labels, seed, examples=8, shape=(1, 3, 4)))
        assert found.labels is not None and len(found.labels) == 8 and list(found.labels) == sorted(found.labels)
        assert found.used == ("shape", "examples")
        right += sum(min(found.labels.count(label), labels.count(label)) for label in range(6))
        foreign += sum(min(found.labels.count(label), other.count(label)) for label in range(6))
    assert right >= least and foreign <= most


def test_the_method_follows_from_what_there_is() -> None:
    """Without inputs to run the model on, or with a sum of clients of unknown scale, only impact is left."""
    told = observation(network(8), [0, 0, 0, 2, 5, 5, 5, 5], 8, examples=8)
    shaped = told.told(shape=(1, 3, 4))
    summed = Observation(told.model, told.tensors, declared=shaped.declared, clients=2)
    assert Labels()(shaped).labels == Labels("probabilities")(shaped).labels
    assert Labels()(told).labels == Labels()(summed).labels == Labels("impact")(told).labels
    assert Labels()(told).labels != Labels()(shaped).labels


def test_public_inputs_stand_in_and_are_said() -> None:
    labels = [0, 0, 0, 2, 5, 5]
    told = observation(network(7), labels, 7, examples=6)
    found = Labels("probabilities", public=images(6, 7))(told)  # the very inputs: exact
    assert found.labels == tuple(labels) and found.used == ("public inputs", "examples")
    alone = Labels("probabilities", public=images(64, 70))(without_bias(told))
    assert alone.facts["read from"] == "weight" and alone.labels is not None and len(alone.labels) == 6


def test_declared_noise_makes_no_label_certain() -> None:
    told = observation(network(), [1, 1, 1, 4, 4, 1])
    quiet = float(-told.tensors["3.bias"][4]) / 3
    assert Labels()(told.told(noise=0.9 * quiet)).labels == (1, 4)
    found = Labels()(told.told(noise=1.1 * quiet))
    assert found.labels == (1,) and found.used == ("noise",)
    steps = LocalSteps(learning_rate=0.1, steps=2)
    moved = Observation(told.model, {name: -0.2 * one for name, one in told.tensors.items()}, steps)
    assert Labels()(moved.told(noise=0.18 * quiet)).labels == (1, 4)
    assert Labels()(moved.told(noise=0.22 * quiet)).labels == (1,)


def test_noise_that_leaves_nothing_negative_is_no_error() -> None:
    told = observation(network(), [1, 2, 2, 3], examples=4)
    lifted = Observation(told.model, {**told.tensors, "3.bias": told.tensors["3.bias"] + 5}, declared=told.declared)
    found = Labels()(lifted.told(noise=2.0))
    assert found.labels is not None and len(found.labels) == 4


def test_same_seed_same_labels_and_nothing_of_the_model_changes() -> None:
    model = network().train()
    told = observation(model, [1, 2, 2, 3], examples=4, shape=(1, 3, 4))
    before = {name: one.clone() for name, one in model.state_dict().items()}
    state = torch.get_rng_state()
    first, again = (Labels("probabilities")(told, generator=Generator().manual_seed(3)).labels for _ in range(2))
    assert first == again and bool((torch.get_rng_state() == state).all()) and model.training
    assert all(bool((one == before[name]).all()) for name, one in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_refusals_name_the_way_out() -> None:
    model = network()
    told = observation(model, [1, 2], examples=2)
    blind = dict.fromkeys(told.tensors, torch.zeros(1)) | {
        name: one * torch.nan if name.startswith("3") else one for name, one in told.tensors.items()
    }
    for refused, words in (
        (Observation(model, blind), "was sent whole; `labels_present` reads a part"),
        (Observation(model, {"1.weight": told.tensors["1.weight"]}), "neither 3.weight nor"),
        (Observation(model, {name: 0 * one for name, one in told.tensors.items()}), "is zero"),
        (Observation(model, told.tensors, LocalSteps(0.1, optimizer="adam")), "optimizer='adam'"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            Labels()(refused)
    only_bias = Observation(model, {"3.bias": told.tensors["3.bias"]}).told(examples=2)
    assert Labels()(only_bias).labels == (1, 2)
    with pytest.raises(InvalidArgument, match=r"method='distinct' reads 3\.weight"):
        Labels("distinct")(only_bias)
    with pytest.raises(InvalidArgument, match="more examples than 6 labels"):
        Labels("distinct")(told.told(examples=7))
    with pytest.raises(InvalidArgument, match="runs the model: declare `shape`"):
        Labels("probabilities")(told)
    with pytest.raises(InvalidArgument, match="method='impact', which does not see scale"):
        Labels("probabilities")(Observation(model, told.tensors, clients=2))
    with pytest.raises(InvalidArgument, match=r"head='4\.weight': the model has no linear layer"):
        Labels(head="4.weight")(told)
    with pytest.raises(InvalidArgument, match="method='llg' is not known"):
        Labels("llg")  # type: ignore[arg-type]


def test_distinct_labels_by_the_attack() -> None:
    found = Labels("distinct")(observation(network(3), [4, 0, 5], seed=3, examples=3))
    assert found.labels == (0, 4, 5)


# ----------------------------------------------------------------------------------------------------------- head


class _Backwards(nn.Module):
    """Registers its head first, and a layer of the head's shape last."""

    def __init__(self) -> None:
        super().__init__()
        self.answer, self.inner = nn.Linear(5, 5), nn.Linear(12, 5)

    def forward(self, given: Tensor) -> Tensor:
        answer: Tensor = self.answer(self.inner(given.flatten(1)).relu())
        return answer


def test_the_head_is_what_puts_out_the_logits_not_what_stands_last() -> None:
    with torch.random.fork_rng(devices=[]):
        model = _Backwards()
    assert head_of(model, torch.ones(1, 1, 3, 4)) == ("answer.weight", "answer.bias")
    with pytest.raises(InvalidArgument, match="has 2 linear layers: give the weight's parameter name as `head`"):
        head_of(model)
    with pytest.raises(InvalidArgument, match="does not run on inputs"):
        head_of(model, torch.ones(1, 1, 5, 5))
    loss = cross_entropy(model(torch.ones(1, 1, 3, 4)), torch.tensor([3]))
    found = Labels()(Observation(model, gradients_of(model, loss)).told(examples=1, shape=(1, 3, 4)))
    assert found.labels == (3,) and found.facts["head"] == "answer.weight"


def transformer(kind: str) -> Any:
    """A small random classifier."""
    library: Any = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    shared: dict[str, Any] = {"vocab_size": 50, "num_labels": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "bert":
            return library.BertForSequenceClassification(library.BertConfig(**small, **shared))
        if kind == "gpt2":
            config = library.GPT2Config(n_embd=16, n_layer=1, n_head=2, **shared, pad_token_id=0)
            return library.GPT2ForSequenceClassification(config)
        if kind == "llama":
            config = library.LlamaConfig(**small, **shared)  # no padding token: one text at a time
            return library.LlamaForSequenceClassification(config)
        from peft import LoraConfig, get_peft_model

        wrapped = library.BertForSequenceClassification(library.BertConfig(**small, **shared))
        return get_peft_model(wrapped, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))


@pytest.mark.parametrize(
    ("kind", "weight", "bias"),
    [
        ("bert", "classifier.weight", "classifier.bias"),
        ("gpt2", "score.weight", None),
        ("llama", "score.weight", None),
        (
            "peft",
            "base_model.model.classifier.modules_to_save.default.weight",
            "base_model.model.classifier.modules_to_save.default.bias",
        ),
    ],
)
def test_heads_of_transformers(kind: str, weight: str, bias: str | None) -> None:
    model = transformer(kind).eval()
    assert head_of(model) == (weight, bias)
    texts = [[7, 8, 9, 4], [11, 5, 30, 2, 6], [3, 40, 12, 9, 10, 41]]
    labels = [2, 0, 2]

    def loss(text: list[int], label: int) -> Tensor:
        given = {"input_ids": torch.tensor([text]), "attention_mask": torch.ones(1, len(text)).long()}
        return cross_entropy(model(**given).logits, torch.tensor([label]))

    told = Observation(model, gradients_of(model, torch.stack(list(map(loss, texts, labels))).mean()))
    read, apart = labels_given_inputs(told, [torch.tensor(text) for text in texts])
    assert read == tuple(labels) and apart < 1e-3
    assert labels_given_inputs(told, [torch.tensor(text[::-1]) for text in texts])[1] > 10 * max(apart, 1e-6)
    assert Labels()(Observation(model, gradients_of(model, loss(texts[1], 0))).told(examples=1)).labels == (0,)


def test_the_head_of_a_model_without_a_token_embedding_is_found_by_its_structure() -> None:
    """Transformers raises NotImplementedError where somebody asks a residual network for its input embeddings."""
    library: Any = pytest.importorskip("transformers")
    config = library.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    with torch.random.fork_rng(devices=[]):
        model = library.ResNetForImageClassification(config).eval()
    with pytest.raises(NotImplementedError):
        model.get_input_embeddings()
    assert head_of(model) == ("classifier.1.weight", "classifier.1.bias")


def test_a_language_model_is_told_apart() -> None:
    library: Any = pytest.importorskip("transformers")
    with torch.random.fork_rng(devices=[]):
        model = library.GPT2LMHeadModel(library.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(InvalidArgument, match="labels of a language model are its target tokens"):
        head_of(model)

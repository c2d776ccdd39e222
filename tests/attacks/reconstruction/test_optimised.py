"""TAG and LAMP: the matched gradient against the client's own, recovery at tiny size, controls, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from privfm.attacks.reconstruction.optimised import LAMP, TAG, NGramPrior
from privfm.attacks.reconstruction.optimised.distances import Cosine, GradientDistance, Observed, SquaredAndAbsolute
from privfm.attacks.reconstruction.optimised.moves import MOVES
from privfm.attacks.reconstruction.optimised.search import Candidate, Problem
from privfm.attacks.reconstruction.optimised.setting import Tokens, setting
from privfm.contracts import Observation, Watch

transformers = pytest.importorskip("transformers")

FRAME = Tokens(first=1, last=2)
TEXTS = [(1, 7, 12, 30, 9, 2), (1, 25, 7, 2), (1, 40, 41, 42, 8, 7, 2)]
LABELS = [0, 1, 1]
KINDS = ("bert", "roberta", "gpt2", "gpt2-next", "llama", "llama-next")
Sent = Callable[..., dict[str, Tensor]]


def build(kind: str, seed: int = 0, spread: float = 0.1) -> nn.Module:
    """Two blocks, width 32, 60 tokens; `-next` is a language model, else two classes."""
    name, _, following = kind.partition("-")
    config: dict[str, Any] = {"vocab_size": 60, "num_labels": 2, "initializer_range": spread, "pad_token_id": 0}
    if name == "gpt2":
        config |= {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 20, "bos_token_id": 1, "eos_token_id": 2}
    else:
        config |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        config |= {"max_position_embeddings": 20}
    prefix = {"bert": "Bert", "roberta": "Roberta", "gpt2": "GPT2", "llama": "Llama"}[name]
    head = {"gpt2": "LMHeadModel", "llama": "ForCausalLM"}[name] if following else "ForSequenceClassification"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built: nn.Module = getattr(transformers, prefix + head)(getattr(transformers, f"{prefix}Config")(**config))
    return built.eval()


def observe(sent: Sent, model: nn.Module, texts: Any = TEXTS, labels: Any = LABELS) -> Observation:
    """With lengths told, and a classifier's labels."""
    lengths = tuple(map(len, texts))
    if type(model).__name__.endswith("ForSequenceClassification"):
        return Observation(model, sent(model, texts, labels)).told(lengths=lengths, labels=torch.tensor(labels))
    return Observation(model, sent(model, texts)).told(lengths=lengths)


def truth(problem: Problem, texts: Any = TEXTS, labels: Any = LABELS) -> Candidate:
    """What the client has, as a candidate."""
    given = problem.given
    tokens = torch.zeros_like(given.mask)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    classes = 0 if given.imitation.language_model else given.imitation.classes
    table = given.imitation.embedding
    hot = nn.functional.one_hot(torch.tensor(labels), classes) if classes else torch.zeros(len(texts), 0)
    return Candidate(table[tokens], (hot.to(table) - 1) * 1e6)


# --------------------------------------------------------------------------------------------------- the objective


@pytest.mark.parametrize("distance", [Cosine(), SquaredAndAbsolute(0.01, falling=True)], ids=["cosine", "absolute"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_is_zero_at_the_truth(sent: Sent, kind: str, distance: GradientDistance) -> None:
    """In float64, padded texts and all; the gradient comes from the given model with its fused attention."""
    model = build(kind).double()
    problem = Problem(setting(observe(sent, model), FRAME), distance)
    right = truth(problem)
    least = float(problem.loss(right))
    # Llama's norms compute in float32 whatever the weights are.
    assert abs(least) < (1e-3 if kind.startswith("llama") else 1e-8)
    others = problem.with_special_tokens(right.embeddings.roll(1, 0))
    assert float(problem.loss(dataclasses.replace(right, embeddings=others))) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_the_imitated_gradient_is_the_clients(sent: Sent, kind: str) -> None:
    model = build(kind).double()
    observation = observe(sent, model)
    problem = Problem(setting(observation, FRAME), Cosine())
    right, imitation = truth(problem), problem.given.imitation
    if imitation.language_model:
        targets = nn.functional.one_hot(problem.tokens(right.embeddings), 60).double()
    else:
        targets = right.labels.softmax(-1)
    found = imitation.gradients(right.embeddings, problem.given.mask, targets)
    assert len(found) >= len(observation.tensors) - 1  # all but the token embedding
    # Llama's norms compute in float32 whatever the weights are.
    error = 1e-5 if kind.startswith("llama") else 1e-9
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, observation.tensors[name], rtol=10 * error, atol=error, msg=name)


@pytest.mark.parametrize("distance", [Cosine(), SquaredAndAbsolute(0.0)], ids=["cosine", "squared"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "gpt2-next"])
def test_its_derivative_is_a_difference_quotient(sent: Sent, kind: str, distance: GradientDistance) -> None:
    problem = Problem(setting(observe(sent, build(kind).double()), FRAME), distance)
    here = problem.random(Generator().manual_seed(3))
    embeddings = (0.3 * here.embeddings).requires_grad_()
    if problem.given.imitation.language_model:  # its targets follow by a surrogate, which is no derivative
        fixed = nn.functional.one_hot(problem.tokens(embeddings), 60).double()
        problem._next_tokens = lambda _: fixed  # type: ignore[method-assign]
    loss = problem.loss(dataclasses.replace(here, embeddings=embeddings), differentiable=True)
    (slope,) = torch.autograd.grad(loss, embeddings)
    way = torch.randn(embeddings.shape, generator=Generator().manual_seed(4), dtype=torch.float64)
    step = 1e-6
    ends = [problem.loss(dataclasses.replace(here, embeddings=embeddings.detach() + s * way)) for s in (step, -step)]
    assert float((slope * way).sum()) == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=1e-4)


def test_distances_by_hand() -> None:
    """Two tensors: cosines 0 and 1; differences (1, -1) and (0, 2), the second with half the alpha."""
    observed = Observed({"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([0.0, 2.0])})
    imitated = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 4.0])}
    assert float(Cosine()(imitated, observed)) == pytest.approx((1 + 0) / 2)
    assert float(SquaredAndAbsolute(0.5)(imitated, observed)) == pytest.approx(2 + 0.5 * 2 + 4 + 0.5 * 2)
    assert float(SquaredAndAbsolute(0.5, True)(imitated, observed)) == pytest.approx(2 + 0.5 * 2 + 4 + 0.25 * 2)


@pytest.mark.parametrize("distance", [Cosine(), SquaredAndAbsolute(0.1, True)], ids=["cosine", "absolute"])
def test_distances_differentiate_as_autograd_does(distance: GradientDistance) -> None:
    generator = Generator().manual_seed(0)
    theirs = {name: torch.randn(3, 2, generator=generator, dtype=torch.float64) for name in "ab"}
    theirs["a"][1] = torch.nan
    leaves = [torch.randn(3, 2, generator=generator, dtype=torch.float64).requires_grad_() for _ in "ab"]
    observed = Observed(theirs)
    assert torch.autograd.gradcheck(lambda a, b: distance({"a": a, "b": b}, observed), leaves)


def test_a_tensor_of_rounding_has_no_direction(sent: Sent) -> None:
    """The gradient of a key's bias is zero under softmax; what float32 leaves of it is not matched."""
    observed = Observed(sent(build("bert"), TEXTS, LABELS))
    keys = [name for name in observed.tensors if name.endswith("key.bias")]
    assert len(keys) == 2
    assert not set(keys) & set(observed.informative)
    assert len(observed.informative) >= len(observed.tensors) - 3


# ----------------------------------------------------------------------------------------------------- recovery

SHORT: dict[str, Any] = {"first": 1, "last": 2, "iterations": 100, "candidates": 5, "moves": 12, "move_every": 25}
ONE = [(1, 33, 8, 51, 19, 2)]


def places_right(found: tuple[int, ...], text: tuple[int, ...]) -> int:
    return sum(one == other for one, other in zip(found[1:-1], text[1:-1], strict=True))


@pytest.mark.parametrize(
    ("kind", "variant"),
    [("bert", "cosine"), ("gpt2", "absolute"), ("gpt2-next", "cosine"), ("llama-next", "absolute")],
)
def test_lamp_recovers_one_text_of_a_tiny_model(sent: Sent, kind: str, variant: Any) -> None:
    found = LAMP(**SHORT, variant=variant)(observe(sent, build(kind), ONE, [1]))
    assert found.texts == (ONE[0],)
    assert found.stopped == ""


def test_tag_recovers_one_text_of_a_tiny_model(sent: Sent) -> None:
    observation = observe(sent, build("gpt2-next"), ONE)
    found = TAG(first=1, last=2, iterations=150)(observation)
    assert found.texts == (ONE[0],)
    assert found.used == ("lengths",)


def test_the_same_generator_gives_the_same(sent: Sent) -> None:
    observation, attack = observe(sent, build("gpt2"), TEXTS[:2], [0, 1]), LAMP(**SHORT | {"iterations": 12})
    found = [attack(observation, generator=Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert found[0].texts == found[1].texts
    assert found[0].facts == found[1].facts
    assert found[2].facts["loss"] != found[0].facts["loss"]


@pytest.mark.parametrize("variant", ["cosine", "absolute"])
def test_a_foreign_or_permuted_gradient_gives_nothing(sent: Sent, variant: Any) -> None:
    """The truth is asked of an attack that was shown another text's gradient, or its own in another order."""
    model, attack = build("gpt2-next"), LAMP(**SHORT, variant=variant)
    foreign = attack(observe(sent, model, [(1, 14, 45, 22, 37, 2)]))
    own = observe(sent, model, ONE)
    mixed = {name: tensor.flatten()[torch.randperm(tensor.numel(), generator=Generator().manual_seed(0))].reshape(
        tensor.shape) for name, tensor in own.tensors.items()}  # fmt: skip
    permuted = attack(dataclasses.replace(own, tensors=mixed))
    for found in (foreign, permuted):
        assert places_right(found.texts[0], ONE[0]) <= 1
        assert len(found.texts[0]) == len(ONE[0])


def test_moves_lower_the_objective_and_keep_special_tokens(sent: Sent) -> None:
    """From the right tokens in a wrong order, without a gradient step, to a lower loss."""
    observation = observe(sent, build("gpt2-next", 1), ONE)
    attack = LAMP(**SHORT | {"moves": 60})
    problem = Problem(setting(observation, FRAME), Cosine())
    right = truth(problem, ONE)
    wrong = dataclasses.replace(right, embeddings=right.embeddings[:, [0, 2, 1, 3, 4, 5]])
    accepted = dict.fromkeys(MOVES, 0)
    found = attack._rearrange(problem, wrong, accepted, Watch(), Generator().manual_seed(0))
    assert tuple(problem.tokens(found.embeddings)[0].tolist()) == ONE[0]
    assert sum(accepted.values()) == 1
    assert float(problem.loss(found)) < 1e-4 < float(problem.loss(wrong))


def test_other_tokens_are_tried_until_the_gradient_fits(sent: Sent) -> None:
    """From embeddings nearest to a wrong token at two places, the right ones second: no gradient step, exact."""
    observation = observe(sent, build("gpt2"), ONE, [1])
    problem = Problem(setting(observation, FRAME), Cosine())
    right, table = truth(problem, ONE, [1]), problem.given.imitation.embedding
    embeddings = right.embeddings.clone()
    for place, wrong in ((2, 44), (4, 27)):
        embeddings[0, place] = (
            embeddings[0, place] / embeddings[0, place].norm() + 1.4 * table[wrong] / table[wrong].norm()
        )
    start = dataclasses.replace(right, embeddings=embeddings)
    assert places_right(tuple(problem.tokens(embeddings)[0].tolist()), ONE[0]) == 2
    attack = LAMP(**SHORT, alternatives=3)
    found = attack._refined(problem, start, dict.fromkeys(MOVES, 0), Watch(), Generator().manual_seed(0))
    assert tuple(problem.tokens(found.embeddings)[0].tolist()) == ONE[0]
    assert float(problem.loss(found)) < 1e-4
    whole = LAMP(**SHORT | {"iterations": 2}, alternatives=2)(observation)
    assert "loss of the tokens" in whole.facts


def test_the_prior_decides_where_the_gradient_does_not(sent: Sent) -> None:
    """With all weight on the prior, the order that the public texts have is taken."""
    observation = observe(sent, build("bert", 1), ONE, [1])
    prior = NGramPrior.fit([(1, 8, 33, 19, 51, 2)] * 3, vocabulary=60)
    attack = LAMP(**SHORT | {"moves": 100}, prior=prior, prior_weight=1e6)
    problem = Problem(setting(observation, FRAME), Cosine())
    found = truth(problem, ONE, [1])
    for seed in range(3):
        generator = Generator().manual_seed(seed)
        found = attack._rearrange(problem, found, dict.fromkeys(MOVES, 0), Watch(), generator)
    assert tuple(problem.tokens(found.embeddings)[0].tolist()) == (1, 8, 33, 19, 51, 2)
    assert attack(observation, seconds=0.3).used == ("lengths", "labels", "language model")

"""Gradients of single examples: every way against one backward pass an example, and against Opacus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from privfm.checks import InvalidArgument, PrivacyBroken
from privfm.contracts import Examples, ModelSource, Table
from privfm.learning import (
    ImageClassification,
    LoRA,
    MeanPooledClassifier,
    PlainCNN,
    SequenceClassification,
    SequenceClassifier,
    SmallCNN,
    VisionTransformer,
    Workbench,
)
from privfm.learning.adapter_kinds import IA3, Adapter, BitFit, PromptTuning
from privfm.learning.per_example import mixes_examples, per_example_gradients, problems_for, way_for
from privfm.randomness import Seeds
from privfm.vectors import Layout

LABELS = ("a", "b", "c")


def seed() -> torch.Generator:
    return Seeds(0).generator("initialisation")


def gaussian(*shape: int, at: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(at))


def of_images(source: ModelSource, size: int = 8, n: int = 12) -> Workbench:
    table = Table(gaussian(n, 1, size, size), torch.arange(n) % 3, LABELS)
    return Workbench(source.build(LABELS, seed()), ImageClassification(), table)


def of_text(folder: str, sentences: list[str], adapter: Adapter | None, pooling: str = "mean") -> Workbench:
    source = SequenceClassifier(folder, pooling=pooling, adapter=adapter, max_length=16)  # type: ignore[arg-type]
    table = Table(sentences, torch.arange(len(sentences)) % 3, LABELS)
    return Workbench(source.build(LABELS, seed()), SequenceClassification(), table)


def moved(bench: Workbench) -> Workbench:
    """With weights of no special place: at the start of LoRA half of the gradients are zero."""
    bench.load(bench.initial + 0.1 * gaussian(bench.layout.d, at=1))
    return bench


def one_by_one(bench: Workbench, examples: Examples) -> Tensor:
    """The definition: one backward pass an example, into `grad`."""
    rows = []
    for place in range(len(examples)):
        bench.losses(examples.take(torch.tensor([place]))).sum().backward()  # type: ignore[no-untyped-call]
        rows.append(bench.layout.flatten({name: p.grad for name, p in bench.parameters.items() if p.grad is not None}))
        for parameter in bench.parameters.values():
            parameter.grad = None
    return torch.stack(rows)


def ours(bench: Workbench, examples: Examples, way: str | None = None) -> Tensor:
    return per_example_gradients(
        bench.module, bench.parameters, bench.losses, examples, bench.layout, way=way  # type: ignore[arg-type]
    )  # fmt: skip


def chosen(bench: Workbench) -> str:
    return way_for(bench.module, bench.parameters, bench.losses, bench.everything, bench.layout)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    """To 1e-6 of the largest gradient of the example."""
    assert found.dtype == torch.float32
    largest = expected.abs().amax(1, keepdim=True).clamp(min=1)
    assert float(((found - expected) / largest).abs().max()) < 1e-6


IMAGES = {
    "group norm": (SmallCNN(width=4), 8, "layers"),
    "in place, channels last": (PlainCNN(size=10, width=3, hidden=5, channels=1), 10, "layers"),
    "transformer": (VisionTransformer(depth=2, hidden=16, heads=2), 8, "vectorised"),
    "transformer, adapted": (
        VisionTransformer(depth=2, hidden=16, heads=2, adapter=LoRA(rank=2, modules=("q_proj",))),
        8,
        "layers",
    ),
}


@pytest.mark.parametrize("case", IMAGES)
@pytest.mark.parametrize("way", [None, "loop", "vectorised"])
def test_image_models_equal_one_backward_pass_an_example(case: str, way: str | None) -> None:
    source, size, first = IMAGES[case]
    bench = moved(of_images(source, size))
    assert chosen(bench) == first
    expected = one_by_one(bench, bench.everything)
    assert_equal(ours(bench, bench.everything, way), expected)
    assert float((expected.sum(0) - len(expected) * expected[0]).norm()) > 1e-2  # examples do differ


KINDS = {
    "LoRA": (LoRA(rank=2), "layers"),
    "LoRA above kept activations": (LoRA(rank=2, layers=(2,)), "layers"),
    "FFA": (LoRA(rank=2, freeze_a=True), "layers"),
    "head": (None, "layers"),
    "biases": (BitFit(), "layers"),
    "scales": (IA3(), "layers"),
    "prompt": (PromptTuning(3), "loop"),
}


@pytest.mark.parametrize("pooling", ["mean", "model"])
@pytest.mark.parametrize("kind", KINDS)
def test_text_models_equal_one_backward_pass_an_example(
    kind: str, pooling: str, tiny_bert: str, sentences: list[str]
) -> None:
    adapter, first = KINDS[kind]
    bench = moved(of_text(tiny_bert, sentences, adapter, pooling))
    assert (bench.trunk is not None) == (kind in {"LoRA above kept activations", "head"})
    if pooling == "mean" or kind != "head":  # BERT's own head has a frozen part, too
        assert chosen(bench) == first
    examples = bench.everything.take(torch.tensor([3, 50, 7, 7, 22]))
    assert_equal(ours(bench, examples), one_by_one(bench, examples))


@pytest.mark.parametrize("b", [2, 3, 5, 6])
def test_a_batch_as_long_as_its_texts_is_told_from_them(b: int, tiny_bert: str, sentences: list[str]) -> None:
    """Tokens might be in front of the examples: the shape alone does not say."""
    bench = moved(of_text(tiny_bert, sentences, LoRA(rank=2)))
    lengths = bench.everything.inputs["attention_mask"].sum(1)
    places = (lengths == b).nonzero()[:, 0]
    examples = bench.everything.take(places.repeat(b)[:b])
    assert_equal(ours(bench, examples), one_by_one(bench, examples))


@contextmanager
def opacus(bench: Workbench) -> Iterator[None]:
    """Opacus's own hooks; it looks at layers in training mode only."""
    from opacus.grad_sample import GradSampleHooks

    layers = [part for part in bench.module.modules() if any(True for _ in part.parameters(recurse=False))]
    for layer in layers:
        layer.train()
    hooks = GradSampleHooks(bench.module, loss_reduction="sum")
    try:
        yield
    finally:
        hooks.cleanup()
        bench.module.eval()
        for parameter in bench.parameters.values():
            parameter.grad = None


def clipped_sum(rows: Tensor, bound: float) -> Tensor:
    return (rows * (bound / rows.norm(dim=1, keepdim=True)).clamp(max=1)).sum(0)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", ["group norm", "LoRA", "biases"])
def test_clipped_sums_are_those_of_opacus(kind: str, tiny_bert: str, sentences: list[str]) -> None:
    bench = of_images(SmallCNN(width=4)) if kind in IMAGES else of_text(tiny_bert, sentences, KINDS[kind][0])
    examples = moved(bench).everything.take(torch.arange(9))
    mine = ours(bench, examples)
    with opacus(bench):
        bench.losses(examples).sum().backward()  # type: ignore[no-untyped-call]
        theirs = torch.cat([bench.parameters[name].grad_sample.reshape(9, -1) for name in bench.layout.names], 1)  # type: ignore[attr-defined]
    bound = float(theirs.norm(dim=1).median())
    torch.testing.assert_close(clipped_sum(mine, bound), clipped_sum(theirs, bound), rtol=1e-5, atol=1e-6)
    wrong = clipped_sum(theirs.mean(0, keepdim=True), bound) * 9  # clipping the mean is something else
    assert float((clipped_sum(mine, bound) - wrong).abs().max()) > 1e-3


def test_opacus_s_formula_alone_is_wrong_with_channels_last() -> None:
    """Why a layer's input is made contiguous first; when this fails, Opacus has been mended."""
    from opacus.grad_sample import GradSampleModule

    layer, images = nn.Conv2d(3, 2, 3), gaussian(2, 3, 6, 6)
    formula = GradSampleModule.GRAD_SAMPLERS[nn.Conv2d]
    backward = gaussian(2, 2, 4, 4, at=1)
    plain = formula(layer, [images], backward)[layer.weight]
    last = formula(layer, [images.contiguous(memory_format=torch.channels_last)], backward)[layer.weight]
    layer(images).backward(backward)
    torch.testing.assert_close(plain.sum(0), layer.weight.grad)
    assert float((last - plain).abs().max()) > 0.1


# What no formula covers goes to the next way


class Own(nn.Module):
    """A module under test, its losses and its examples."""

    def __init__(self, forward: Callable[[Own, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def gradients(module: nn.Module, x: Tensor, way: str | None = None) -> tuple[str, Tensor, Tensor]:
    """The way that is taken, what it finds, and the definition."""
    parameters = dict(module.named_parameters())
    layout = Layout.of(parameters)

    def losses(examples: Examples) -> Tensor:
        return module(examples.inputs["x"]).square().flatten(1).sum(1)

    examples = Examples({"x": x}, torch.zeros(len(x)))
    expected = []
    for one in x:
        grads = torch.autograd.grad(module(one[None]).square().sum(), list(parameters.values()))
        expected.append(layout.flatten(dict(zip(parameters, grads, strict=True))))
    found = per_example_gradients(module, parameters, losses, examples, layout, way=way)  # type: ignore[arg-type]
    return way_for(module, parameters, losses, examples, layout), found, torch.stack(expected)


def linear(seed: int = 0, **options: bool) -> nn.Linear:
    layer = nn.Linear(4, 4, **options)
    with torch.no_grad():
        for k, parameter in enumerate(layer.parameters()):
            parameter.copy_(gaussian(*parameter.shape, at=seed + k))
    return layer


UNUSUAL: dict[str, tuple[Callable[[], Own], str]] = {
    "called twice": (lambda: Own(lambda m, x: m.a(m.a(x).tanh()), a=linear()), "layers"),
    "keyword": (lambda: Own(lambda m, x: m.a(input=x), a=linear(bias=False)), "layers"),
    "weight used past its layer": (lambda: Own(lambda m, x: m.a(x) @ m.a.weight, a=linear()), "vectorised"),
    "layer bypassed": (
        lambda: Own(lambda m, x: nn.functional.linear(x, m.a.weight), a=linear(bias=False)),
        "vectorised",
    ),
    "tokens in front": (lambda: Own(lambda m, x: m.a(x.transpose(0, 1)).tanh().sum(0), a=linear()), "vectorised"),
    "values decide": (lambda: Own(lambda m, x: m.a(x) @ m.a.weight * (2 if x.sum() > 0 else 1), a=linear()), "loop"),
    "norm without bias": (
        lambda: Own(lambda m, x: m.n(m.a(x)), a=linear(), n=nn.LayerNorm(4, bias=False)),
        "vectorised",
    ),
    "in place behind": (lambda: Own(lambda m, x: m.a(x).relu_(), a=linear()), "layers"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSUAL)
def test_no_use_of_a_weight_goes_unnoticed(case: str) -> None:
    made, first = UNUSUAL[case]
    shape = (5, 3, 4) if case == "tokens in front" else (5, 4)
    way, found, expected = gradients(made(), gaussian(*shape))
    assert way == first
    assert_equal(found, expected)


def test_tokens_in_front_are_seen_even_when_they_are_as_many_as_the_examples() -> None:
    _, found, expected = gradients(UNUSUAL["tokens in front"][0](), gaussian(4, 4, 4))
    assert_equal(found, expected)


def test_an_input_that_is_written_to_afterwards_is_an_error_as_it_is_to_torch() -> None:
    """Autograd does not run through a layer below which nothing is asked for, and would say nothing."""

    def forward(module: Own, x: Tensor) -> Tensor:
        between = x.clone()
        output: Tensor = module.a(between)
        between.mul_(2)
        return output

    module = Own(forward, a=linear())
    parameters, x = dict(module.named_parameters()), gaussian(3, 4)
    asked = (module, parameters, lambda some: module(some.inputs["x"]).sum(1), Examples({"x": x}, torch.zeros(3)))
    with pytest.raises(InvalidArgument, match="the input of a Linear is written to afterwards"):
        per_example_gradients(*asked, Layout.of(parameters), way="layers")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        per_example_gradients(*asked, Layout.of(parameters))


def test_circular_padding_is_not_left_to_a_formula_for_zeros() -> None:
    convolution = Own(lambda m, x: m.c(x), c=nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"))
    way, found, expected = gradients(convolution, gaussian(3, 1, 5, 5))
    assert way != "layers"
    assert_equal(found, expected)


def test_a_padding_token_s_embedding_has_no_gradient() -> None:
    module = Own(lambda m, x: m.e(x), e=nn.Embedding(6, 3, padding_idx=0))
    _, found, expected = gradients(module, torch.tensor([[0, 1, 2], [3, 0, 0]]))
    assert_equal(found, expected)
    assert torch.count_nonzero(found[:, :3]) == 0


def test_a_way_that_was_asked_for_is_not_replaced(tiny_bert: str, sentences: list[str]) -> None:
    with pytest.raises(InvalidArgument, match=r"way='layers' does not cover this model: .* used 2 times, in 1 calls"):
        gradients(UNUSUAL["weight used past its layer"][0](), gaussian(5, 4), "layers")
    bench = of_text(tiny_bert, sentences, LoRA(rank=2))
    with pytest.raises(InvalidArgument, match="way='vectorised' does not cover this model: vmap"):
        ours(bench, bench.everything.take(torch.arange(3)), "vectorised")
    with pytest.raises(InvalidArgument, match="did you mean 'layers'"):
        ours(bench, bench.everything, "layer")


# What is left behind, and what is refused


def everything_on(module: nn.Module) -> list[object]:
    parts = [*module.modules(), *module.parameters()]
    hooks = [(len(part._forward_hooks), len(part._backward_hooks), part.training) for part in module.modules()]
    return [*(sorted(vars(part)) for part in parts), *hooks, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("way", [None, "loop", "vectorised"])
def test_the_model_is_left_as_it_was_even_by_an_error(way: str | None, untouched_random_state: None) -> None:
    bench = moved(of_images(SmallCNN(width=4)))
    before, weights = everything_on(bench.module), bench.layout.flatten(bench.parameters)
    ours(bench, bench.everything, way)

    def failing(examples: Examples) -> Tensor:
        bench.losses(examples)
        raise KeyError("a client's own code")

    with pytest.raises((KeyError, InvalidArgument)):
        per_example_gradients(bench.module, bench.parameters, failing, bench.everything, bench.layout, way=way)  # type: ignore[arg-type]
    assert everything_on(bench.module) == before
    assert torch.equal(bench.layout.flatten(bench.parameters), weights)
    assert all(p.grad is None for p in bench.module.parameters())


def test_no_examples_are_no_rows_and_one_is_one() -> None:
    bench = of_images(SmallCNN(width=4))
    assert ours(bench, bench.everything.take(torch.arange(0))).shape == (0, bench.layout.d)
    one = bench.everything.take(torch.tensor([4]))
    assert_equal(ours(bench, one), one_by_one(bench, one))
    assert_equal(ours(bench, one, "layers"), one_by_one(bench, one))


@pytest.mark.parametrize("way", [None, "loop"])
def test_a_parameter_that_no_loss_depends_on_is_named(way: str | None) -> None:
    module = Own(lambda m, x: m.a(x), a=linear(), unused=linear())
    parameters = dict(module.named_parameters())
    layout = Layout.of(parameters)
    examples = Examples({"x": gaussian(3, 4)}, torch.zeros(3))
    with pytest.raises(PrivacyBroken, match=r"unused.bias, unused.weight: the losses do not depend on it"):
        per_example_gradients(
            module, parameters, lambda one: module(one.inputs["x"]).sum(1), examples, layout, way=way  # type: ignore[arg-type]
        )  # fmt: skip


def test_what_is_frozen_foreign_or_of_another_layout_is_refused() -> None:
    bench = of_images(SmallCNN(width=4))
    name = bench.layout.names[0]
    with pytest.raises(InvalidArgument, match="different names"):
        per_example_gradients(
            bench.module, {name: bench.parameters[name]}, bench.losses, bench.everything, bench.layout
        )
    with pytest.raises(InvalidArgument, match="no parameter of the module"):
        other = {**bench.parameters, name: nn.Parameter(bench.parameters[name].detach().clone())}
        per_example_gradients(bench.module, other, bench.losses, bench.everything, bench.layout)
    bench.parameters[name].requires_grad_(False)
    with pytest.raises(InvalidArgument, match="is frozen"):
        ours(bench, bench.everything)


def test_layers_that_mix_or_remember_examples_are_problems() -> None:
    assert problems_for(of_images(SmallCNN(width=4)).module) == []
    bad = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.InstanceNorm2d(2, track_running_stats=True))
    assert [problem.split(" ")[0] for problem in problems_for(bad)] == ["1", "2"]
    assert "use GroupNorm" in problems_for(bad)[0]
    frozen = bad.eval().requires_grad_(False)
    assert problems_for(frozen) == []  # an affine map with fixed numbers
    assert problems_for(nn.BatchNorm1d(2, track_running_stats=False).eval().requires_grad_(False))


def test_losses_that_depend_on_the_batch_are_seen_whatever_the_layer() -> None:
    bench = of_images(SmallCNN(width=4))
    assert not mixes_examples(bench.losses, bench.everything)
    assert mixes_examples(lambda some: bench.losses(some) - bench.losses(some).mean(), bench.everything)


def test_a_text_is_as_it_would_be_alone(tiny_bert: str, sentences: list[str]) -> None:
    bench = of_text(tiny_bert, sentences, LoRA(rank=2))
    assert not mixes_examples(bench.losses, bench.everything)
    unknown = replace(bench.everything, rows=None)
    assert_equal(ours(bench, unknown.take(torch.arange(4))), one_by_one(bench, bench.everything.take(torch.arange(4))))


@pytest.mark.parametrize("kind", ["LoRA", "FFA", "scales", "prompt"])
def test_a_model_that_was_used_comes_back_through_peft(
    kind: str, tiny_bert: str, sentences: list[str], tmp_path: Path
) -> None:
    from peft import PeftModel

    bench = moved(of_text(tiny_bert, sentences, KINDS[kind][0]))
    ours(bench, bench.everything.take(torch.arange(6)))
    model = bench.initial + 0.1 * gaussian(bench.layout.d, at=2)
    bench.save(model, tmp_path)
    loaded = PeftModel.from_pretrained(MeanPooledClassifier.from_pretrained(tiny_bert, 3), str(tmp_path)).eval()
    inputs = {name: value[:5] for name, value in bench.everything.inputs.items()}
    assert torch.equal(loaded(**inputs), bench.load(model)(**inputs))

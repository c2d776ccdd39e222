"""Gradients of single examples, for models that the batched adapter engine does not cover.

Three ways, each exact; the first that covers everything trained is taken, and what it cannot vouch for goes to the next:

| way | what it does | covers |
|---|---|---|
| `layers` | one pass for all; Opacus's formulas turn each layer's input and output gradient into one gradient an example | plain linear, convolution, embedding and normalisation layers, and IA3 around linear ones, called with the examples in front |
| `vectorised` | `torch.func.vmap` over the model's own code | whatever runs without looking at values: image models; no text with an attention mask (transformers 5 reads it) |
| `loop` | one backward pass an example | everything |

Opacus's own hooks attach to modules in training mode, wrap their outputs, which an in-place activation behind them does
not survive, and read keyword arguments as nothing at all. Here a layer's call is only watched: the gradient is asked
for at the edge of the graph where the output came from, so that the weights' own gradients are never computed and
nothing stays on the model.
"""  # noqa: E501

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, final
from warnings import catch_warnings, filterwarnings

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from privfm.checks import InvalidArgument, PrivacyBroken, first_line, one_of, require
from privfm.contracts import Examples
from privfm.vectors import Layout

Losses = Callable[[Examples], Tensor]
Formula = Callable[[nn.Module, list[Tensor], Tensor], dict[nn.Parameter, Tensor]]
"""From a layer, its input and the gradient of its output to the gradients `(b, ...)` of its parameters."""

Way = Literal["layers", "vectorised", "loop"]
WAYS: tuple[Way, ...] = ("layers", "vectorised", "loop")

ALONE = 1e-3
"""Share by which an example's loss may depend on its company: rounding and padding stay far below, mixing far above."""
ALONE_ROUGHLY = 0.05
"""The same where roundings are larger and add up over layers: 2^-8 of bfloat16 weights, 2^-11 of TF32 on a GPU."""


def per_example_gradients(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    losses: Losses,
    examples: Examples,
    layout: Layout,
    *,
    way: Way | None = None,
) -> Tensor:
    """The gradient of every example's own loss; module and parameters stay as they are, their `grad` included.

    Args:
      module: what `losses` calls.
      parameters: what is trained, by name.
      losses: examples -> `(b,)`, each from its own example only (`problems_for`, `mixes_examples`).
      examples: b of them; none are fine.
      layout: of the parameters: the order of the columns.
      way: one of the ways above; None: the first that covers the model (`way_for`).

    Returns:
      `(b, d)` float32, on the device of the parameters.

    Raises:
      InvalidArgument: `way` does not cover the model.
      PrivacyBroken: a parameter gets no gradient from the losses.
    """
    asked = _Asked(module, parameters, losses, examples, layout)
    asked.check()
    if way is not None:
        one_of("way", way, WAYS)
    if len(examples) == 0:
        return asked.rows()
    if way is None and len(examples) == 1:
        return _by_loop(asked)
    return _first_covering(asked, way)[1]


def way_for(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], losses: Losses, examples: Examples, layout: Layout
) -> Way:
    """The first way that covers the model, tried on the first of at least two examples; see `per_example_gradients`."""
    require(len(examples) >= 2, f"{len(examples)} examples: expected two at least, to tell ways apart")
    asked = _Asked(module, parameters, losses, examples.take(torch.arange(2)), layout)
    asked.check()
    return _first_covering(asked, None)[0]


def problems_for(module: nn.Module) -> list[str]:
    """Why a module's losses are not each their own example's: layers that mix a batch, or remember it."""
    problems = []
    for name, part in module.named_modules():
        kind, remembers = type(part).__name__, bool(getattr(part, "track_running_stats", False))
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            trained = any(p.requires_grad for p in part.parameters(recurse=False))
            if part.training or trained or part.running_mean is None:
                problems.append(
                    f"{name} ({kind}) mixes the examples of a batch: no example has a gradient of its own; use "
                    "GroupNorm, or freeze it with the statistics it came with"
                )
        elif remembers and part.training:
            problems.append(f"{name} ({kind}) remembers statistics of the examples outside the gradient; set "
                            "track_running_stats=False")  # fmt: skip
    return problems


def mixes_examples(losses: Losses, examples: Examples, share: float = ALONE) -> bool:
    """Whether the loss of an example depends on the others of its batch by more than `share`, as far as these show."""
    with torch.no_grad():
        together = losses(examples)
        alone = torch.cat([losses(one) for one in _singly(examples)])
    return not torch.allclose(together, alone, rtol=share, atol=share, equal_nan=True)  # NaN alone is its own doing


@final
class _NotCovered(Exception):
    """A way cannot vouch for its result; says why."""


@final
@dataclass(frozen=True)
class _Asked:
    """What gradients are asked for; see `per_example_gradients`."""

    module: nn.Module
    parameters: Mapping[str, nn.Parameter]
    losses: Losses
    examples: Examples
    layout: Layout

    def check(self) -> None:
        """Refuses parameters that are frozen, foreign, or not those of the layout."""
        require(
            tuple(sorted(self.parameters)) == self.layout.names,
            "parameters and layout have different names: expected the layout of these parameters",
        )
        own = {id(p) for p in self.module.parameters()}
        for name, parameter in self.parameters.items():
            require(parameter.requires_grad, f"{name} is frozen: nothing to differentiate; leave it out")
            require(id(parameter) in own, f"{name} is no parameter of the module")

    def rows(self) -> Tensor:
        """Zeros `(b, d)`, where the parameters are."""
        first = next(iter(self.parameters.values()))
        return torch.zeros(len(self.examples), self.layout.d, device=first.device)


def _first_covering(asked: _Asked, way: Way | None) -> tuple[Way, Tensor]:
    """The gradients by `way`, or by the first way that covers the model, and which that was."""
    faster: dict[Way, Callable[[_Asked], Tensor]] = {"layers": _by_layers, "vectorised": _vectorised}
    for name, gradients in faster.items():
        if way in (None, name):
            try:
                return name, gradients(asked)
            except _NotCovered as reason:
                if way is not None:
                    raise InvalidArgument(f"way={way!r} does not cover this model: {reason}") from reason
    return "loop", _by_loop(asked)


# One backward pass an example


def _singly(examples: Examples) -> Iterator[Examples]:
    for place in range(len(examples)):
        yield examples.take(torch.tensor([place]))


def _by_loop(asked: _Asked) -> Tensor:
    layout, rows = asked.layout, asked.rows()
    tensors = [asked.parameters[name] for name in layout.names]
    reached = [False] * len(tensors)
    with torch.enable_grad():
        for row, one in zip(rows, _singly(asked.examples), strict=True):
            found = torch.autograd.grad(asked.losses(one).sum(), tensors, allow_unused=True)
            for k, (part, gradient) in enumerate(zip(torch.split(row, list(layout.sizes)), found, strict=True)):
                if gradient is not None:  # of an expert that this example does not visit, say
                    reached[k] = True
                    part.copy_(gradient.reshape(-1))
    _refuse_unreached([name for name, known in zip(layout.names, reached, strict=True) if not known])
    return rows


def _refuse_unreached(names: Sequence[str]) -> None:
    if names:
        raise PrivacyBroken(
            f"{', '.join(names[:3])}{' and others' * (len(names) > 3)}: the losses do not depend on it, so that no "
            "example has a gradient for it; freeze it"
        )


# The model's own code, vectorised


@final
class _Called(nn.Module):
    """Losses as a module, so that `functional_call` can put other values in the place of the parameters."""

    def __init__(self, module: nn.Module, losses: Losses) -> None:
        super().__init__()
        self.module, self._losses = module, losses

    def forward(self, examples: Examples) -> Tensor:
        """`(b,)`."""
        return self._losses(examples)


def _vectorised(asked: _Asked) -> Tensor:
    called, examples, names = _Called(asked.module, asked.losses), asked.examples, asked.layout.names
    by_identity = {id(p): name for name, p in called.named_parameters()}
    own = {name: by_identity[id(asked.parameters[name])] for name in names}
    values = {own[name]: asked.parameters[name].detach() for name in names}
    device = next(iter(values.values())).device
    inputs = {name: value.to(device) for name, value in examples.inputs.items()}

    def loss(values: dict[str, Tensor], inputs: dict[str, Tensor], label: Tensor) -> Tensor:
        one = Examples({name: value[None] for name, value in inputs.items()}, label[None])
        total: Tensor = torch.func.functional_call(called, values, (one,)).sum()
        return total

    try:
        with catch_warnings():
            filterwarnings("ignore", "There is a performance drop", UserWarning)  # vmap's own loop, in the kernels
            gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(values, inputs, examples.labels)
    except Exception as reason:  # whatever a model's own code says to tensors without values
        raise _NotCovered(f"vmap: {first_line(reason)}") from reason
    parts = [gradients[own[name]].reshape(len(examples), -1).float() for name in names]
    for name, part in zip(names, parts, strict=True):
        if not bool(part.count_nonzero()):  # zero, or not reached at all: the loop tells them apart
            raise _NotCovered(f"{name} has no gradient at all")
    return torch.cat(parts, 1)


# One pass, watched layer by layer


@final
@dataclass(frozen=True)
class _Call:
    """One call of a layer: the gradient at `edge`, with the tensor `given`, makes those of `parameters`."""

    layer: nn.Module
    parameters: tuple[nn.Parameter, ...]
    given: Tensor
    version: int
    edge: GradientEdge

    @classmethod
    def of(cls, layer: nn.Module, given: Tensor, reached: Tensor) -> _Call:
        """`reached` is what has the gradient; what an in-place activation makes of it later is something else."""
        if not reached.requires_grad:
            raise _NotCovered(f"a {type(layer).__name__} is called outside of the gradient")
        return cls(layer, tuple(_own(layer)), given.detach(), given._version, get_gradient_edge(reached))


def _by_layers(asked: _Asked) -> Tensor:
    examples = asked.examples
    names = {id(p): name for name, p in asked.parameters.items()}
    with _watching(_watched(asked.module, names), len(examples)) as calls, torch.enable_grad():
        losses = asked.losses(examples)
    if len(examples) > 1 and any(len(examples) in _beside(call) for call in calls):
        # Another dimension is as long as the batch: which of them is the batch shows once it has another length.
        half = len(examples) // 2
        parts = torch.split(torch.arange(len(examples)), [half, len(examples) - half])
        return torch.cat([_by_layers(replace(asked, examples=examples.take(part))) for part in parts])
    _refuse_other_uses(losses, calls, asked.parameters)
    found = torch.autograd.grad(losses.sum(), [call.edge for call in calls], allow_unused=True)
    rows = asked.rows()
    columns = dict(zip(asked.layout.names, torch.split(rows, list(asked.layout.sizes), 1), strict=True))
    for call, backward in zip(calls, found, strict=True):
        for parameter, gradients in _of_call(call, backward, len(examples)).items():
            if id(parameter) in names:
                columns[names[id(parameter)]].add_(gradients.reshape(len(examples), -1).float())
    return rows


def _of_call(call: _Call, backward: Tensor | None, b: int) -> dict[nn.Parameter, Tensor]:
    """What one call of a layer adds to the gradients of every example."""
    kind = type(call.layer).__name__
    if backward is None:
        raise _NotCovered(f"a {kind} is called whose result is not used")
    if call.given._version != call.version:
        raise _NotCovered(f"the input of a {kind} is written to afterwards")
    if _scales(call.layer):
        return {call.parameters[0]: (call.given * backward.detach()).reshape(b, -1, call.given.shape[-1]).sum(1)}
    formula = _formulas()[type(call.layer)]
    with torch.no_grad():
        # Opacus unfolds images by their strides: with channels last its gradients are silently wrong.
        return formula(call.layer, [call.given.contiguous()], backward.contiguous())


def _beside(call: _Call) -> tuple[int, ...]:
    """Lengths of the dimensions of a layer's input that might be the batch by mistake (tokens in front)."""
    if isinstance(call.layer, nn.Linear) or _scales(call.layer):
        return tuple(call.given.shape[1:-1])
    if isinstance(call.layer, nn.LayerNorm):
        return tuple(call.given.shape[1 : -len(call.layer.normalized_shape)])
    return tuple(call.given.shape[1:]) if isinstance(call.layer, nn.Embedding) else ()


def _formulas() -> dict[type, Formula]:
    """Opacus's gradient of one layer for every example, of the layers that are tested here."""
    from opacus.grad_sample import GradSampleModule

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding)
    table: Any = GradSampleModule.GRAD_SAMPLERS
    return {kind: table[kind] for kind in kinds}


def _scales(layer: nn.Module) -> bool:
    """Whether it is PEFT's IA3 around a linear module: it multiplies the module's input or output by a vector."""
    return (type(layer).__module__, type(layer).__name__) == ("peft.tuners.ia3.layer", "Linear")


def _own(layer: Any) -> list[nn.Parameter]:
    """A layer's own parameters; IA3 keeps its vectors in a part of its own, which is never called."""
    return list(layer.ia3_l.parameters() if _scales(layer) else layer.parameters(recurse=False))


def _watched(module: nn.Module, names: Mapping[int, str]) -> list[nn.Module]:
    """The layers that hold what is trained; each of them one that a formula fits."""
    formulas, found, kept = _formulas(), [], set[int]()
    for layer in module.modules():
        trained = [names[id(p)] for p in _own(layer) if id(p) in names]
        if trained and id(layer) not in kept:
            known = _scales(layer) or type(layer) in formulas
            if not known or not _formula_holds(layer):
                raise _NotCovered(f"{trained[0]} belongs to a {type(layer).__name__}, for which there is no formula")
            found.append(layer)
            kept |= {id(part) for part in layer.children()} if _scales(layer) else set()
    return found


def _formula_holds(layer: nn.Module) -> bool:
    """Whether a layer is used in the way that its formula assumes: no options that it does not read."""
    if _scales(layer):
        return len(_own(layer)) == 1
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return layer.padding_mode == "zeros"
    if isinstance(layer, nn.Embedding):
        return layer.padding_idx is None and layer.max_norm is None and not layer.scale_grad_by_freq
    if isinstance(layer, nn.LayerNorm | nn.GroupNorm):
        return layer.weight is not None and layer.bias is not None
    return True


@contextmanager
def _watching(layers: Sequence[nn.Module], b: int) -> Iterator[list[_Call]]:
    """The calls of these layers while the context lasts, in order; all of b examples."""
    calls: list[_Call] = []
    inside: dict[int, tuple[Tensor, Tensor]] = {}  # of the module that an IA3 layer is around: its input and output

    def note(layer: Any, places: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        given = _only_tensor(layer, places, named, output)
        if len(given) != b or len(output) != b:  # said before the rest of the model runs in vain
            raise _NotCovered(f"a {type(layer).__name__} is called without the examples in front")
        if not _scales(layer):
            calls.append(_Call.of(layer, given, output))
        elif layer.is_feedforward:
            calls.append(_Call.of(layer, given, inside[id(layer.base_layer)][0]))
        else:
            calls.append(_Call.of(layer, inside[id(layer.base_layer)][1], output))

    def note_inside(layer: nn.Module, places: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        inside[id(layer)] = _only_tensor(layer, places, named, output), output

    wrapped: list[Any] = [layer for layer in layers if _scales(layer)]
    handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    handles += [layer.base_layer.register_forward_hook(note_inside, with_kwargs=True) for layer in wrapped]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _only_tensor(layer: nn.Module, places: tuple[Any, ...], named: dict[str, Any], output: Any) -> Tensor:
    given = [*places, *named.values()]
    if len(given) != 1 or not isinstance(given[0], Tensor) or not isinstance(output, Tensor):
        raise _NotCovered(f"a {type(layer).__name__} is not called with one tensor")
    return given[0]


def _refuse_other_uses(losses: Tensor, calls: Sequence[_Call], parameters: Mapping[str, nn.Parameter]) -> None:
    """Every use of a parameter must be a call that was seen: weights used past their layer would go unnoticed."""
    seen = Counter(id(p) for call in calls for p in call.parameters)
    used: Counter[int] = Counter()
    waiting, known = [losses.grad_fn], {losses.grad_fn}
    while waiting:
        node = waiting.pop()
        for following, _ in getattr(node, "next_functions", ()):
            if following is None:
                continue
            variable = getattr(following, "variable", None)
            if variable is not None:
                used[id(variable)] += 1
            elif following not in known:
                known.add(following)
                waiting.append(following)
    for name, parameter in parameters.items():
        if seen[id(parameter)] != used[id(parameter)] or used[id(parameter)] == 0:
            raise _NotCovered(
                f"{name} is used {used[id(parameter)]} times, in {seen[id(parameter)]} calls of its layer"
            )

"""What of a pretrained model is trained beside the head: low-rank adapters, biases, scales, prompt tokens, or all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, final
from warnings import catch_warnings, filterwarnings

from torch import nn

from privfm.checks import InvalidArgument, at_least, nearest_if_any, positive, require
from privfm.contracts import Adapter
from privfm.learning.trunk import block_stack


# Not @final, as the other kinds are: to jsonargparse a default of a final class is a table without a class's name, and
# `--model.adapter BitFit` could not replace it.
@dataclass(frozen=True)
class LoRA(Adapter):
    """Low-rank adapters on named modules.

    Args:
      rank: of each adapter.
      alpha: the adapter's output is scaled by alpha / rank.
      modules: ends of the names of the linear modules that get an adapter, as in PEFT's `target_modules`.
      layers: blocks that get adapters, counted from the bottom; None: all of them. What lies below the first one is
        computed once per example.
      freeze_a: only B is trained, A stays what the seed drew: FFA-LoRA. Half the values to send; the mean of the
        clients' B is then exactly the mean of their products, and noise is not multiplied by noise.
      rank_stabilised: scale by alpha / sqrt(rank) instead, so that large ranks learn as fast as small ones.

    Source: Hu et al., "LoRA: low-rank adaptation of large language models", 2022, section 4.1; Sun et al., "Improving
    LoRA in privacy-preserving federated learning", 2024 (`freeze_a`); Kalajdzievski, "A rank stabilization scaling
    factor for fine-tuning with LoRA", 2023 (`rank_stabilised`).
    """

    rank: int = 8
    alpha: float = 16.0
    modules: tuple[str, ...] = ("query", "value")
    layers: tuple[int, ...] | None = None
    freeze_a: bool = False
    rank_stabilised: bool = False

    def __post_init__(self) -> None:
        at_least("rank", self.rank, 1)
        positive("alpha", self.alpha)
        require(len(self.modules) > 0, "modules=(): LoRA needs the name of at least one module")

    def applied(self, module: nn.Module, heads: Sequence[str], task_type: str | None) -> nn.Module:
        from peft import LoraConfig

        _require_modules("modules", self.modules, module)
        _require_blocks(self.layers, module)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT divides it, a float does
            target_modules=list(self.modules),
            layers_to_transform=None if self.layers is None else list(self.layers),
            modules_to_save=list(heads) or None,
            use_rslora=self.rank_stabilised,
            task_type=task_type,
        )
        adapted = _peft_model(module, config)
        if self.freeze_a:
            for name, parameter in adapted.named_parameters():
                if ".lora_A." in name:
                    parameter.requires_grad_(False)
        return adapted


@final
@dataclass(frozen=True)
class BitFit(Adapter):
    """The biases of the blocks, nothing else: about a thousandth of the values.

    The model stays its own class, and is saved whole by its own library.

    Args:
      layers: blocks whose biases are trained, counted from the bottom; None: all of them.

    Source: Ben Zaken, Goldberg, Ravfogel, "BitFit: simple parameter-efficient fine-tuning for transformer-based masked
    language-models", 2022, section 3; Bu et al., "Differentially private bias-term fine-tuning of foundation models",
    2024 (under differential privacy).
    """

    layers: tuple[int, ...] | None = None

    def applied(self, module: nn.Module, heads: Sequence[str], task_type: str | None) -> nn.Module:
        _require_blocks(self.layers, module)
        _only_heads(module, heads)
        stack = block_stack(module)
        blocks = stack if self.layers is None else [stack[layer] for layer in self.layers]
        biases = [p for block in blocks for name, p in block.named_parameters() if name.rsplit(".", 1)[-1] == "bias"]
        require(bool(biases), "BitFit: the model's blocks have no biases; use LoRA")
        for bias in biases:
            bias.requires_grad_(True)
        return module


@final
@dataclass(frozen=True)
class IA3(Adapter):
    """One learned factor for every value that keys, values and the feed-forward layer pass on.

    Args:
      outputs: ends of the names of the linear modules whose output is scaled; None: PEFT's choice for the architecture,
        then also of `inputs`.
      inputs: of those whose input is scaled (the second layer of a feed-forward part).
      layers: blocks that get factors, counted from the bottom; None: all of them.

    Source: Liu et al., "Few-shot parameter-efficient fine-tuning is better and cheaper than in-context learning", 2022,
    section 3.3.
    """

    outputs: tuple[str, ...] | None = None
    inputs: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        require(
            self.outputs is not None or not self.inputs,
            f"inputs={self.inputs!r} without outputs: give both, or neither for PEFT's own choice",
        )
        require(self.outputs is None or len(self.outputs + self.inputs) > 0, "outputs=(), inputs=(): nothing to scale")

    def applied(self, module: nn.Module, heads: Sequence[str], task_type: str | None) -> nn.Module:
        from peft import IA3Config

        outputs, inputs = self._ends(module)
        _require_modules("outputs", outputs, module)
        _require_modules("inputs", inputs, module)
        _require_blocks(self.layers, module)
        before = _names(inputs, self.layers, module)
        config = IA3Config(
            target_modules=[*_names(outputs, self.layers, module), *before],
            feedforward_modules=before,
            modules_to_save=list(heads) or None,
            task_type=task_type,
        )
        return _peft_model(module, config)

    def _ends(self, module: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
        if self.outputs is not None:
            return self.outputs, self.inputs
        from peft.utils import constants

        kind = getattr(getattr(module, "config", None), "model_type", None)
        known: dict[str, list[str]] = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
        if kind not in known:
            raise InvalidArgument(f"outputs=None: PEFT knows no choice for {kind!r}; name the modules yourself")
        inputs = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[kind]
        return tuple(end for end in known[kind] if end not in inputs), tuple(inputs)


@final
@dataclass(frozen=True)
class PromptTuning(Adapter):
    """Learned token vectors in front of every text.

    Every block sees them, so that nothing below is computed once and kept. They count against the model's positions,
    and into the mean of a mean-pooled classifier. A decoder that PEFT has loaded from a folder returns logits of theirs
    in front of the text's.

    Args:
      tokens: how many.

    Source: Lester, Al-Rfou, Constant, "The power of scale for parameter-efficient prompt tuning", 2021; figure 3a: more
    than 20 tokens gain little.
    """

    tokens: int = 20

    def __post_init__(self) -> None:
        at_least("tokens", self.tokens, 1)

    def applied(self, module: nn.Module, heads: Sequence[str], task_type: str | None) -> nn.Module:
        from peft import PromptTuningConfig

        config = PromptTuningConfig(task_type=task_type or "SEQ_CLS", num_virtual_tokens=self.tokens)
        model = _peft_model(module, config)
        if task_type == "CAUSAL_LM":
            model.register_forward_hook(self._of_the_text)
        return model

    def _of_the_text(self, module: nn.Module, given: Any, output: Any) -> Any:
        """Logits of the text's own positions: what PEFT returns has those of the prompt in front."""
        output.logits = output.logits[:, self.tokens :]
        return output


@final
@dataclass(frozen=True)
class WholeModel(Adapter):
    """Every parameter of the model, but for those named as frozen: what papers on reconstruction call full gradients.

    Freezing the embeddings is a defense, and a partial one. An update of `d` values shows a server, beside much else:

    | trained                          | what is read off its gradient                                            |
    |----------------------------------|--------------------------------------------------------------------------|
    | word embeddings                  | the tokens of the batch: only their rows are not zero. Closed form       |
    | position embeddings              | the longest text: rows beyond it are zero. Of a ViT, the image (APRIL)   |
    | head of a language model         | the tokens that are to be predicted: their rows have the other sign      |
    | any layer's weight               | the span of that layer's inputs, from which span attacks (DAGER) and     |
    |                                  | gradient matching rebuild whole texts or images                          |

    `frozen=("*embeddings*",)` takes away the first two rows and nothing of the others: whoever tests every token of the
    vocabulary against the first attention layer's span still finds the bag, and then the sentences. It costs what
    training the embeddings would have gained, which for a pretrained model and a small task is little, and makes
    updates shorter by them (half of MiniLM's values). Where a head shares its weight with the embeddings, freezing
    those freezes both. The protection is not a guarantee of any kind; that needs noise under a `DPPlan`.

    Parameters that the task does not reach (the pooler of an encoder read by its mean token) stay as they are, and are
    zeros on the wire; private gradients of examples refuse them, so that a plan asks to name them here. Clients are
    trained one by one, unless embeddings, norms and whatever else is no linear layer are frozen too.

    Args:
      frozen: patterns of parameter names as in `model.named_parameters()`, `*` standing for any characters.

    Source: the bag of words: Melis, Song, De Cristofaro, Shmatikov, "Exploiting unintended feature leakage in
    collaborative learning", 2019; frozen embeddings against it: Gupta et al., "Recovering private text in federated
    learning of language models" (FILM), 2022; spans: Petrov et al., "DAGER: exact gradient inversion for large language
    models", 2024; images: Lu et al., "APRIL: finding the Achilles' heel on privacy for vision transformers", 2022.
    """

    frozen: tuple[str, ...] = ()

    def applied(self, module: nn.Module, heads: Sequence[str], task_type: str | None) -> nn.Module:
        parameters = dict(module.named_parameters())
        for pattern in self.frozen:
            found = [name for name in parameters if fnmatchcase(name, pattern)]
            require(
                bool(found),
                f"frozen: no parameter of the model is called {pattern!r}; names are as in model.named_parameters(), "
                f"such as {next(iter(parameters))!r}{nearest_if_any(pattern, parameters)}",
            )
            head = [name for name in found if name.split(".")[0] in heads]
            require(
                not head,
                f"frozen: {pattern!r} names {', '.join(head[:3])} of the head, which is made for the labels at hand "
                "and has to be trained; name what lies below it",
            )
        for name, parameter in parameters.items():
            parameter.requires_grad_(not any(fnmatchcase(name, pattern) for pattern in self.frozen))
        require(
            any(parameter.requires_grad for parameter in parameters.values()),
            f"frozen={self.frozen!r} leaves nothing to train",
        )
        return module


def applied(adapter: Adapter | None, module: nn.Module, heads: Sequence[str], task_type: str | None) -> nn.Module:
    """The module with an adapter and its heads to train; with the heads alone where there is no adapter."""
    if adapter is not None:
        return adapter.applied(module, heads, task_type)
    _only_heads(module, heads)
    return module


def _only_heads(module: nn.Module, heads: Sequence[str]) -> None:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in heads)


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _require_modules(argument: str, ends: Sequence[str], module: nn.Module) -> None:
    linear = {name.rsplit(".", 1)[-1] for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    for wanted in ends:
        require(
            any(_ends_with(name, wanted) for name, _ in module.named_modules()),
            f"{argument}: the model has no {wanted!r}; its linear modules are {', '.join(sorted(linear))}",
        )


def _require_blocks(layers: Sequence[int] | None, module: nn.Module) -> None:
    blocks = len(block_stack(module))
    for layer in layers or ():
        require(0 <= layer < blocks, f"layers={layers}: the model has blocks 0 to {blocks - 1}")


def _names(ends: Sequence[str], layers: Sequence[int] | None, module: nn.Module) -> list[str]:
    """Full names of the modules with such an end, inside of these blocks."""
    stack = block_stack(module)
    inside = {id(part) for layer in layers or range(len(stack)) for part in stack[layer].modules()}
    return [
        name
        for name, part in module.named_modules()
        if any(_ends_with(name, end) for end in ends) and (layers is None or id(part) in inside)
    ]


def _peft_model(module: Any, config: Any) -> nn.Module:
    from peft import get_peft_model

    with catch_warnings():
        # PEFT 0.21 asks transformers 5.23 by a name that is deprecated there; nothing a user could change.
        filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model: nn.Module = get_peft_model(module, config)
    return model

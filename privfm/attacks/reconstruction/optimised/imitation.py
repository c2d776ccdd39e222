"""A client as the server imagines it: the gradient that texts given as embeddings would send, differentiable in them.

The embeddings are put in behind the model's own look-up, so that positions, padding and pooling are the model's own.
Everything runs on a second set of modules over the same weights, without dropout and under eager attention: fused
attention has no second derivative. The model that was given is not touched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from privfm.attacks.reconstruction.text_models import TextModel
from privfm.checks import require

_HALVES: Final = (torch.float16, torch.bfloat16)
"""Types too coarse to differentiate twice; such weights are copied to float32."""


@final
class Imitation:
    """What a client with given texts would send.

    Args:
      text: the model.
      names: of the tensors to imitate.

    Attributes:
      text: the model as it was given.
      model: the second set of modules.
      embedding: token embedding `(V, h)`, detached.
      language_model: its loss is that of the next tokens; else it is a classifier's cross-entropy.
      classes: number of them; of a language model its tokens.

    Raises:
      InvalidArgument: the model has no head whose loss could be imitated.
    """

    def __init__(self, text: TextModel, names: Iterable[str]) -> None:
        self.text, self.names = text, tuple(names)
        self.model = _shadow(text.model, self.names)
        place = next(name for name, module in text.model.named_modules() if module is text.embedding)
        self._lookup = self.model.get_submodule(place)
        self.embedding = dict(self.model.named_parameters())[text.embedding_name].detach()
        self._parameters = dict(self.model.named_parameters(remove_duplicate=False))
        padding = getattr(text.root.config, "pad_token_id", None)
        self._filler = 1 if padding in (None, 0) else 0  # any token that is not padding: the look-up is replaced
        self._padding = 0 if padding is None else int(padding)
        probe = self.logits(self.embedding[: min(2, len(self.embedding))][None], torch.ones(1, 2, dtype=torch.long))
        self.language_model, self.classes = probe.dim() == 3, int(probe.shape[-1])
        require(
            not self.language_model or (text.causal and self.classes == text.vocabulary),
            f"{type(text.model).__name__} gives logits {tuple(probe.shape)} for a text of two tokens: expected a "
            "classifier's (b, classes) or a causal language model's (b, T, V); what a masked one hid is unknown",
        )

    def logits(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """`(b, classes)` or `(b, T, V)` for embeddings `(b, T, h)` in the place of the token embeddings."""
        real = mask.to(embeddings.device)
        ids = torch.where(real.bool(), self._filler, self._padding)
        with _instead(self._lookup, embeddings):
            output: Any = self.model(input_ids=ids, attention_mask=real)
        found = getattr(output, "logits", output)
        require(
            isinstance(found, Tensor),
            f"{type(self.model).__name__} gives no logits: expected the client's whole model, head included",
        )
        return found  # type: ignore[no-any-return]

    def gradients(
        self, embeddings: Tensor, mask: Tensor, targets: Tensor, differentiable: bool = False
    ) -> dict[str, Tensor]:
        """The gradient of the mean cross-entropy, by name; zero where the loss does not reach.

        Args:
          embeddings: `(b, T, h)`.
          mask: `(b, T)`, 1 at real tokens, padding on the right.
          targets: probabilities, `(b, classes)`; of a language model `(b, T, V)`, those of the tokens themselves: what
            position t + 1 holds is what t predicts.
          differentiable: in `embeddings` and `targets`; several times as costly.

        Cost: a forward and a backward pass, and about twice that again for a derivative of the result.
        """
        with torch.enable_grad():
            logs = self.logits(embeddings, mask).log_softmax(-1)
            if self.language_model:
                real = mask[:, 1:].to(logs)
                losses = -(targets[:, 1:] * logs[:, :-1]).sum(-1) * real
                loss = losses.sum() / real.sum().clamp_min(1)
            else:
                loss = -(targets * logs).sum(-1).mean()
            weights = [self._parameters[name] for name in self.names]
            found = torch.autograd.grad(loss, weights, create_graph=differentiable, allow_unused=True)
        pairs = zip(self.names, weights, found, strict=True)
        return {name: torch.zeros_like(weight) if one is None else one for name, weight, one in pairs}


def _shadow(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Other modules over the same weights, of which those named take gradients."""
    wanted = set(names)
    shared: dict[int, Any] = {}
    for name, weight in model.named_parameters():
        values = weight.detach()
        values = values.float() if values.dtype in _HALVES else values
        shared[id(weight)] = nn.Parameter(values, requires_grad=name in wanted and values.dtype.is_floating_point)
    for buffer in model.buffers():
        shared[id(buffer)] = buffer.float() if buffer.dtype in _HALVES else buffer
    found = copy.deepcopy(model, shared).eval()
    for module in found.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            config._attn_implementation = "eager"
            config.use_cache = False
    return found


@contextmanager
def _instead(lookup: nn.Module, embeddings: Tensor) -> Iterator[None]:
    """The look-up gives these whatever it is asked for."""
    hook = lookup.register_forward_hook(lambda *_: embeddings)
    try:
        yield
    finally:
        hook.remove()


def matched(text: TextModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that can be imitated: all but the token embedding's own, which embeddings put in do not reach."""
    return {name: tensor for name, tensor in tensors.items() if name != text.embedding_name}

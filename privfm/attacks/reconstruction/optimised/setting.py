"""What an optimised attack knows before it begins: how many texts, how long, of which labels and tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from privfm.attacks.reconstruction.classifier_head import head_of
from privfm.attacks.reconstruction.linear_layer import label_of_one, labels_present
from privfm.attacks.reconstruction.optimised.distances import Observed
from privfm.attacks.reconstruction.optimised.imitation import Imitation, matched
from privfm.attacks.reconstruction.text_models import TextModel, text_model
from privfm.checks import InvalidArgument, first_line, require
from privfm.contracts import Observation

_BALANCED: Final = 1e-3
"""Share of its norm that a bias's gradient may miss 0 by in its sum, in float32; noise misses by far more."""


@final
@dataclass(frozen=True)
class Tokens:
    """What the public tokenizer says of texts.

    Args:
      first: every text begins with it; None: with any.
      last: every text ends with it; None: with any.
      vocabulary: ids that a text may hold between the two; None: all but these two and the model's padding.
      embedding_gradient: only those whose row of the token embedding's gradient is not zero.
    """

    first: int | None = None
    last: int | None = None
    vocabulary: tuple[int, ...] | None = None
    embedding_gradient: bool = False


@final
@dataclass(frozen=True)
class Setting:
    """Everything that the search is given.

    Attributes:
      imitation: of the client.
      observed: what is matched.
      mask: `(b, T)`, 1 at tokens.
      free: `(b, T)` bool, True where a token is looked for.
      fixed: token ids `(b, T)`, right where nothing is free.
      allowed: ids that may be found, `(k,)`, ascending.
      labels: one for each text; None: not known, or a language model.
      used: pieces of declared knowledge.
      facts: where the rest is from.
    """

    imitation: Imitation
    observed: Observed
    mask: Tensor
    free: Tensor
    fixed: Tensor
    allowed: Tensor
    labels: tuple[int, ...] | None
    used: tuple[str, ...]
    facts: dict[str, float | str] = field(default_factory=dict)


def setting(observation: Observation, tokens: Tokens, architecture: type[TextModel] | None = None) -> Setting:
    """Collects it.

    Args:
      observation: one round.
      tokens: what the tokenizer says.
      architecture: how to read the model; None finds out.

    Raises:
      InvalidArgument: something is missing that cannot be inferred; the message names the way out.
    """
    text = text_model(observation.model, architecture)
    device = text.embedding.weight.device
    gradients = {name: tensor.to(device) for name, tensor in observation.gradients.items()}
    seen = matched(text, gradients)
    require(
        bool(seen),
        f"only {text.embedding_name} was sent, whose gradient holds a bag of words and nothing that could be matched",
    )
    imitation = Imitation(text, seen)
    weights = {name: tensor.to(imitation.embedding.dtype) for name, tensor in seen.items()}
    facts: dict[str, float | str] = {}
    lengths, used = _lengths(observation, gradients, imitation, facts)
    _require_batches(imitation, len(lengths))
    labels = _labels(observation, gradients, imitation, len(lengths), facts)
    if labels is not None and observation.declared.labels is not None:
        used = (*used, "labels")
    mask, free, fixed = _places(lengths, tokens, text)
    allowed = _allowed(tokens, gradients, imitation, facts)
    return Setting(imitation, Observed(weights), mask, free, fixed, allowed, labels, used, facts)


def _lengths(
    observation: Observation, gradients: dict[str, Tensor], imitation: Imitation, facts: dict[str, float | str]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Of each text, and what of the declared knowledge says so."""
    declared = observation.declared
    if declared.lengths is not None:
        lengths = declared.lengths
        require(bool(lengths) and min(lengths) >= 1, f"declared lengths={lengths}: expected one >= 1 for each text")
        require(
            declared.examples in (None, len(lengths)),
            f"declared examples={declared.examples} and {len(lengths)} lengths: expected as many",
        )
        used: tuple[str, ...] = ("lengths",) if declared.examples is None else ("examples", "lengths")
    else:
        require(
            declared.examples is not None,
            "needs the number of texts and their lengths in tokens: observation.told(lengths=(9, 12))",
        )
        found = _longest(imitation, gradients) if declared.examples == 1 else None
        if found is None:
            raise InvalidArgument(
                "needs the lengths of the texts in tokens: observation.told(lengths=(9, 12)); only the length of a "
                "single text can be read off, from a position embedding's gradient that was sent without noise"
            )
        facts["lengths"] = "read off the position embedding's gradient"
        lengths, used = (found,), ("examples",)
    most = imitation.text.most_positions
    require(most is None or max(lengths) <= most, f"lengths={lengths}: the model reads at most {most} tokens")
    return lengths, used


def _require_batches(imitation: Imitation, examples: int) -> None:
    """Tries two texts where there are two: classifiers on the last token refuse them without a padding token."""
    if examples > 1:
        two = imitation.embedding[:2].expand(2, -1, -1)
        try:
            imitation.logits(two, torch.ones(2, 2, dtype=torch.long))
        except ValueError as reason:
            message = f"the model takes one text at a time: {first_line(reason)} (pad_token_id of its configuration)"
            raise InvalidArgument(message) from reason


def _longest(imitation: Imitation, gradients: dict[str, Tensor]) -> int | None:
    """Positions that a loss reached; None where the position embedding's gradient does not say."""
    text = imitation.text
    root: Any = text.root
    table = getattr(root, "wpe", None)
    table = getattr(getattr(root, "embeddings", None), "position_embeddings", None) if table is None else table
    rows = None if table is None else gradients.get(text.name(table.weight))
    if rows is None or bool(rows.isnan().any()):
        return None
    reached = rows.abs().sum(1) > 0
    count = int(reached.sum()) + int(imitation.language_model)  # the last token of a text predicts nothing
    begin = int(getattr(text, "first_position", 0))
    joined = bool(reached[begin : begin + int(reached.sum())].all())
    return count if joined and 0 < int(reached.sum()) < len(rows) - begin else None


def _labels(
    observation: Observation,
    gradients: dict[str, Tensor],
    imitation: Imitation,
    examples: int,
    facts: dict[str, float | str],
) -> tuple[int, ...] | None:
    """Of each text, as far as they are known beforehand."""
    if imitation.language_model:
        facts["labels"] = "the texts' own next tokens"
        return None
    declared = observation.declared.labels
    if declared is not None:
        require(
            declared.shape == (examples,) and int(declared.min()) >= 0 and int(declared.max()) < imitation.classes,
            f"declared labels={declared.tolist()}: expected one of {imitation.classes} for each of {examples} texts",
        )
        return tuple(int(label) for label in declared)
    if examples == 1:
        found = _label_of_one(imitation.text.model, gradients)
        if found is not None:
            facts["labels"] = "read off the head"
            return (found,)
    facts["labels"] = "optimised"
    return None


def _label_of_one(model: nn.Module, gradients: dict[str, Tensor]) -> int | None:
    """From a head's bias, whose gradient `p - onehot` sums to 0 and has one negative entry; or from its weight."""
    try:
        weight_name, bias_name = head_of(model)
    except InvalidArgument:
        return None  # labels are optimised then
    bias, weight = gradients.get(bias_name or ""), gradients.get(weight_name)
    if bias is None or bool(bias.isnan().any()):
        return None if weight is None else label_of_one(weight)
    found = labels_present(-bias).nonzero()[:, 0].tolist()
    balanced = abs(float(bias.sum())) <= _BALANCED * float(bias.norm())
    return int(found[0]) if balanced and len(found) == 1 else None


def _places(lengths: tuple[int, ...], tokens: Tokens, text: TextModel) -> tuple[Tensor, Tensor, Tensor]:
    """Mask, free places and fixed tokens, `(b, T)` each."""
    for name, token in (("first", tokens.first), ("last", tokens.last)):
        require(
            token is None or 0 <= token < text.vocabulary, f"{name}={token}: the model has {text.vocabulary} tokens"
        )
    device = text.embedding.weight.device
    places = torch.arange(max(lengths), device=device)[None]
    ends = torch.tensor(lengths, device=device)[:, None]
    mask, fixed = (places < ends).long(), torch.zeros(len(lengths), max(lengths), dtype=torch.long, device=device)
    free = mask.bool()
    if tokens.last is not None:
        fixed, free = fixed.masked_fill(places == ends - 1, tokens.last), free & (places != ends - 1)
    if tokens.first is not None:
        fixed, free = fixed.masked_fill(places == 0, tokens.first), free & (places != 0)
    require(bool(free.any()), f"lengths={lengths}: nothing is left beside the first and the last token")
    return mask, free, fixed


def _allowed(
    tokens: Tokens, gradients: dict[str, Tensor], imitation: Imitation, facts: dict[str, float | str]
) -> Tensor:
    """Ids that may be found."""
    text = imitation.text
    may = torch.ones(text.vocabulary, dtype=torch.bool, device=text.embedding.weight.device)
    padding = getattr(text.root.config, "pad_token_id", None)
    if tokens.vocabulary is not None:
        require(
            bool(tokens.vocabulary) and min(tokens.vocabulary) >= 0 and max(tokens.vocabulary) < text.vocabulary,
            f"vocabulary: expected ids of the model's {text.vocabulary} tokens",
        )
        may &= torch.zeros_like(may).index_fill(0, torch.tensor(tokens.vocabulary, device=may.device), True)
    else:
        for token in (tokens.first, tokens.last, padding):
            if token is not None and 0 <= token < text.vocabulary:
                may[token] = False
    if tokens.embedding_gradient:
        require(
            text.embedding_name in gradients and not imitation.language_model,
            "embedding_gradient=True needs the gradient of a classifier's token embedding, whose other rows are zero "
            f"({text.embedding_name}); set it to False",
        )
        may &= gradients[text.embedding_name].ne(0).any(1)  # NaN is not 0: what is hidden may be there
    facts["tokens allowed"] = float(may.sum())
    require(bool(may.any()), "no token is allowed: vocabulary and the embedding's gradient have none in common")
    return may.nonzero()[:, 0]

"""Which tokens occur, without order: from the span of a layer's gradient, or from the gradient of the embedding.

A row of the first attention's input is `gamma * (w_t + a_p - mean) / sigma + beta` with the token's embedding w_t, the
position's a_p and a LayerNorm's gamma and beta. Modulo the known `gamma * centred(a_p)` and beta it is a multiple of
`gamma * centred(w_t)`, so that membership of V vectors tells the tokens; no pair of token and position is tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, lgamma, log, sqrt
from typing import Any, Final, Literal, final

import torch
from torch import Generator, Tensor

from privfm.attacks.reconstruction.architectures import Block
from privfm.attacks.reconstruction.subspace import distances, row_space
from privfm.attacks.reconstruction.text_models import GPT2, Encoder, TextModel, text_model
from privfm.checks import InvalidArgument, at_least, fraction, one_of, positive, require
from privfm.contracts.reconstruction import Observation, Reconstruction, ReconstructionAttack, Watch

_ROWS: Final = 8192
"""Vocabulary rows tried at a time: 8192 x 768 float64 numbers are 50 MB."""

_NEAR: Final = 0.05
"""Distances above this are float32's (off by some 1e-3); nearer vectors are measured again in float64."""

_TOLERANCE: Final = 1e-3
"""Distance of a member. Float32 gradients put true tokens under 1e-5 and the nearest others above 0.1 (docs)."""

_MISTAKES: Final = 0.01
"""Expected number of tokens, over the whole vocabulary, that are named by chance."""


_NO_ZERO: Final = (
    "no row of the embedding's gradient is zero: noise or weight decay, or a batch of all tokens; declare the noise "
    "(observation.told(noise=...)), or take source='span'"
)
"""Why rows do not tell tokens that occur from others."""


@final
@dataclass(frozen=True)
class Bag:
    """Tokens that occur, each once, and how sure that is.

    Attributes:
      tokens: ids in ascending order.
      distances: of each to the span, `(n,)`; sines of angles.
      left_out: distance of the nearest token that was left out; infinite where none was.
      free: directions of the layer's input that the span leaves open. 0: every token is a member, and the bag is empty.
      by_chance: expected number of tokens that lie so near without occurring, were embeddings spread evenly.
    """

    tokens: tuple[int, ...]
    distances: Tensor
    left_out: float
    free: int
    by_chance: float

    @property
    def worst(self) -> float:
        """Largest distance of a token taken; 0 of none."""
        return float(self.distances.max()) if len(self.distances) else 0.0

    @property
    def margin(self) -> float:
        """Nearest token left out over the worst one taken: 1 is no margin at all."""
        return self.left_out / max(self.worst, torch.finfo(torch.float64).eps)


def bag_of_span(text: TextModel, basis: Tensor, positions: int, tolerance: float = _TOLERANCE) -> Bag:
    """The tokens whose inputs to the first attention lie in a span, whatever their position.

    | model                     | tested                                                                            |
    |---------------------------|-----------------------------------------------------------------------------------|
    | encoder, GPT-2            | `gamma * centred(w_t)` modulo the basis, `positions` position vectors and beta    |
    | rotary (Llama and others) | the token's input itself: it is the same at every position                        |
    | span as wide as the input | nothing: `free` is 0 and no token is named. A norm that centres closes one        |
    |                           | direction beforehand                                                              |
    | a row of zeros (padding)  | never taken: it has no direction                                                  |

    Args:
      text: the model.
      basis: orthonormal rows of the span, `(k, d)`.
      positions: that the texts may reach; each costs a direction. Texts that are longer lose the tokens behind it.
      tolerance: largest distance of a member. Where so few directions are left open that tokens come as near by
        chance, a smaller one down to a hundredth of it.

    Raises:
      InvalidArgument: the basis has another width, or more positions than the model has.

    Cost: V x d x (k + positions) products; 0.3 s for 30 522 tokens at width 384.

    Source: the span test of Petrov et al., "DAGER", 2024, section 4, with positions taken out: ours, see
    docs/attention_jacobian_pursuit.md.
    """
    at_least("positions", positions, 1)
    positive("tolerance", tolerance)
    width = text.width
    require(
        basis.dim() == 2 and basis.shape[1] == width, f"basis has shape {tuple(basis.shape)}: expected (k, {width})"
    )
    most = text.most_positions
    require(
        not text.positional or most is None or positions <= most,
        f"positions={positions}: the model has {most}; lower positions",
    )
    known = known_directions(text, positions)
    if known is None:
        joined = basis.double()
    else:
        joined = _joined(basis.double(), torch.cat([known, _closed_directions(text)]), tolerance)
    free = width - len(joined)
    if free <= 0:
        return Bag((), torch.zeros(0, dtype=torch.float64), inf, 0, float(text.vocabulary))
    away = _vocabulary_distances(text, joined)
    tolerance = _safe(free, width, text.vocabulary, tolerance)
    taken = (away < tolerance).nonzero()[:, 0]
    rest = away[away >= tolerance]
    return Bag(
        tokens=tuple(taken.tolist()),
        distances=away[taken],
        left_out=float(rest.min()) if len(rest) else inf,
        free=free,
        by_chance=text.vocabulary * _ball(free, width, tolerance),
    )


def token_directions(text: TextModel, tokens: Tensor) -> Tensor:
    """What a token adds to the first attention's input, up to scale: `(n,)` ids -> `(n, d)` float64.

    `gamma * centred(w_t)` where positions are added before a LayerNorm; the input itself where they are not.
    """
    if not text.positional:
        return text.first_inputs(tokens, torch.zeros_like(tokens))
    return _centred(text, text.embedding.weight.detach()[tokens].cpu().double())


def known_directions(text: TextModel, positions: int) -> Tensor | None:
    """What the first positions and the norm's shift add to it, `(positions + 1, d)` float64; None where nothing is."""
    if not text.positional:
        return None
    return torch.cat([position_directions(text, positions), norm_of(text).bias.detach().cpu().double()[None]])


def position_directions(text: TextModel, positions: int) -> Tensor:
    """`gamma * centred(a_p)` of the first positions of a positional model, `(positions, d)` float64."""
    places = torch.arange(positions)
    if isinstance(text, Encoder):
        rows = text.added(places)
    elif isinstance(text, GPT2):
        rows = text.root.wpe.weight.detach()[places].cpu().double()
    else:
        raise InvalidArgument(
            f"{type(text).__name__}: how it adds positions is not known; derive the architecture from Encoder or GPT2"
        )
    return _centred(text, rows)


def _closed_directions(text: TextModel) -> Tensor:
    """Directions that no `gamma * centred(w_t)` has, `(n, d)` float64: open or not, they tell no token from another.

    Rows are centred before gamma, so that all are orthogonal to 1 / gamma; where a gamma is 0, all lack that
    coordinate. Counted as free, they would let a span without room for anything pass for one that holds every token.
    """
    gamma: Tensor = norm_of(text).weight.detach().cpu().double()
    dead = gamma == 0
    if bool(dead.any()):
        return torch.eye(len(gamma), dtype=torch.float64)[dead]
    return gamma.reciprocal()[None]


def norm_of(text: TextModel) -> Any:
    """The LayerNorm between the embeddings and the first attention of a positional model."""
    return text.norm if isinstance(text, Encoder) else text.root.h[0].ln_1


def _centred(text: TextModel, rows: Tensor) -> Tensor:
    found: Tensor = (rows - rows.mean(-1, keepdim=True)) * norm_of(text).weight.detach().cpu().double()
    return found


def _joined(basis: Tensor, known: Tensor, tolerance: float) -> Tensor:
    """An orthonormal basis of both, the known directions exactly.

    A direction of the basis that the known ones hold already leaves rounding behind; under a tenth of the tolerance it
    is taken for that.
    """
    lengths = known.norm(dim=1, keepdim=True)
    known = known[lengths[:, 0] > 0] / lengths[lengths[:, 0] > 0]  # a shift of zeros (fresh models) has no direction
    _, values, rows = torch.linalg.svd(known, full_matrices=False)
    first = rows[values > torch.finfo(torch.float64).eps * len(known) * values[0]]
    beyond = basis - (basis @ first.T) @ first
    _, values, rows = torch.linalg.svd(beyond, full_matrices=False)
    return torch.cat([first, rows[values > tolerance / 10]])


def _vocabulary_distances(text: TextModel, basis: Tensor) -> Tensor:
    """Of all tokens, `(V,)` float64, block by block; infinite for rows without a direction."""
    found = torch.full((text.vocabulary,), inf, dtype=torch.float64)
    for start in range(0, text.vocabulary, _ROWS):
        tokens = torch.arange(start, min(start + _ROWS, text.vocabulary))
        vectors = token_directions(text, tokens)
        some = vectors.norm(dim=1) > 0
        tokens, vectors = tokens[some], vectors[some]
        if not len(tokens):
            continue
        away = distances(vectors.float(), basis)
        near = away < _NEAR
        if bool(near.any()):
            away[near] = distances(vectors[near], basis)  # of the rows as they are, not rounded to float32
        found[tokens] = away
    return found


def _ball(free: int, width: int, distance: float) -> float:
    """Bound on the chance of a random direction to lie within `distance` of a subspace that leaves `free` of `width`.

    The squared sine is Beta(free / 2, (width - free) / 2); its density is bounded by that of its first factor.
    """
    if free >= width:
        return 0.0
    half, rest = free / 2, (width - free) / 2
    constant = lgamma(half + rest) - lgamma(half) - lgamma(rest) - log(half)
    return exp(min(0.0, free * log(distance) + constant))


def _safe(free: int, width: int, vocabulary: int, tolerance: float) -> float:
    """The tolerance, or a smaller one at which as good as no token is a member by chance; at least a hundredth."""
    for lower in (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01):
        if vocabulary * _ball(free, width, lower * tolerance) < _MISTAKES:
            return lower * tolerance
    return tolerance / 100


def input_gradients(block: Block, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Gradients whose rows lie in the span of a block's input: of query, key and value, or of their adapters' A.

    Matrices that were not sent, or of which anything is hidden (NaN), are left out.
    """
    names = [projection.lora_a for projection in block.projections if projection.lora_a is not None]
    sent = [projection.matrix(tensors) for projection in block.projections] + [tensors.get(name) for name in names]
    seen = [matrix for matrix in sent if matrix is not None and bool(matrix.isfinite().all())]
    return [matrix.detach().cpu().double() for matrix in seen]


def span_under_noise(matrices: Sequence[Tensor], noise: float) -> tuple[Tensor, float]:
    """The row space of gradients, and how far rounding or noise turns it.

    Args:
      matrices: `(outputs, d)` each.
      noise: standard deviation on every entry; 0: float rounding alone.

    Returns:
      Orthonormal `(k, d)`, and the sine of the angle that its weakest direction is typically off: 0 without noise.

    Under noise, directions up to 1.5 times the largest singular value of pure noise, `s (sqrt(m) + sqrt(d))` for
    `m x d` entries of deviation s, are dropped as lost in it. A direction of singular value v that is kept is
    turned by noise of length `s sqrt(d - k)` in what is left open, over v, to first order; told is that of the weakest.

    Source: Davidson, Szarek, "Local operator theory, random matrices and Banach spaces", 2001, theorem II.13; Wedin,
    "Perturbation bounds in connection with singular value decomposition", 1972.
    """
    if noise == 0:
        return row_space(matrices)[0], 0.0
    rows = torch.cat([matrix.double() for matrix in matrices])
    _, values, directions = torch.linalg.svd(rows, full_matrices=False)
    level = noise * (sqrt(rows.shape[0]) + sqrt(rows.shape[1]))
    kept = int((values > 1.5 * level).sum())
    turned = noise * sqrt(rows.shape[1] - kept)
    return directions[:kept], 0.0 if kept == 0 else turned / float(values[kept - 1])


def bag_of_embedding(text: TextModel, gradient: Tensor, noise: float = 0.0) -> Bag:
    """The tokens whose row of the embedding's gradient is not zero.

    | the embedding                | what comes back                                                                   |
    |------------------------------|-----------------------------------------------------------------------------------|
    | its own parameter            | every token that occurs, and no other; padding excepted                           |
    | with noise                   | rows longer than a row of pure noise, 0.01 false ones expected in the vocabulary  |
    | tied to a language-model head | refused: the head's softmax makes every row non-zero                             |
    | no row is zero               | without noise refused: noise nobody has told of, or weight decay                  |

    Args:
      text: the model.
      gradient: of the embedding, `(V, h)`.
      noise: standard deviation on every entry.

    Returns:
      A bag whose distances are the noise's share of each row: `noise sqrt(h) / |row|`, 0 without noise.

    Raises:
      InvalidArgument: another shape, hidden entries, or a tied embedding.

    Source: Melis, Song, De Cristofaro, Shmatikov, "Exploiting unintended feature leakage", 2019, section 4.1; the
    threshold is the concentration of a Gaussian vector's norm, P(|z| > sqrt(h) + t) <= exp(-t^2 / 2).
    """
    shape = tuple(text.embedding.weight.shape)
    require(tuple(gradient.shape) == shape, f"gradient has shape {tuple(gradient.shape)}: expected {shape}")
    require(bool(gradient.isfinite().all()), "a part of the embedding's gradient is hidden; take source='span'")
    require(
        text.head_name != text.embedding_name,
        "the embedding is tied to the language-model head, whose softmax makes every row non-zero; take source='span'",
    )
    sizes = gradient.detach().double().norm(dim=1).cpu()
    require(noise > 0 or not bool((sizes > 0).all()), _NO_ZERO)
    rows, width = shape
    least = noise * (sqrt(width) + sqrt(2 * log(rows / _MISTAKES)))
    taken = (sizes > least).nonzero()[:, 0]
    rest = sizes[sizes <= least]
    pure = noise * sqrt(width)
    left = float(rest.max()) if len(rest) else 0.0
    return Bag(
        tokens=tuple(taken.tolist()),
        distances=pure / sizes[taken],
        left_out=inf if left == 0 else pure / left,
        free=width,
        by_chance=_MISTAKES if noise > 0 else 0.0,
    )


@final
@dataclass(frozen=True)
class BagOfWords(ReconstructionAttack):
    """Which tokens a batch holds, without order or count.

    Args:
      source: `span` of the first attention's gradients (weights of query, key and value, or their adapters' A), which
        a frozen embedding does not hide; `embedding`: rows of its gradient that are not zero.
      positions: that texts may reach, for models that add positions; each costs the span a direction.
      tolerance: distance of a member of the span; under noise the larger of this and what the noise makes of it.
      architecture: how to read the model; None finds out.

    The span holds tokens apart as long as distinct tokens + positions stay under the width; `free` in the facts says
    how many directions are left, and at 0 no token is named.

    Source: see `bag_of_span` and `bag_of_embedding`.
    """

    source: Literal["span", "embedding"] = "span"
    positions: int = 32
    tolerance: float = _TOLERANCE
    architecture: type[TextModel] | None = None

    def __post_init__(self) -> None:
        one_of("source", self.source, ("span", "embedding"))
        at_least("positions", self.positions, 1)
        fraction("tolerance", self.tolerance, one=False)

    @property
    def needs(self) -> tuple[str, ...]:
        """What it asks for."""
        if self.source == "embedding":
            return ("gradient of the token embedding, not tied to a head",)
        return ("gradients of the first attention's query, key or value",)

    def refusal(self, observation: Observation) -> str:
        """Why it cannot run."""
        try:
            text, tensors = text_model(observation.model, self.architecture), observation.gradients
        except InvalidArgument as reason:
            return str(reason)
        if self.source == "span":
            return _span_refusal(text, tensors)
        return _embedding_refusal(text, tensors, observation.declared.noise)

    def reconstruct(self, rounds: Sequence[Observation], watch: Watch, generator: Generator) -> Reconstruction:
        """The bag of the one round; uses no chance."""
        observation = rounds[0]
        text, noise = text_model(observation.model, self.architecture), _noise(observation)
        if self.source == "embedding":
            bag = bag_of_embedding(text, observation.gradients[text.embedding_name], noise)
        else:
            bag = self._of_span(text, observation, noise)
        return Reconstruction(
            tokens=frozenset(bag.tokens),
            used=("noise",) if noise > 0 else (),
            facts={"free": bag.free, "worst": bag.worst, "left out": bag.left_out, "by chance": bag.by_chance},
            stopped=watch.stopped,
        )

    def _of_span(self, text: TextModel, observation: Observation, noise: float) -> Bag:
        basis, turned = span_under_noise(input_gradients(text.block(0), observation.gradients), noise)
        most = text.most_positions
        positions = self.positions if most is None else min(self.positions, most)
        tolerance = max(self.tolerance, 2 * turned)
        if tolerance >= 1 or not len(basis):  # noise has drowned every direction
            return Bag((), torch.zeros(0, dtype=torch.float64), inf, 0, float(text.vocabulary))
        return bag_of_span(text, basis, positions, tolerance)


def _noise(observation: Observation) -> float:
    """On each coordinate of the gradients: a change's noise is scaled like the change."""
    change, noise = observation.change, observation.declared.noise
    return noise if change is None else noise / (change.learning_rate * change.weight)


def _span_refusal(text: TextModel, tensors: Mapping[str, Tensor]) -> str:
    seen = input_gradients(text.block(0), tensors)
    if not seen:
        return "no whole gradient of the first attention's query, key or value (or adapter) is seen"
    if not any(bool(one.any()) for one in seen):
        return "those gradients are zero (adapters' B in a first round): nothing of the data is in them"
    return ""


def _embedding_refusal(text: TextModel, tensors: Mapping[str, Tensor], noise: float) -> str:
    if text.head_name == text.embedding_name:
        return "the embedding is tied to the language-model head: every row is non-zero; take source='span'"
    seen = tensors.get(text.embedding_name)
    if seen is None or not bool(seen.isfinite().all()):
        return f"the gradient of {text.embedding_name} was not sent whole (frozen, or hidden); take source='span'"
    return _NO_ZERO if noise == 0 and bool(seen.any(1).all()) else ""

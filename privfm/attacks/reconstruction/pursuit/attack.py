"""Exact sentences from the full gradient of an encoder: attention-Jacobian pursuit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Final, final

import torch
from torch import Generator, Tensor

from privfm.attacks.reconstruction.pursuit.atoms import Heads, own_maps
from privfm.attacks.reconstruction.pursuit.hunt import Hunt
from privfm.attacks.reconstruction.pursuit.token_gradients import TokenGradients, token_gradients
from privfm.attacks.reconstruction.pursuit.witnesses import StateWitness, witness_of
from privfm.attacks.reconstruction.text_models import TextModel, text_model
from privfm.checks import InvalidArgument, at_least, fraction
from privfm.contracts.reconstruction import Observation, Reconstruction, ReconstructionAttack, Watch

_SAME: Final = 1e-3
"""Relative difference of two gradients that are one: float32 leaves 1e-5, two tokens differ by their whole size."""

_ALIKE: Final = 0.3
"""The same under noise: six standard deviations of it, but no more than this."""


@final
@dataclass(frozen=True)
class AttentionPursuit(ReconstructionAttack):
    """Whole sentences from the gradients of an encoder's first query, key and value maps.

    Solves for each token's gradients, and puts together the tokens that the softmax Jacobian ties to one sentence:
    a token's query gradient is, head by head, a combination of differences of its own sentence's keys, and its key
    gradient one of its queries. See docs/attention_jacobian_pursuit.md.

    | given                                | what comes back                                                           |
    |--------------------------------------|---------------------------------------------------------------------------|
    | tokens + positions above the width   | nothing: the tokens cannot be told apart                                  |
    | texts longer than a head is wide     | the bag; a head's equations are then always solvable                      |
    | equal texts in the batch             | one of them                                                               |
    | hidden dropout while training        | nothing: the inputs are no longer what the server can compute             |
    | another model's gradient             | nothing                                                                   |

    Args:
      first_token: at position 0 of every text; None: the token whose gradient is position 0's.
      last_token: ends every text; None: what the configuration calls it, else what most texts found end with.
      tolerance: share of a token's gradient that its sentence may leave, where rounding and noise are smaller.
      architecture: how to read the model; None finds out.

    Source: ours; the bag follows the span check of Petrov et al., "DAGER", 2024.
    """

    first_token: int | None = None
    last_token: int | None = None
    tolerance: float = 2e-4
    architecture: type[TextModel] | None = None

    def __post_init__(self) -> None:
        for name, value in (("first_token", self.first_token), ("last_token", self.last_token)):
            if value is not None:
                at_least(name, value, 0)
        fraction("tolerance", self.tolerance, one=False)

    @property
    def needs(self) -> tuple[str, ...]:
        """What it asks for."""
        return ("whole gradients of the first attention's query, key and value weights (biases help)",)

    def refusal(self, observation: Observation) -> str:
        """Why it cannot run."""
        try:
            text, gradients = text_model(observation.model, self.architecture), observation.gradients
        except InvalidArgument as reason:
            return str(reason)
        if text.causal or not text.positional:
            kind = type(text.root).__name__
            return f"{kind} is no encoder with positions added before a norm; decoders have the span attack"
        for projection in text.block(0).projections:
            matrix = projection.matrix(gradients)
            if matrix is None:
                return (
                    f"the gradient of {projection.weight} was not sent (frozen, or an adapter's); this attack needs "
                    "the first block trained whole; take BagOfWords"
                )
            if not bool(matrix.isfinite().all()):
                return f"a part of {projection.weight} is hidden (NaN); this attack needs it whole; take BagOfWords"
            if float(matrix.norm()) == 0:
                return f"the gradient of {projection.weight} is zero: nothing can be read from it"
        return ""

    def reconstruct(self, rounds: Sequence[Observation], watch: Watch, generator: Generator) -> Reconstruction:
        """The sentences of the one round; uses no chance."""
        observation = rounds[0]
        text = text_model(observation.model, self.architecture)
        gradients, noise = observation.gradients, _noise(text, observation)
        used = ("noise",) if observation.declared.noise > 0 else ()
        watch.tell("bag of words")
        shares = token_gradients(text, gradients, noise, watch=watch)
        if shares is None:
            facts: dict[str, float | str] = {"ended": "more tokens and positions than the width tells apart, or noise"}
            return Reconstruction(used=used, facts=facts, stopped=watch.stopped)
        tokens = frozenset(shares.tokens.tolist())
        errors = _errors(text, gradients, shares, noise)
        first = _first(shares, errors) if self.first_token is None else self.first_token
        facts = {
            "tokens": len(tokens),
            "positions": len(shares.of_positions),
            "free": shares.bag.free,
            "unexplained": shares.unexplained,
        }
        if first is None or first not in tokens:
            facts["ended"] = "no token stands at position 0 of all texts, and only there; say first_token"
            return Reconstruction(tokens=tokens, used=used, facts=facts, stopped=watch.stopped)
        witness = witness_of(text, gradients, noise)
        # Under noise the weakest texts' directions may be lost: their number is then no count.
        examples = witness.examples if isinstance(witness, StateWitness) and noise == 0 else None
        hunt = Hunt(
            heads=Heads(text, _maps(text, observation)),
            shares=shares,
            errors=errors,
            tolerance=self.tolerance,
            first=first,
            last=_last(text, tokens) if self.last_token is None else self.last_token,
            witness=witness,
            examples=examples,
            watch=watch,
        )
        hunt.run()
        return _told(hunt, tokens, used, facts)


def _told(hunt: Hunt, tokens: frozenset[int], used: tuple[str, ...], facts: dict[str, float | str]) -> Reconstruction:
    found = sorted(hunt.found.values(), key=lambda one: one.residual)
    facts["check"] = "none but a second token" if hunt.witness is None else hunt.witness.name
    if hunt.examples is not None:
        facts["examples"] = hunt.examples
    if found:
        facts["worst residual"] = max(one.residual for one in found)
    seen = [one.distance for one in found if isfinite(one.distance)]
    if seen:
        facts["worst distance"] = max(seen)
    facts["refused"] = len(hunt.refused)
    return Reconstruction(
        texts=tuple(one.text for one in found),
        tokens=tokens,
        used=used,
        facts=facts,
        stopped=hunt.watch.stopped,
    )


def _first(shares: TokenGradients, errors: Tensor) -> int | None:
    """The token whose gradient is position 0's: it stands there in every text, and nowhere else."""
    start = shares.of_positions[0]
    apart = (shares.of_tokens - start).flatten(1).norm(dim=1) / start.norm()
    place = int(apart.argmin())
    same = min(max(_SAME, 6 * float(errors[place])), _ALIKE)
    return int(shares.tokens[place]) if float(apart[place]) < same else None


def _last(text: TextModel, tokens: frozenset[int]) -> int | None:
    """What the configuration calls the end of a text, if it occurs."""
    for name in ("sep_token_id", "eos_token_id"):
        token = getattr(text.root.config, name, None)
        if isinstance(token, int) and token in tokens:
            return token
    return None


def _maps(text: TextModel, observation: Observation) -> tuple[Tensor, Tensor, Tensor]:
    """Query weight, key weight and query bias at which the gradients were taken, as nearly as can be known.

    Of several local steps the mean gradient is a sum over moving weights: those half way stand for them all.
    """
    maps = own_maps(text)
    if observation.change is None or observation.change.steps == 1:
        return maps
    query, key = text.block(0).query, text.block(0).key
    moved = (query.matrix(observation.tensors), key.matrix(observation.tensors), query.offset(observation.tensors))
    halves = [0.0 if change is None else change.detach().cpu().double() / 2 for change in moved]
    return maps[0] + halves[0], maps[1] + halves[1], maps[2] + halves[2]


def _errors(text: TextModel, gradients: Mapping[str, Tensor], shares: TokenGradients, noise: float) -> Tensor:
    """Relative standard error of each token's query and key gradients, `(T,)`.

    From the largest of what the equations leave, the declared noise, and the precision of the gradients' type.
    """
    parts = []
    for place, projection in enumerate(text.block(0).projections[:2]):
        matrix = projection.matrix(gradients)
        if matrix is None:
            continue
        rounding = torch.finfo(matrix.dtype).eps * float(matrix.detach().double().square().mean().sqrt())
        level = max(float(shares.levels[place]), noise, rounding)
        own = shares.of_tokens[:, place]
        sizes = own.norm(dim=1).clamp_min(torch.finfo(own.dtype).tiny)
        parts.append(level * shares.spread * own.shape[1] ** 0.5 / sizes)
    return torch.stack(parts).square().mean(0).sqrt()


def _noise(text: TextModel, observation: Observation) -> float:
    """Standard deviation on each coordinate of the gradients: as declared, and of a change, what subtraction leaves.

    A change is a difference of two parameters, each rounded to its type: `eps |w| / 2` at most, uniform. Divided by the
    learning rate it is often far above the rounding of a gradient.
    """
    change, noise = observation.change, observation.declared.noise
    if change is None:
        return noise
    parameters = {name: parameter.detach() for name, parameter in text.model.named_parameters()}
    sizes = [matrix for part in text.block(0).projections if (matrix := part.matrix(parameters)) is not None]
    size = float(torch.stack([matrix.double().square().mean() for matrix in sizes]).mean().sqrt())
    rounding = torch.finfo(sizes[0].dtype).eps * size / 12**0.5 if change.subtracted else 0.0
    found: float = (noise**2 + rounding**2) ** 0.5 / (change.learning_rate * change.weight)
    return found

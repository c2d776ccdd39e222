"""A curious server in a run: what the channel revealed, turned into observations, attacked and scored."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Final, final

import torch
from torch import Tensor, nn

from privfm.attacks.reconstruction.image_scores import score_images
from privfm.attacks.reconstruction.text_scores import score_texts, score_tokens
from privfm.checks import InvalidArgument, at_least, non_negative, positive, require
from privfm.contracts import (
    Declared,
    Examples,
    LocalSteps,
    Observation,
    Reconstruction,
    ReconstructionAttack,
    ServerAttack,
    ServerScene,
    WireView,
)
from privfm.vectors import Layout

TELLABLE: Final = ("examples", "labels", "lengths", "shape")
"""Fields of `Declared` that a run can tell its server."""


def received(wire: WireView) -> list[tuple[tuple[int, ...], Tensor]]:
    """Whose rows the server holds, and their mean `(d,)`: every client's own, or the first sum of all that answered."""
    if wire.rows is not None:
        return [((client,), row) for client, row in zip(wire.ids, wire.rows, strict=True)]
    return [(wire.ids, vector / len(wire.ids)) for vector in wire.vectors[:1] if wire.ids]


def observations(
    wire: WireView, layout: Layout, model: nn.Module, change: LocalSteps | None = None
) -> list[Observation]:
    """What the server received in one round, as a reconstruction takes it.

    | the channel reveals          | observations                                                                  |
    |------------------------------|-------------------------------------------------------------------------------|
    | every row                    | one a client, in the order of `wire.ids`; NaN where columns are encrypted     |
    | sums                         | one of the mean over all clients that answered, as a batch of all their data  |
    | nothing (clients open it)    | none                                                                          |

    Args:
      wire: what it received.
      layout: where parameters lie in a row.
      model: as clients received it.
      change: how they trained; None: rows are gradients.

    Raises:
      InvalidArgument: the layout does not fit the model, or nothing at all is seen of a row.
    """
    return [Observation(model, _named(layout, row), change, clients=len(members)) for members, row in received(wire)]


def _named(layout: Layout, row: Tensor) -> dict[str, Tensor]:
    """A row as named tensors, without those of which nothing is seen; what is infinite is not seen either."""
    seen = row.masked_fill(row.isinf(), torch.nan)
    return {name: tensor for name, tensor in layout.unflatten(seen).items() if not bool(tensor.isnan().all())}


def told(examples: Sequence[Examples], what: Collection[str] = TELLABLE) -> Declared:
    """What a server could be told of these clients' examples.

    Args:
      examples: of each client.
      what: of `TELLABLE`.
    """
    images = [one.inputs["pixel_values"] for one in examples if "pixel_values" in one.inputs]
    shapes: list[tuple[int, int, int]] = [(image.shape[1], image.shape[2], image.shape[3]) for image in images]
    masks = [one.inputs["attention_mask"] for one in examples if "attention_mask" in one.inputs]
    lengths = tuple(int(length) for mask in masks for length in mask.sum(1).tolist())
    plain = all(one.labels.dim() == 1 for one in examples)
    return Declared(
        examples=sum(map(len, examples)) if "examples" in what else None,
        labels=torch.cat([one.labels for one in examples]) if "labels" in what and plain else None,
        lengths=lengths if "lengths" in what and lengths else None,
        shape=shapes[0] if "shape" in what and shapes else None,
    )


def scores_of(found: Reconstruction, truth: Sequence[Examples], special: frozenset[int]) -> dict[str, float]:
    """A reconstruction against the clients' own examples, by name: of texts, and of images, as far as there are any."""
    scores: dict[str, float] = {}
    texts = texts_of(truth)
    if texts:
        score = score_texts(found.texts, texts, special)
        scores |= {
            "exact": score.exact,
            "false": float(score.false),
            "rouge_1": score.rouge_1,
            "rouge_2": score.rouge_2,
            "rouge_l": score.rouge_l,
        }
        words = score_tokens(found.tokens.union(*found.texts), texts, special)
        scores |= {"token_recall": words.recall, "token_precision": words.precision}
    images = [one.inputs["pixel_values"] for one in truth if "pixel_values" in one.inputs]
    if images and found.images is not None:
        image = score_images(found.images, torch.cat(images))
        scores |= {"psnr": image.mean_psnr, "ssim": image.mean_ssim}
    return scores


def texts_of(truth: Sequence[Examples]) -> list[tuple[int, ...]]:
    """The texts of these clients as token ids, without padding."""
    return [
        tuple(tokens[mask.bool()].tolist())
        for one in truth
        if "input_ids" in one.inputs
        for tokens, mask in zip(one.inputs["input_ids"], one.inputs["attention_mask"], strict=True)
    ]


def special_tokens(examples: Examples) -> frozenset[int]:
    """Token ids that every text has: start, end. To find them is no merit."""
    texts = texts_of([examples])
    return frozenset.intersection(*map(frozenset, texts)) if len(texts) > 1 else frozenset()


@final
@dataclass(frozen=True)
class CuriousServer(ServerAttack):
    """Runs a reconstruction on what the server receives, and scores it against the clients' own examples.

    The record gets means over the attacked observations: `refused` (1 where the attack cannot run on what is left to
    be seen), `seconds`, for texts `exact`, `false`, `rouge_1`, `rouge_2`, `rouge_l`, `token_recall` and
    `token_precision`, for images `psnr` and `ssim`; and their number, `attacked`. A refused one recovers nothing.

    Args:
      attack: what it runs.
      told: what it is told beside the tensors: of `examples`, `labels`, `lengths`, `shape`. To be told more is another
        threat model; the configuration, and with it the report, names it.
      rounds: in which it looks, from 0; looking costs time.
      clients: observations that it attacks in a round, the first ones.
      seconds: for each.
      noise: standard deviation on each coordinate of an update as it arrives, of a sum in units of its mean. It is
        public where a plan or a codec makes it: z C / B of a batch of B under example-level noise of clients (times
        the learning rate), `step / sqrt(6 n)` of n clients behind `FixedPoint`. An attack that is not told takes noise
        for data and finds nothing, which is no protection.
    """

    attack: ReconstructionAttack
    told: tuple[str, ...] = ()
    rounds: tuple[int, ...] = (0,)
    clients: int = 1
    seconds: float = 60.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        unknown = [name for name in self.told if name not in TELLABLE]
        require(not unknown, f"told={self.told!r}: expected names of {', '.join(TELLABLE)}")
        at_least("clients", self.clients, 1)
        positive("seconds", self.seconds)
        non_negative("noise", self.noise)
        require(not self.attack.malicious, f"{type(self.attack).__name__} bends the model: a curious server does not")

    def fitted(self, scene: ServerScene) -> ServerAttack:
        return _Seated(self, scene)

    def look(self, wire: WireView, model: Tensor, now: int) -> dict[str, float]:
        raise InvalidArgument("a CuriousServer looks at the run it was fitted to: call fitted(scene) first")


@final
@dataclass(frozen=True)
class _Seated(ServerAttack):
    """A curious server in its run."""

    settings: CuriousServer
    scene: ServerScene

    def look(self, wire: WireView, model: Tensor, now: int) -> dict[str, float]:
        if now not in self.settings.rounds:
            return {}
        held = received(wire)[: self.settings.clients]
        module = self.scene.load(model)
        found = [self._attacked(module, members, row) for members, row in held]
        names = sorted({name for scores in found for name in scores})
        return {"attacked": float(len(found))} | {
            name: fmean(scores.get(name, 0.0) for scores in found) for name in names
        }

    def _attacked(self, module: nn.Module, members: Sequence[int], row: Tensor) -> dict[str, float]:
        truth = [self.scene.examples(client) for client in members]
        tensors = _named(self.scene.layout, row)
        if not tensors:
            return {"refused": 1.0}
        change = self.scene.change(max(map(len, truth)))
        declared = replace(told(truth, self.settings.told), noise=self.settings.noise)
        seen = Observation(module, tensors, change, declared, len(members))
        if self.settings.attack.refusal(seen):
            return {"refused": 1.0}
        found = self.settings.attack(seen, seconds=self.settings.seconds)
        return {"refused": 0.0, "seconds": found.seconds} | scores_of(found, truth, self.scene.special)

"""A frozen vision transformer bent so that each row of its adapters' gradients is one patch of the image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import ceil, isfinite, log2, nan, sqrt
from typing import Any, Final, final

import torch
from torch import Generator, Tensor, nn

from privfm.attacks.reconstruction.architectures import asleep
from privfm.attacks.reconstruction.closed_form.layers import completed
from privfm.attacks.reconstruction.malicious.fishing import bend, head_of
from privfm.attacks.reconstruction.malicious.patch_codes import pixel_basis, position_codes
from privfm.attacks.reconstruction.vision_models import VisionModel, vision_model
from privfm.checks import InvalidArgument, at_least, positive, require
from privfm.contracts import MaliciousAttack, Observation, Reconstruction, Watch

_GAP: Final = 1000.0
"""By which an attention logit outweighs all others: exp(-1000) is 0 in float64, which ends at exp(-745)."""

_CODE: Final = 2.0
"""Length of a position's code over the longest patch's. The attention then picks a position whatever its patch is, see
`AdapterTrap.sharpness`."""

_IMPURE: Final = 1e-2
"""Relative misfit of a row to the code of its position, above which it is no token of the trap."""

_KNOWN: Final = 0.5
"""Least share of a code's numbers that must be seen: any two numbers fit any code."""

_WORKS: Final = 1e-2
"""Relative error on a probe, above which the trap does not fit the model; float32 is at 1e-5."""

_LABELS: Final = 64
"""Most classes whose labels are tried: each costs a backward pass."""


@final
@dataclass(frozen=True)
class Slot:
    """One row of one block's A: the patch whose token it is.

    Attributes:
      block: number of it.
      row: of A.
      patch: number of it.
      name: of A's parameter.
    """

    block: int
    row: int
    patch: int
    name: str


@final
@dataclass(frozen=True)
class Token:
    """What a row has given.

    Attributes:
      slot: the row.
      pixels: of the patch, `(pixels of a patch,)` float64.
      strength: of the gradient that came back to it: signed length of the row, NaN where a part is hidden. Tokens of
        the trap are equally long.
    """

    slot: Slot
    pixels: Tensor
    strength: float


@final
@dataclass(frozen=True)
class AdapterTrap(MaliciousAttack):
    """Makes the gradient of LoRA's A on the value maps a list of patches, by the attention's choice of position.

    The server sets frozen weights and initial adapters. Patches go into the tokens by an orthonormal map, beside a code
    of their position; attention and MLP add nothing (values, A and the second MLP map are zero), so that every block is
    given the same tokens. Head h's keys and queries are such that all tokens attend to one position t_h; row i of
    dL/dA = s sum_t (B_i^T dL/dv_t) u_t^T, with column B_i inside head h's outputs, is then a multiple of the one token
    u_t that the head chose. Its known code gives the multiple and what the norm before the attention took off: the
    patch follows exactly. A block yields min(rank, heads) patches, several rounds of the same data the next ones.

    The bent model says the same of every image, so that what comes back depends on the label alone, and the server
    knows it for every label: the rows' strengths name the label of one image, under cross-entropy, and fit none if they
    come from several (`misfit to one image`; 0 for one).

    | behind the gradient                          | result                                                       |
    |----------------------------------------------|--------------------------------------------------------------|
    | one image                                    | exact, for as many patches as there are rows (`capacity`)    |
    | several, `target` their class of one of them | the image of that class, exactly, through any secure sum too |
    | several otherwise                            | a mixture of their patches                                   |
    | patch pixels > d - code                      | without the finest cosine waves of a patch                   |
    | pixels beyond `largest`                      | heads may choose other positions: such rows are left out     |
    | another model's gradient                     | nothing: rows do not have their position's code              |
    | entries of a row hidden                      | these pixels are the mean of the others                      |

    A client that tests the model notices. Patches that were not reached are the mean of the others. Cost: a forward
    pass, and a backward pass for each label (up to 64 of them).

    Args:
      largest: pixel in absolute value, in the model's input scale.
      target: class whose examples alone send a gradient, see `Fishing`; None: of every example.
      round: number of it, from 0: which patches the rows are spent on.
      head: name of the classifier, for `target`; empty: the last linear layer.
      architecture: how to read the model; None finds out.

    Source: Sami, Sen, Roy-Chowdhury, Krishnamurthy, Guler, "Gradient inversion attacks on parameter-efficient
    fine-tuning" (PEFTLeak), CVPR 2025, bends a frozen ViT so that patches reach bottleneck adapters with a ReLU, whose
    rows are bins. LoRA has no ReLU; choosing by position through the attention, and the code that undoes the norm, are
    ours.
    """

    largest: float = 1.0
    target: int | None = None
    round: int = 0
    head: str = ""
    architecture: type[VisionModel] | None = None

    several_rounds = True

    def __post_init__(self) -> None:
        positive("largest", self.largest)
        at_least("round", self.round, 0)
        if self.target is not None:
            at_least("target", self.target, 0)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("a model it has prepared", "gradients of LoRA's A on the value maps")

    def capacity(self, model: nn.Module) -> int:
        """Patches that one round reveals."""
        return len(list(_rows(vision_model(model, self.architecture))))

    # --------------------------------------------------------------------------------------------------- the trap

    def prepare(self, model: nn.Module, generator: Generator) -> nn.Module:
        trapped = deepcopy(model)
        seen = vision_model(trapped, self.architecture)
        require(
            bool(list(_rows(seen))),
            "no value map has LoRA, and no other adapter's gradient lists tokens; give peft target_modules with v_proj",
        )
        capacity, code = len(list(_rows(seen))), _bits(seen) * 2
        require(
            self.round * capacity < seen.patches,
            f"round={self.round}: {capacity} patches a round read all {seen.patches} before it; lower round",
        )
        require(code < seen.width, f"width {seen.width} has no room for {code} numbers of code beside a patch")
        with torch.no_grad():
            self._set_tokens(seen, code)
            for number in range(len(seen.layers)):
                self._silence(seen, number)
            for name, one in trapped.named_parameters():
                if "lora_B" in name:
                    one.zero_()
            for place, (number, row, _) in enumerate(_rows(seen)):
                patch = place + self.round * capacity
                self._aim(seen, number, row, seen.special + patch if patch < seen.patches else 0, generator)
        if self.target is not None:
            bend(head_of(trapped, self.head)[1], self.target)
        self._require_trapped(vision_model(trapped, self.architecture))
        return trapped

    def _set_tokens(self, seen: VisionModel, code: int) -> None:
        """A token is the patch in an orthonormal basis, and its position's code."""
        content = seen.width - code
        basis = pixel_basis(seen.projection.in_channels, seen.patch, content)
        matrix = torch.zeros(seen.width, basis.shape[1], dtype=torch.float64)
        matrix[: len(basis)] = basis
        seen.projection.weight.copy_(matrix.reshape(seen.projection.weight.shape))
        if seen.projection.bias is not None:
            seen.projection.bias.zero_()
        codes = position_codes(seen.tokens, code // 2)
        length = _CODE * self.largest * sqrt(basis.shape[1])
        rows = torch.zeros(seen.tokens, seen.width, dtype=torch.float64)
        rows[:, content:] = codes * length / sqrt(code)
        seen.positions.copy_(rows.reshape(seen.positions.shape))
        for name in ("cls_token", "distillation_token"):
            token = getattr(seen.root.embeddings, name, None)
            if token is not None:
                token.zero_()

    def _silence(self, seen: VisionModel, number: int) -> None:
        """The block passes its input on as it is, and standardises it plainly for its maps."""
        norm: Any = seen.norm(number)
        query, key, value, output = map(_linear, seen.attention(number))
        require(query.bias is not None, "the query map has no bias, by which the trap aims; use a model with qkv_bias")
        norm.weight.fill_(1.0)
        for one in (norm.bias, query.weight, query.bias, key.weight, key.bias, value.weight, value.bias, output.bias):
            if one is not None:
                one.zero_()
        maps = [one for one in seen.layers[number].mlp.modules() if isinstance(one, nn.Linear)]
        last = next(one for one in reversed(maps) if one.out_features == seen.width)
        last.weight.zero_()
        if last.bias is not None:
            last.bias.zero_()
        adapted: Any = seen.attention(number)[2]
        for adapter in getattr(adapted, "lora_A", {}).values():
            adapter.weight.zero_()

    def _aim(self, seen: VisionModel, number: int, row: int, token: int, generator: Generator) -> None:
        """Head `row` of a block attends to a token, and row `row` of its A receives what comes back of it."""
        query, key, _, _ = map(_linear, seen.attention(number))
        wide = query.weight.shape[0] // seen.heads
        code = _bits(seen) * 2
        direction = position_codes(seen.tokens, code // 2)[token]
        key.weight[row * wide, seen.width - code :] = direction.to(key.weight)
        query.bias[row * wide] = self.sharpness(seen) * sqrt(wide)
        adapted: Any = seen.attention(number)[2]
        factor = next(iter(adapted.lora_B.values())).weight
        column = torch.randn(wide, generator=generator, dtype=torch.float64)
        factor[row * wide : (row + 1) * wide, row] = (column / column.norm()).to(factor)

    def sharpness(self, seen: VisionModel) -> float:
        """Of the attention's logits, such that the chosen position outweighs all others by 1000.

        With patches at most L long and codes of 2b numbers 2L long together, a token's deviation is between 2L and
        sqrt(5) L over sqrt(d). Position t's product with its own code is 2b R over its deviation, R = 2L / sqrt(2b),
        another's at most (2b - 4) R over its own: two codes differ in at least one of b bits. Their difference is at
        least R sqrt(d) / L (2b / sqrt(5) - (2b - 4) / 2).
        """
        bits = _bits(seen)
        least = _CODE / sqrt(2 * bits) * sqrt(seen.width) * (2 * bits / sqrt(5) - (bits - 2))
        return _GAP / least

    def _require_trapped(self, seen: VisionModel) -> None:
        """Springs the trap on a probe of its own."""
        tensors = self._spring(seen, [0 if self.target is None else self.target])[0]
        truth = self._visible(seen, seen.cut(seen.probe().double() * self.largest)[0])
        tokens = self._read(seen, tensors)
        for token in tokens:
            patch = truth[token.slot.patch]
            error = float((token.pixels - patch).norm() / patch.norm())
            require(error < _WORKS, f"{_UNFIT} (patch {token.slot.patch} of a probe is off by {error:.1g})")
        require(len(tokens) == len(self._slots(seen)), f"{_UNFIT} (rows have other tokens in them)")

    def _spring(self, seen: VisionModel, labels: Sequence[int]) -> list[dict[str, Tensor]]:
        """What a client with one image, a probe, would send under each label."""
        probe = seen.probe() * self.largest
        names = sorted({slot.name for slot in self._slots(seen)})
        parameters = {name: one.detach() for name, one in seen.model.named_parameters()}
        wanted = {name: parameters[name].clone().requires_grad_() for name in names}
        with torch.enable_grad(), asleep(seen.model):
            output: Any = torch.func.functional_call(seen.model, parameters | wanted, (probe,))
            logits = output if isinstance(output, Tensor) else output[0]
            losses = -logits.reshape(1, -1).log_softmax(1)[0]
            found = []
            for label in labels:
                sent = torch.autograd.grad(losses[label], list(wanted.values()), retain_graph=True, allow_unused=True)
                found.append({name: one for name, one in zip(names, sent, strict=True) if one is not None})
        return found

    def _visible(self, seen: VisionModel, patches: Tensor) -> Tensor:
        """What of patches `(n, pixels)` the tokens hold."""
        basis = pixel_basis(seen.projection.in_channels, seen.patch, seen.width - 2 * _bits(seen))
        return patches @ basis.T @ basis

    # ------------------------------------------------------------------------------------------------ the reading

    def refusal(self, observation: Observation) -> str:
        try:
            tensors = observation.gradients
            seen = vision_model(observation.model, self.architecture)
            slots = self._slots(seen)
        except InvalidArgument as reason:
            return str(reason)
        if not slots:
            return "the model has no trap: no head attends to the code of a position; send out what prepare() returns"
        if not any(slot.name in tensors and bool(tensors[slot.name].isfinite().any()) for slot in slots):
            return f"no gradient of {slots[0].name} and its like was sent, or it is hidden"
        return ""

    def reconstruct(self, rounds: Sequence[Observation], watch: Watch, generator: Generator) -> Reconstruction:
        read = []
        for one in rounds:
            if watch.over:
                break
            seen = vision_model(one.model, self.architecture)
            read.append((seen, self._read(seen, one.gradients)))
        seen = vision_model(rounds[0].model, self.architecture)
        found = {token.slot.patch: token.pixels for _, tokens in read for token in tokens}
        facts: dict[str, float | str] = {"patches": seen.patches, "patches read": len(found)}
        used = ("malicious model",)
        if not found:
            return Reconstruction(used=used, facts=facts, stopped=watch.stopped)
        label, misfit = self._label(read, watch)
        nothing = torch.full_like(next(iter(found.values())), nan)
        patches = torch.stack([found.get(place, nothing) for place in range(seen.patches)])
        images, guessed = completed(seen.paste(patches[None]))
        return Reconstruction(
            images=images if guessed < 1 else None,
            labels=None if label is None else (label,),
            used=used,
            facts=facts | {"share of pixels guessed": guessed, "misfit to one image": misfit},
            stopped=watch.stopped,
        )

    def _label(self, read: Sequence[tuple[VisionModel, list[Token]]], watch: Watch) -> tuple[int | None, float]:
        """The label under which one image sends rows of these strengths, and by how much they differ, relative."""
        seen = read[0][0]
        classes = head_of(seen.model, self.head)[1].out_features
        if classes > _LABELS:
            return None, nan
        misfits = torch.zeros(classes, dtype=torch.float64)
        for seen, tokens in read:
            if watch.over:
                return None, nan
            tokens = [one for one in tokens if isfinite(one.strength)]
            told = torch.tensor([one.strength for one in tokens], dtype=torch.float64)
            if len(tokens) < 2:
                return None, nan
            for label, sent in enumerate(self._spring(seen, range(classes))):
                own = {one.slot: one.strength for one in self._read(seen, sent)}
                would = torch.tensor([own.get(one.slot, 0.0) for one in tokens], dtype=torch.float64)
                scale = (told @ would / would.square().sum().clamp_min(torch.finfo(would.dtype).tiny)).clamp_min(0)
                misfits[label] += (told - scale * would).square().sum() / told.square().sum() / len(read)
        best, misfit = int(misfits.argmin()), float(misfits.min().sqrt())
        return (best if misfit < _IMPURE else None), misfit

    def _slots(self, seen: VisionModel) -> list[Slot]:
        """Which row belongs to which patch, as the model's own keys and position codes say."""
        code = 2 * _bits(seen)
        codes = seen.positions.detach().reshape(seen.tokens, -1)[:, -code:].double().sign()
        found = []
        for number, row, name in _rows(seen):
            query, key, _, _ = map(_linear, seen.attention(number))
            wide = query.weight.shape[0] // seen.heads
            aim = key.weight.detach()[row * wide, -code:].double()
            token = int((codes @ aim).argmax())
            if token >= seen.special and bool((aim == codes[token]).all()):
                found.append(Slot(number, row, token - seen.special, name))
        return found

    def _read(self, seen: VisionModel, tensors: Mapping[str, Tensor]) -> list[Token]:
        """What rows give; those that are not sent, or are no token of theirs, are left out."""
        code = 2 * _bits(seen)
        content = seen.width - code
        codes = seen.positions.detach().reshape(seen.tokens, -1)[:, content:].double()
        basis = pixel_basis(seen.projection.in_channels, seen.patch, content)
        found = []
        for slot in self._slots(seen):
            if slot.name not in tensors:
                continue
            row, own = tensors[slot.name][slot.row].double(), codes[slot.patch + seen.special]
            line = _line(own, row[content:])
            if line is not None:
                slope, shift = line
                pixels = ((row[:content] - shift) / slope)[: len(basis)]
                if len(basis) < basis.shape[1]:  # else it is the identity, through which a hidden entry stays one
                    pixels = pixels @ basis
                found.append(Token(slot, pixels, float(row.norm()) * (1 if slope > 0 else -1)))
        return found


def _line(own: Tensor, seen: Tensor) -> tuple[float, float] | None:
    """Slope and shift of what was seen of a code over the code itself; None: it is not this one's, or hidden."""
    known = seen.isfinite()
    if int(known.sum()) < _KNOWN * len(own) or not bool(seen[known].any()):
        return None
    columns = torch.stack([own[known], torch.ones_like(own[known])], dim=1)
    line = torch.linalg.lstsq(columns.cpu(), seen[known][:, None].cpu(), driver="gelsd").solution
    misfit = float((columns.cpu() @ line - seen[known][:, None].cpu()).norm() / seen[known].norm())
    slope, shift = line[:, 0].tolist()
    return (slope, shift) if misfit <= _IMPURE and slope != 0 else None


_UNFIT: Final = (
    "the trap does not spring in this model: another norm, residual path or pooling than ViT's stands between the "
    "patches and the loss"
)


def _linear(module: Any) -> Any:
    """The map itself, if an adapter is around it."""
    return getattr(module, "base_layer", module)


def _bits(seen: VisionModel) -> int:
    return max(2, ceil(log2(seen.tokens)))


def _rows(seen: VisionModel) -> Iterator[tuple[int, int, str]]:
    """Block, row and parameter name of every A on a value map, for as many rows as there are heads."""
    for number in range(len(seen.layers)):
        value = seen.block(number).value
        if value.lora_a is not None:
            rank = dict(seen.model.named_parameters())[value.lora_a].shape[0]
            for row in range(min(rank, seen.heads)):
                yield number, row, value.lora_a

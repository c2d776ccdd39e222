"""Tokens and texts from adapters' gradients: any rank, any maps of the attention, one round or several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Generator

from privfm.attacks.reconstruction.lora.greedy import Dictionary
from privfm.attacks.reconstruction.lora.judge import Judge, Layer
from privfm.attacks.reconstruction.lora.places import Company, likely_positions
from privfm.attacks.reconstruction.lora.rows import AdapterRows, adapter_rows
from privfm.attacks.reconstruction.lora.search import Assembly, Found
from privfm.attacks.reconstruction.lora.tokens import Pursued, pursue, pursue_in_noise
from privfm.attacks.reconstruction.text_models import TextModel, text_model
from privfm.checks import InvalidArgument, at_least
from privfm.contracts import Observation, Reconstruction, ReconstructionAttack, Watch

_NAMED: Final = 32
"""Tokens named in the ranking when not all are sure."""


@final
@dataclass(frozen=True)
class LoRAReconstruction(ReconstructionAttack):
    """Which tokens are behind the gradients of LoRA adapters, and for encoders which texts.

    Tokens: rows of dL/dA are combinations of a few columns of a known dictionary (`tokens.pursue`). Texts: the tokens'
    coefficients hint at positions and company, and the rows of the second attention's dL/dA must lie in the span of
    the inputs that the whole supposed batch has there; small moves lead from one to the other (`judge`, `search`).

    | sent                                      | what comes back                                                     |
    |-------------------------------------------|---------------------------------------------------------------------|
    | gradients of A, q and v, one round, r = 8 | every token of a batch that the width holds apart, and no other     |
    | of several rounds on the same data        | the same, from more directions; better hints for the texts          |
    | adapters of the second block, an encoder  | texts, `proved` in the facts if nothing of any round is left over   |
    | the same, time or shakes used up          | no texts, `proved` 0; the best so far under `unproved=True`         |
    | more tokens in all than the width         | no texts: their span explains anything                              |
    | the same text twice                       | once: the span is the same                                          |
    | B = 0 (first round)                       | refused: dL/dA = B^T ... is 0 exactly                               |
    | A frozen (FFA-LoRA), or B alone sent      | refused: B's gradient shows r numbers a token                       |
    | adapters of later blocks alone            | refused: their inputs are no list of vectors                        |
    | a change by SGD steps, backbone frozen    | tokens as before; texts not proved, since adapters move in between  |
    | a change by Adam, signs, quantised        | refused, or no tokens: rows have left the span                      |
    | the product B A alone                     | refused: no factor is seen                                          |
    | noise, declared or weak                   | tokens above it that no other could replace; no texts; a ranking    |
    | foreign or permuted gradients, much noise | no tokens; the first 32 of the pursuit in the facts, as a ranking   |

    Args:
      texts: look for whole texts, too.
      positions: that texts may reach, for models that add positions; doubled while texts seem to be longer.
      shakes: how often a search that is stuck is shaken before it gives up; a time limit ends it, too.
      unproved: give back the best texts even where they are not proved: most of their tokens are in the right text, but
        sentences as a whole can be false. By default nothing is said that is not proved.
      architecture: how to read the model; None finds out.

    The number of texts is used if it is declared (`examples`); else numbers are tried, the likeliest first. So is the
    deviation of the noise (`noise`); else the least that explains the rows is found. Lengths, labels and the tokenizer
    are not used.

    Source: that rows lie in the span, and the check of whole texts at the second block: Petrov et al., "DAGER", 2024,
    for r above the number of tokens; rank-aware pursuit: Davies, Eldar, "Rank awareness in joint sparse recovery",
    2012; fewer directions than tokens, rounds added up and the search are ours.
    """

    texts: bool = True
    positions: int = 32
    shakes: int = 20
    unproved: bool = False
    architecture: type[TextModel] | None = None

    several_rounds = True

    def __post_init__(self) -> None:
        at_least("positions", self.positions, 1)
        at_least("shakes", self.shakes, 0)

    @property
    def needs(self) -> tuple[str, ...]:
        """What it asks for."""
        return ("gradients of the LoRA factors A of the first attention's query, key or value",)

    def refusal(self, observation: Observation) -> str:
        """Why it cannot run."""
        try:
            text, tensors = text_model(observation.model, self.architecture), observation.gradients
        except InvalidArgument as reason:
            return str(reason)
        names = {part.lora_a for part in text.block(0).projections if part.lora_a is not None}
        if not names:
            return "the first attention has no LoRA adapters; take an attack on full gradients, BagOfWords or the like"
        sent = [tensors[name] for name in names if name in tensors]
        if not sent:
            return (
                "no gradient of the first attention's A was sent (frozen, or merged into a product); those of B show "
                "each token through r numbers alone, which tell fewer than r tokens apart"
            )
        seen = [one for one in sent if bool(one.isfinite().all())]
        if not seen:
            return "every gradient of the first attention's A is hidden in part (NaN); this attack needs one whole"
        if not any(bool(one.any()) for one in seen):
            return (
                "max |dL/dA| = 0 at the first attention: the adapters' B is still 0 (first round), and nothing of "
                "the data is in the gradient of A; leave this round out and observe a later one"
            )
        return ""

    def reconstruct(self, rounds: Sequence[Observation], watch: Watch, generator: Generator) -> Reconstruction:
        """The tokens of all rounds together, then the texts."""
        text = text_model(rounds[0].model, self.architecture)
        watch.tell("tokens")
        sent = adapter_rows(text, rounds)
        found = self._tokens(text, rounds, sent, watch)
        used = ("noise",) if any(one.declared.noise for one in rounds) else ()
        facts: dict[str, float | str] = {
            "directions": found.directions,
            "residual": found.residual,
            "explaining tokens": len(found.tokens),
        }
        if found.noise:
            facts["noise"] = found.noise
        if not found.whole:
            facts["ranking"] = ", ".join(str(token) for token in found.ranking[:_NAMED])
        if not found.sure:
            return Reconstruction(used=used, facts=facts, stopped=watch.stopped)
        facts["by"] = "membership" if found.directions >= len(found.tokens) else "pursuit"
        layers = [layer for one in rounds if (layer := Layer.of(one, self.architecture)) is not None]
        examples = rounds[0].declared.examples
        crowded = len(found.tokens) + 2 * (examples or 1) >= text.width
        readable = self.texts and text.positional and not text.causal and found.whole and not crowded
        if not readable or not layers or watch.over:
            return Reconstruction(tokens=found.sure, used=used, facts=facts, stopped=watch.stopped)
        best = self._texts(sent, found, Judge(layers), examples, watch=watch, generator=generator)
        facts |= {"batch size": len(best.texts), "texts leave over": best.residual, "proved": float(best.proved)}
        return Reconstruction(
            texts=best.texts if best.proved or self.unproved else (),
            tokens=found.sure,
            used=used if examples is None else ("examples", *used),
            facts=facts,
            stopped="" if best.proved else watch.stopped,
        )

    def _texts(
        self,
        sent: AdapterRows,
        found: Pursued,
        judge: Judge,
        examples: int | None,
        *,
        watch: Watch,
        generator: Generator,
    ) -> Found:
        """The proved texts, or the best."""
        values = sent.of_values if bool(sent.of_values.any()) else torch.ones_like(sent.of_values)
        places = likely_positions(found.coefficients, found.known[:-1])
        assembly = Assembly(judge, found.tokens, places, Company(found.coefficients[:, values]), generator)
        return assembly.run(examples, self.shakes, watch)

    def _tokens(self, text: TextModel, rounds: Sequence[Observation], sent: AdapterRows, watch: Watch) -> Pursued:
        """Doubles the positions until the tokens explain the rows; if none do, once more in noise."""
        declared = max(one.declared.noise for one in rounds)
        dictionaries: list[Dictionary] = []
        found: list[Pursued] = []
        for positions in self._reaches(text):
            dictionaries.append(Dictionary(text, positions))
            found.append(pursue(dictionaries[-1], sent, watch, noise=declared))
            if found[-1].sure or watch.over:
                return found[-1]
        if declared:
            return found[0]
        for dictionary in dictionaries:
            noisy = pursue_in_noise(dictionary, sent, watch)
            if noisy.sure:
                return noisy
            found.append(noisy)
            if watch.over:
                break
        return found[0]

    def _reaches(self, text: TextModel) -> Iterator[int]:
        """Positions that texts may reach: twice as many each time, as long as they leave half of the input free."""
        most = text.most_positions
        positions = self.positions if most is None else min(self.positions, most)
        while True:
            yield positions
            wider = 2 * positions if most is None else min(2 * positions, most)
            if not text.positional or wider == positions or wider >= text.width // 2:
                return
            positions = wider
